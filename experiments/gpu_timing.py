"""python -m experiments.gpu_timing [--output=DIR] [--seconds=500] [--tiny]

Every measurement of decoding on one GPU, the important ones first, within a time: T5-XXL and Llama-2-7B shapes in
bfloat16 with as many key/value heads as query heads, 8 and 1 (GQA §3.1), the rest of fig. 6, and the split-K kernel.
It starts no row that may not end in time, and says which are left out. Runs the configurations of configs/timing, of
which it replaces as little as the time asks for, on JAX, Flax and matplotlib alone.
"""

import argparse
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

from gqa import command_line
from gqa.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs" / "timing"

# Folder of the results -> configuration and what is replaced in it. `kv_heads` are measured in this order.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_xxl": ("t5_xxl", dict(kv_heads=(1, 8, 64), num_drafted=0)),
    "llama_2_7b": ("llama_2_7b", dict(kv_heads=(8, 32, 1), num_drafted=0, num_prompts=0)),
    "t5_xxl_split_k": ("t5_xxl", dict(kv_heads=(8, 1), num_drafted=0, split_k=True)),
    "t5_xxl_rest": ("t5_xxl", dict(kv_heads=(16, 32, 4), num_drafted=0)),
    "llama_2_7b_serving": ("llama_2_7b", dict(kv_heads=(8,), num_prompts=64)),
}
# The first row of each on shapes that a CPU does in seconds.
TINY = dict(dtype="float32", max_batch_size=2, inputs_length=16, new_tokens=4, repetitions=1)
TINY_SIZES = {"t5_1_1_xxl": "t5_1_1_mini", "llama_2_7b": "llama_mini"}


class Config(dict):
    """Stands for ml_collections.ConfigDict, so that its package is not needed."""

    __getattr__ = dict.__getitem__

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON takes them."""
        return dict(self)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results, one a part; must not exist")
    parser.add_argument("--seconds", type=float, default=500, help="time for all of it (default: 500)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see whether it works")
    arguments = command_line.parse_arguments(parser)
    if arguments.output.exists():
        raise InputError(f"--output={arguments.output} exists already; name a new folder")
    from experiments import bandwidth, timing

    if arguments.tiny:
        bandwidth.COPY_BYTES = 2**20
    clock = Clock(arguments.seconds)
    command = " ".join(["python -m experiments.gpu_timing", *sys.argv[1:]])
    for part in PARTS:
        config = configuration(part, arguments.tiny)
        results = timing.measure(config, command, arguments.output / part, clock.may_start)
        left_out = config.kv_heads[len(results["rows"]) :]
        if left_out:
            print(f"{part}: no time for {', '.join(map(str, left_out))} key/value heads", flush=True)


class Clock:
    """Whether a further row as long as the longest so far ends in time; asked before every row."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.last, self.longest = None, 0.0

    def may_start(self) -> bool:
        """Whether there is time for a row."""
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last = now
        return now + self.longest <= self.end


def configuration(part: str, tiny: bool) -> Config:
    """The measurement of a part; `tiny` shrinks its shapes."""
    name, changes = PARTS[part]
    stand_in = types.ModuleType("ml_collections")
    stand_in.ConfigDict = Config
    with mock.patch.dict(sys.modules, ml_collections=stand_in):
        config = Config(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())
    config |= dict(repetitions=2) | changes
    if tiny:
        config |= TINY | dict(
            size=TINY_SIZES[config.size], kv_heads=(min(config.kv_heads[0], 4),), num_prompts=min(config.num_prompts, 3)
        )
    return Config(config)


if __name__ == "__main__":
    command_line.run(main)
