"""python -m experiments.posttraining [--workdir=runs/posttraining] [--results=DIR]

Llama 2's post-training in miniature, on the shipped Llama-like model and docstrings of the embedded corpus: SFT and a
reward model; from SFT, rejection sampling and SFT on the best, PPO, and DPO. Each command is shown as it runs. Started
again, it goes on where it was; finished stages are kept. report.md, report.json and curves.png go to --results
(default: WORKDIR/report): what each stage makes of the thing that it optimises, on functions of files that no stage has
seen.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gqa import command_line
from gqa.errors import InputError

BASE = Path("assets/teacher_llama")
CONFIGS = Path("configs/posttraining")
SECONDS = "seconds.json"  # of each stage's last run


class Stage(NamedTuple):
    """A command of the chain."""

    name: str
    module: str
    arguments: list[str]
    product: Path  # there when the stage is finished


def stages(workdir: Path) -> list[Stage]:
    """The chain, in order."""
    data, best = workdir / "data", workdir / "rejection.jsonl"
    sft, reward, rejection, ppo, dpo = (workdir / name for name in ("sft", "reward", "rejection", "ppo", "dpo"))
    on_sft = f"model.checkpoint={sft / 'model'}"
    preferences = [f"data.source={data / 'preferences.jsonl'}", on_sft, *_LONG_ROWS]
    return [
        Stage("data", "experiments.posttraining_data", [f"--output={data}"], data),
        _training("SFT", "sft", sft, 80, 5e-4, [f"data.source={data / 'chats.jsonl'}", f"model.checkpoint={BASE}"]),
        _training("reward model", "reward", reward, 80, 3e-4, preferences),
        Stage(
            "rejection sampling",
            "gqa.rejection_sampling",
            [
                f"--config={CONFIGS / 'rejection_sampling.py'}",
                f"--output={best}",
                *_overrides(
                    f"policy={sft / 'model'}",
                    f"reward={reward / 'model'}",
                    f"prompts={data / 'prompts.jsonl'}",
                    *_LENGTHS,
                    "temperatures=0.7,1.0",
                    "samples=4",
                ),
            ],
            best,
        ),
        _training("SFT on the best", "sft", rejection, 16, 2e-4, [f"data.source={best}", on_sft]),
        # From SFT, not from the best of its samples, which cost two nats of KL and gain little.
        Stage(
            "PPO",
            "gqa.ppo",
            [
                f"--config={CONFIGS / 'ppo.py'}",
                f"--workdir={ppo}",
                *_overrides(
                    f"policy={sft / 'model'}",
                    f"reward={reward / 'model'}",
                    f"prompts={data / 'prompts.jsonl'}",
                    *_LENGTHS,
                    "optimizer.learning_rate=2e-4",
                    "value_optimizer.learning_rate=5e-4",
                    "ppo.rollouts=128",
                    "ppo.minibatch=32",
                    "ppo.epochs=1",
                    "ppo.beta=0.03",
                    "ppo.kl_limit=9",
                    "train.steps=8",
                    "train.eval_every=1",
                ),
            ],
            ppo / "finished.json",
        ),
        _training("DPO", "dpo", dpo, 40, 3e-4, [*preferences, "dpo.reference=live"]),
    ]


_LENGTHS = ("template=llama2", "inputs_length=96", "new_tokens=24")
_LONG_ROWS = ("data.inputs_length=512", "train.batch_size=8")  # of as many tokens, in which more pairs find room


def _training(name: str, config: str, workdir: Path, steps: int, learning_rate: float, more: list[str]) -> Stage:
    overrides = _overrides(
        *more,
        "data.template=llama2",
        f"train.steps={steps}",
        f"optimizer.decay_steps={steps}",
        f"optimizer.learning_rate={learning_rate:g}",
        f"train.save_every={steps}",
        "train.eval_every=40",
    )
    arguments = [f"--config={CONFIGS / config}.py", f"--workdir={workdir}", *overrides]
    return Stage(name, "gqa.train", arguments, workdir / "finished.json")


def _overrides(*values: str) -> Iterator[str]:
    return (f"--config.{value}" for value in values)


def run(stage: Stage, workdir: Path) -> None:
    """Runs a stage's command, shown as it is typed, unless it is finished; its time goes to `SECONDS`."""
    shown = f"python -m {stage.module} {' '.join(stage.arguments)}"
    if stage.product.exists():
        print(f"finished before: {shown}", flush=True)
        return
    print(f"\n{stage.name}: {shown}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", stage.module, *stage.arguments], check=False).returncode
    if code:
        raise InputError(f"{stage.name} ended with exit code {code}; started again, the chain goes on from there")
    path = workdir / SECONDS
    seconds = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(seconds | {stage.name: round(time.monotonic() - start, 1)}, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/posttraining"), help="folder of all stages")
    parser.add_argument("--results", type=Path, help="folder of the report (default: WORKDIR/report)")
    arguments = command_line.parse_arguments(parser)
    if not BASE.is_dir():
        raise InputError(f"{BASE} is missing; run from the root of the repository")
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    chain = stages(arguments.workdir)
    for stage in chain:
        run(stage, arguments.workdir)

    from experiments import posttraining_report
    from experiments.measure import commit, machine

    results = arguments.results or arguments.workdir / "report"
    start = time.monotonic()
    report = posttraining_report.evaluate(arguments.workdir)
    report |= posttraining_report.curves(arguments.workdir) | {
        "seconds": json.loads((arguments.workdir / SECONDS).read_text())
        | {"evaluation": round(time.monotonic() - start, 1)},
        "commands": [f"python -m {stage.module} {' '.join(stage.arguments)}" for stage in chain],
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.posttraining", *sys.argv[1:]]),
    }
    posttraining_report.write(report, results)
    print(f"\n{posttraining_report.as_markdown(report)}\nWritten to {results}: report.md, report.json, curves.png")


if __name__ == "__main__":
    command_line.run(main)
