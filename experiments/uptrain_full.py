"""python -m experiments.uptrain_full [--workdir=runs/uptrain_full] [--seeds=3] [--alpha=0.05]

GQA's headline in miniature: the shipped teacher's GQA-2 and MQA (mean pooled) uptrained for α = 5 % of its
pre-training, three seeds each, and the unconverted teacher uptrained equally as a control. Every run resumes; finished
ones are kept. Results go to experiments/results/uptrain_full/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gqa import command_line
from gqa.errors import InputError

CONFIG = Path("configs/uptrain_t5_teacher.py")
TEACHER = Path("assets/teacher")
RESULTS = Path(__file__).parent / "results" / "uptrain_full"
KV_HEADS = {"MHA": None, "GQA-2": 2, "MQA": 1}  # MHA is the teacher itself: the control


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/uptrain_full"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default: 3)")
    parser.add_argument("--alpha", type=float, default=0.05, help="share of the pre-training steps (default: 0.05)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for results.json and results.md")
    arguments = command_line.parse_arguments(parser)
    if arguments.seeds < 1:
        raise InputError(f"--seeds={arguments.seeds}; expected at least 1")
    if not 0 < arguments.alpha <= 1:
        raise InputError(f"--alpha={arguments.alpha}; expected a share of the pre-training above 0, up to 1")
    if not TEACHER.is_dir():
        raise InputError(f"{TEACHER} is missing; run from the root of the repository")

    converted = {name: convert(name, kv_heads, arguments.workdir) for name, kv_heads in KV_HEADS.items()}
    losses = {
        name: {"converted": evaluate(path, arguments.workdir / f"{name}.json")} for name, path in converted.items()
    }
    runs = [(name, seed) for seed in range(1, arguments.seeds + 1) for name in KV_HEADS]
    for name, seed in tqdm(runs, desc="runs", unit="run"):
        workdir = arguments.workdir / f"{name}-a{arguments.alpha:g}-seed{seed}"
        if not (workdir / "finished.json").exists():
            run(
                "gqa.train",
                f"--config={CONFIG}",
                f"--workdir={workdir}",
                f"--config.model.checkpoint={converted[name]}",
                f"--config.train.seed={seed}",
                f"--config.uptrain.alpha={arguments.alpha}",
                "--config.train.eval_every=100000",
            )
        losses[name][seed] = evaluate(workdir / "model", workdir / "evaluation.json")
    results = summarise(losses, arguments.alpha, arguments.seeds)

    from experiments.measure import commit, machine, write_json

    results |= {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.uptrain_full", *sys.argv[1:]]),
    }
    write_json(arguments.results / "results.json", results)
    (arguments.results / "results.md").write_text("\n".join(results["table"]) + "\n")
    print("\n".join(results["table"]))


def convert(name: str, kv_heads: int | None, workdir: Path) -> Path:
    """The mean-pooled checkpoint, made if it is not there; the teacher itself for `None`."""
    if kv_heads is None:
        return TEACHER
    output = workdir / name
    if not output.exists():
        arguments = (f"--output={output}", f"--kv_heads={kv_heads}", "--method=mean", "--dtype=float32")
        run("checkpoints_tools.convert", f"--source={TEACHER}", *arguments)
    return output


def evaluate(checkpoint: Path, output: Path) -> dict:
    """Scores over the whole held-out split."""
    if not output.exists():
        run(
            "gqa.evaluate",
            f"--config={CONFIG}",
            f"--config.model.checkpoint={checkpoint}",
            f"--checkpoint={checkpoint}",
            f"--output={output}",
            "--config.train.eval_examples=1000000",
        )
    return json.loads(output.read_text())


def run(module: str, *arguments: str) -> None:
    """Runs a command of the project, shown as it is typed; raises `InputError` at a failure."""
    tqdm.write(f"python -m {module} {' '.join(arguments)}")
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        raise InputError(f"{module} ended with exit code {code}; started again, the runs go on from there")


def summarise(losses: dict[str, dict], alpha: float, num_seeds: int) -> dict:
    """Mean and spread over seeds, and the share of the converted gap that uptraining closes against the control."""
    teacher = losses["MHA"]["converted"]["loss"]
    rows, table = [], ["| model | α | held-out loss, nats | to the teacher | gap closed |", "|---|---|---|---|---|"]
    control = np.mean([losses["MHA"][seed]["loss"] for seed in range(1, num_seeds + 1)])
    for name, scores in losses.items():
        before = scores["converted"]["loss"]
        after = np.array([scores[seed]["loss"] for seed in range(1, num_seeds + 1)])
        closed = None if name == "MHA" else float((before - after.mean()) / (before - teacher))
        # Against the teacher uptrained equally: what is left of the gap when both have had the same training.
        closed_control = None if name == "MHA" else float(1 - (after.mean() - control) / (before - teacher))
        spread = float(after.std(ddof=1)) if num_seeds > 1 else 0.0
        rows.append({"model": name, "uptrained": False, "loss_mean": before, "loss_spread": 0.0})
        rows.append(
            {
                "model": name,
                "uptrained": True,
                "loss_mean": float(after.mean()),
                "loss_spread": spread,
                "losses": after.tolist(),
                "gap_closed": closed,
                "gap_closed_against_control": closed_control,
            }
        )
        table.append(f"| {name} | 0 | {before:.4f} | {before - teacher:+.4f} | |")
        gap = "control" if closed is None else f"{closed:.0%} ({closed_control:.0%} against the control)"
        table.append(
            f"| {name} | {alpha:.0%} | {after.mean():.4f} ± {spread:.4f} | {after.mean() - teacher:+.4f} | {gap} |"
        )
    tokens = losses["MHA"]["converted"]["target_tokens"]
    return {
        "alpha": alpha,
        "num_seeds": num_seeds,
        "teacher_loss": teacher,
        "unigram_loss": losses["MHA"]["converted"]["unigram_loss"],
        "heldout_target_tokens": tokens,
        "corpus_digests": losses["MHA"]["converted"]["corpus"],
        "rows": rows,
        "table": table,
    }


if __name__ == "__main__":
    command_line.run(main)
