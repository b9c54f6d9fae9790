"""python -m experiments.large_conversion --size=llama_2_7b --kv_heads=8 [--layers=32] [--output=FILE.json]

What a calibrated conversion of a large model takes: random weights of the model's shapes, made one layer at a time,
8 rows of 512 tokens, `svd+refit` by default. Prints seconds a layer and the peak of memory; with fewer `--layers` than
the model has, each further one is taken to last as long as those between the first and the last of its side, and the
whole is said to be extrapolated: the first waits for compilation, and no activations pass the last.
"""

import argparse
import dataclasses
import math
import resource
import statistics
import sys
import time
from pathlib import Path

from gqa import command_line
from gqa.errors import InputError

ROWS, LENGTH = 8, 512


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", required=True, help="a ready-made architecture, such as llama_2_7b, t5_1_1_xxl")
    parser.add_argument("--kv_heads", required=True, type=int, help="key/value heads of each converted attention")
    parser.add_argument("--method", default="svd+refit", help="how heads become one (default: svd+refit)")
    parser.add_argument("--layers", type=int, help="layers of each side that are converted (default: all)")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    arguments = command_line.parse_arguments(parser)
    from gqa.training.memory import keep_freed_memory

    keep_freed_memory()  # as checkpoints_tools.convert does
    import jax
    import numpy as np

    from checkpoints_tools.calibration import BATCH
    from experiments.measure import commit, machine, write_json
    from gqa import convert, models
    from gqa.checkpoints.table import parameters
    from gqa.convert import walk
    from gqa.convert.statistics import collect

    whole = models.replace(models.size(arguments.size), dtype="float32", tied_logits=True)
    family = models.family_of(whole)
    names = ("num_encoder_layers", "num_decoder_layers") if family == "t5" else ("num_layers",)
    layers = arguments.layers
    if layers is None:
        layers = max(getattr(whole, name) for name in names)
    if not 1 <= layers <= min(getattr(whole, name) for name in names):
        raise InputError(f"--layers={layers}; expected 1 to {min(getattr(whole, name) for name in names)}")
    config = dataclasses.replace(whole, **dict.fromkeys(names, layers))
    sites = models.FAMILIES[family].converted_sites

    def read(path: str) -> np.ndarray:
        shape = shapes[path]
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        # Uniform over the bytes, as quick to make as 16-bit weights are to read.
        values = np.random.default_rng([*path.encode()]).bytes(math.prod(shape))
        values = np.frombuffer(values, np.int8).astype(np.float32).reshape(shape)
        values *= np.float32((12 / config.d_model) ** 0.5 / 256)  # of the variance 1 / d_model
        return values

    shapes = {path: each.layer_shape for each in parameters(models.abstract(config)) for path in each.paths}
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config.vocab_size, (2, ROWS, LENGTH), np.int32)
    real = np.ones((ROWS, LENGTH), np.int32)
    rows = {"inputs": tokens[0], "inputs_segments": real, "decoder_inputs": tokens[1], "targets_segments": real}
    batches = [{name: array[first : first + BATCH] for name, array in rows.items()} for first in range(0, ROWS, BATCH)]
    start = time.perf_counter()
    begun: dict[str, dict[str, float]] = {"calibration": {}, "conversion": {}}  # when, by layer, such as decoder.2

    def load_layer(side: str, number: int):
        jax.block_until_ready(jax.live_arrays())  # the layer before is not waited for otherwise
        begun["calibration"][f"{side}.{number}"] = time.perf_counter()
        return load(side, number)

    shell, load = walk.read_lazily(config, read)
    moments = collect(shell, load_layer, batches, sites)
    calibrated = time.perf_counter()
    kv_heads = dict.fromkeys(sites, arguments.kv_heads)
    new_config, read_new, report = convert.convert_lazily(
        config, read, kv_heads, arguments.method, jax.random.key(0), batches=batches, statistics=moments
    )
    paths = sorted(
        (path for each in parameters(models.abstract(new_config)) for path in each.paths if path.count(".") > 2),
        key=lambda path: (path.split(".")[0] == "decoder", int(path.split(".")[1])),
    )
    for path in paths:
        begun["conversion"].setdefault(".".join(path.split(".")[:2]), time.perf_counter())
        read_new(path)
    end = time.perf_counter()
    further = {"calibration": further_layer(begun["calibration"], calibrated)}
    further["conversion"] = further_layer(begun["conversion"], end)
    missing = {side: walk.num_layers(whole, side) - layers for side in walk.sides(whole)}
    whole_seconds = end - start
    for seconds in further.values():
        whole_seconds += sum(seconds[side] * missing[side] for side in seconds)
    share = layers / max(getattr(whole, name) for name in names)
    # Of layers that were not measured the statistics would stay in memory; all else is of one layer or there once.
    each = moments.nbytes / (layers * len(sites) + ("cross" in sites))
    missing_bytes = each * layers * len(sites) * (1 / share - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {
        "size": arguments.size,
        "kv_heads": arguments.kv_heads,
        "method": arguments.method,
        "layers_measured": layers,
        "calibration_seconds": calibrated - start,
        "conversion_seconds": end - calibrated,
        "whole_model_minutes": whole_seconds / 60,
        "extrapolated": share < 1,
        "seconds_a_further_layer": further,
        "peak_gib": peak,
        "peak_gib_of_the_whole": peak + missing_bytes / 2**30,
        "statistics_gib_of_the_whole": (moments.nbytes + missing_bytes) / 2**30,
        "output_error": [entry["output_error"] for entry in report],
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.large_conversion", *sys.argv[1:]]),
    }
    for name in list(result)[:12]:
        value = result[name]
        print(f"{name:30} {value:.2f}" if isinstance(value, float) else f"{name:30} {value}")
    if arguments.output:
        write_json(arguments.output, result)


def further_layer(begun: dict[str, float], end: float) -> dict[str, float]:
    """Mean seconds of a side's layers between its first and last, by side, of when each layer began, in order."""
    times = [*begun.values(), end]
    seconds: dict[str, list[float]] = {}
    for number, layer in enumerate(begun):
        seconds.setdefault(layer.split(".")[0], []).append(times[number + 1] - times[number])
    return {side: statistics.mean(each[1:-1] or each[1:] or each) for side, each in seconds.items()}


if __name__ == "__main__":
    command_line.run(main)
