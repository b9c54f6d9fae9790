"""python -m experiments.compile_time [--layers=4,8,24] [--repeats=3] [--output=FILE]

Time to compile a T5's training step (forward, backward, Adafactor) by number of layers, scanned and unrolled: scanned,
neither the program nor its compilation grows with depth. The model has as many decoder as encoder layers and the width
of `--config`, which `--config.model.changes.d_model=64` changes; nothing is trained, no parameter is allocated.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gqa import command_line
from gqa.errors import InputError

FORMS = {"scanned": True, "unrolled": False}  # name -> scan_layers


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/teacher_t5.py", help="run to compile (default: %(default)s)")
    parser.add_argument("--layers", default="4,8,24", help="numbers of layers a side (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="compilations of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments, raw_config = command_line.parse(parser)
    try:
        layers = [int(number) for number in arguments.layers.split(",")]
    except ValueError:
        layers = [0]
    if min(layers) < 1:
        raise InputError(f"--layers={arguments.layers}; expected numbers of at least 1, such as 4,8,24")
    if arguments.repeats < 1:
        raise InputError(f"--repeats={arguments.repeats}; expected at least 1")

    from experiments.measure import commit, machine, write_json
    from gqa.models import family_of
    from gqa.training.config import parse

    config = parse(raw_config)
    if family_of(config.model.architecture()) != "t5":
        raise InputError(f"{arguments.config} is no T5; nearest: configs/teacher_t5.py")
    rows = measure(config, layers, arguments.repeats)
    result = {"rows": rows, "table": table(rows), "repeats": arguments.repeats}
    result |= {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.compile_time", *sys.argv[1:]]),
    }
    print("\n".join(result["table"]))
    if arguments.output is not None:
        write_json(arguments.output, result)


def measure(config, layers: Sequence[int], repeats: int) -> list[dict]:
    """For each form and depth: lines of the program, median seconds to trace it and to compile it."""
    import jax
    from tqdm import tqdm

    cases = [(form, number) for form in FORMS for number in layers]
    rows = []
    lowered_step(config, 1, scan_layers=False).compile()  # the first compilation also loads the compiler
    with tqdm(total=len(cases) * repeats, desc="compile", unit="program") as bar:
        for form, number in cases:
            tracing, compilation = [], []
            for _ in range(repeats):
                jax.clear_caches()
                start = time.perf_counter()
                lowered = lowered_step(config, number, scan_layers=FORMS[form])
                tracing.append(time.perf_counter() - start)
                start = time.perf_counter()
                lowered.compile()
                compilation.append(time.perf_counter() - start)
                bar.update()
            rows.append(
                {
                    "form": form,
                    "layers": number,
                    "program_lines": len(lowered.as_text().splitlines()),
                    "trace_s": float(np.median(tracing)),
                    "compile_s": float(np.median(compilation)),
                }
            )
    return rows


def lowered_step(config, layers: int, *, scan_layers: bool):
    """The traced training step of a model with `layers` encoder and `layers` decoder layers, ready to `compile()`."""
    import jax

    from gqa import models, sharding
    from gqa.training import optimizer as optimizers
    from gqa.training.loop import language_model_loss
    from gqa.training.state import abstract_state, jit_train_step, make_train_step

    architecture = dataclasses.replace(
        config.model.architecture(), num_encoder_layers=layers, num_decoder_layers=layers, scan_layers=scan_layers
    )
    mesh = sharding.make_mesh(config.mesh)
    model = models.abstract(architecture)
    optimizer = optimizers.optimizer(config.optimizer, 0, sharding.logical_axes(model))
    like = abstract_state(model, optimizer, mesh)
    train_step = make_train_step(
        language_model_loss(config.train.z_loss, dropout=False),
        optimizer,
        optimizers.schedule(config.optimizer),
        accumulation=1,
        seed=0,
    )
    # The batch's shape changes no instruction; only its number of dimensions counts.
    shape = (config.train.batch_size, config.data.inputs_length)
    dtypes = dict.fromkeys(("inputs", "inputs_segments", "targets", "decoder_inputs", "targets_segments"), "int32")
    placement = sharding.batch_sharding(mesh, shape)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
        for name, dtype in (dtypes | {"loss_weights": "float32"}).items()
    }
    with jax.set_mesh(mesh):
        return jit_train_step(train_step, like).lower(like, batch)


def table(rows: Sequence[dict]) -> list[str]:
    """A Markdown table of `measure`'s rows."""
    lines = ["| layers a side | form | lines of the program | tracing, s | compilation, s |", "|--:|---|--:|--:|--:|"]
    for row in rows:
        seconds = f"{row['trace_s']:.1f} | {row['compile_s']:.1f}"
        lines.append(f"| {row['layers']} | {row['form']} | {row['program_lines']} | {seconds} |")
    return lines


if __name__ == "__main__":
    command_line.run(main)
