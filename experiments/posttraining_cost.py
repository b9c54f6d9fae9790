"""python -m experiments.posttraining_cost --data=runs/posttraining/data [--repeats=20] [--output=FILE.json]

What a step of post-training takes beside a step of supervised fine-tuning of all parameters: time, measured in turns,
and memory, as the compiler counts it. The configs are those of configs/posttraining, on the shipped Llama-like model:
SFT, the same with adapters (LoRA, on all linear maps, on attention alone, beside a base in NF4), and DPO with
its reference cached and live, on as many rows. --data has the files of `experiments.posttraining_data`, of which the
first lines are used.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa import command_line
from gqa.errors import InputError
from gqa.training.memory import keep_freed_memory

CONFIGS = Path("configs/posttraining")
BASE = "assets/teacher_llama"
LINES = 400  # of a file of the data
ATTENTION = "('self_attention.*',)"
RUNS = {  # name -> config, file of the data, further overrides
    "SFT": ("sft", "chats", []),
    "LoRA, rank 8": ("sft_lora", "chats", []),
    "LoRA, rank 8, attention only": ("sft_lora", "chats", [f"adapter.kernels={ATTENTION}"]),
    "QLoRA, rank 8, NF4": ("sft_qlora", "chats", []),
    "DPO, reference cached": ("dpo", "preferences", []),
    "DPO, reference live": ("dpo", "preferences", ["dpo.reference=live"]),
}


class Step(NamedTuple):
    """A compiled step."""

    call: Callable[[], float]  # runs it once to its end, returns the loss
    bytes: Mapping[str, int]  # of its memory, by part


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/posttraining/data"), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = command_line.parse_arguments(parser)
    if arguments.repeats < 1:
        raise InputError(f"--repeats={arguments.repeats}; expected at least 1")
    for name in ("chats", "preferences"):
        if not (arguments.data / f"{name}.jsonl").is_file():
            raise InputError(
                f"{arguments.data} has no {name}.jsonl; make it with python -m experiments.posttraining_data "
                f"--output={arguments.data}"
            )
    keep_freed_memory()
    from experiments.measure import commit, machine, write_json

    with tempfile.TemporaryDirectory() as folder:
        steps = {name: prepare(*run, arguments.data, Path(folder)) for name, run in RUNS.items()}
        seconds = times_in_turns({name: step.call for name, step in steps.items()}, arguments.repeats)
    result = {
        "command": " ".join(["python -m experiments.posttraining_cost", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit(),
        "rows": {
            name: {"milliseconds": {"median": 1e3 * float(np.median(times)), "min": 1e3 * min(times)}}
            | {"bytes": dict(steps[name].bytes)}
            for name, times in seconds.items()
        },
    }
    print(table(result["rows"]))
    if arguments.output is not None:
        write_json(arguments.output, result)


def prepare(config_name: str, file: str, overrides: list[str], data: Path, folder: Path) -> Step:
    """The step that `gqa.train` runs for a config, compiled, with its first batch."""
    import jax

    from gqa import checkpoints, models, sharding
    from gqa.data import loader
    from gqa.data.prepare import prepare as prepare_records
    from gqa.training import config as run_config
    from gqa.training import optimizer as optimizers
    from gqa.training.loop import language_model_loss
    from gqa.training.recipe import make_recipe
    from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch

    source, records = folder / f"{file}.jsonl", folder / file
    if not source.exists():
        lines = (data / f"{file}.jsonl").read_text().splitlines(keepends=True)
        source.write_text("".join(lines[:LINES]))
    given = [f"data.source={source}", f"model.checkpoint={BASE}", "data.template=llama2", *overrides]
    raw = command_line.load_config(CONFIGS / f"{config_name}.py", [f"--config.{each}" for each in given])
    config = run_config.parse(raw)
    if not records.exists():
        prepare_records(config.data, records)
    architecture, mesh = config.model.architecture(), sharding.make_mesh(config.mesh)
    weights = None if config.adapter is None else config.adapter.base
    model = checkpoints.load(BASE, mesh=mesh, weights=weights, **config.model.run_choices())
    recipe = make_recipe(config, models.abstract(architecture), model, records, mesh)
    optimizer = optimizers.optimizer(config.optimizer, 0, sharding.logical_axes(recipe.trained))
    loss_fn = recipe.loss_fn or language_model_loss(0.0, dropout=False)
    train_step = make_train_step(
        lambda trained, batch, key, step, *frozen: loss_fn(recipe.whole(trained, key, *frozen), batch, key, step),
        optimizer,
        optimizers.schedule(config.optimizer),
        accumulation=1,
        seed=0,
    )
    with jax.set_mesh(mesh):
        like = abstract_state(recipe.trained, optimizer, mesh)
        state = initial_state(recipe.initial(), optimizer, like)
        host = loader.train_batches(records, config.train.batch_size, seed=0)(0)
        batch = place_batch(mesh, host)
        if recipe.added is not None:
            batch = recipe.added("train", host, batch)
        compiled = jit_train_step(train_step, like).lower(state, batch, *recipe.frozen).compile()
    memory = compiled.memory_analysis()
    reference = jax.tree.leaves(model) if config.dpo is not None and config.dpo.reference == "live" else []
    parts = {
        "state and batch": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "beside the step": sum(leaf.nbytes for leaf in reference),
    }

    def call() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(compiled(state, batch, *recipe.frozen))
        return float(metrics["loss"])

    return Step(call, parts | {"total": sum(parts.values())})


def times_in_turns(calls: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns, so that a slow spell of the machine hits all."""
    from tqdm import tqdm

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in tqdm(range(repeats), desc="repeats", unit="repeat"):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: every row beside the first one."""
    first = next(iter(rows.values()))
    lines = ["| step | ms | of SFT's | memory, MB | of SFT's |", "|---|--:|--:|--:|--:|"]
    for name, row in rows.items():
        time_ratio = row["milliseconds"]["median"] / first["milliseconds"]["median"]
        memory, memory_ratio = row["bytes"]["total"] / 1e6, row["bytes"]["total"] / first["bytes"]["total"]
        lines.append(
            f"| {name} | {row['milliseconds']['median']:.0f} | {time_ratio:.2f} | {memory:.0f} | {memory_ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
