"""python -m experiments.convert_speed [--size_gb=4] [--repeats=2] [--folder=DIR] [--output=FILE]

Speed and memory of `checkpoints_tools.convert` against `cp` followed by `sync` on the same bytes. It makes a random
Llama (float32 safetensors) of `--size_gb` in a temporary folder, then in turns copies it and converts it (mean pooling
to a quarter of the key/value heads, bfloat16 out), each in a process of its own, its start included. Rates count the
source's bytes. Nothing is dropped from the page cache: the source was just written, and both read it as they find it.
The folder needs two and a half times the size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gqa import command_line
from gqa.errors import InputError

GOAL_RATIO = 0.6  # of the copy's rate
GOAL_BYTES = 1_500_000_000  # of peak memory, beside twice the largest tensor

# A process of few bytes that runs a command and prints its peak memory: a child starts with the peak of its parent.
RUN_MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak if sys.platform == "darwin" else 1024 * peak)
sys.exit(code)
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_gb", type=float, default=4.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the temporary files go (default: the system's place)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = command_line.parse_arguments(parser)
    if not 0 < arguments.size_gb < 1e6:
        raise InputError(f"--size_gb={arguments.size_gb}; expected a positive number of gigabytes")
    if arguments.repeats < 1:
        raise InputError(f"--repeats={arguments.repeats}; expected at least 1")
    if arguments.folder is not None and not arguments.folder.is_dir():
        raise InputError(f"--folder={arguments.folder} is no directory; expected one with room")

    from experiments.measure import commit, machine, write_json

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = make_checkpoint(Path(folder) / "source", arguments.size_gb)
        runs = measure(Path(folder), arguments.repeats)
    result = summary(sizes, runs) | {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.convert_speed", *sys.argv[1:]]),
    }
    print("\n".join(result["table"]))
    if arguments.output is not None:
        write_json(arguments.output, result)


def make_checkpoint(directory: Path, size_gb: float) -> dict[str, int]:
    """Writes a random Llama, one tensor in memory at a time; bytes of its weights and of its largest tensor."""
    import numpy as np

    from gqa import models
    from gqa.checkpoints import hf
    from gqa.checkpoints.table import parameters

    config = architecture(size_gb)
    shapes = {
        path: parameter.layer_shape for parameter in parameters(models.abstract(config)) for path in parameter.paths
    }
    rng = np.random.default_rng(0)

    def make(path: str) -> np.ndarray:
        return rng.standard_normal(shapes[path], np.float32) * np.float32(0.02)

    hf.write(config, make, directory, "float32", None, lambda sums: {}, identity=None)
    files = directory.glob("*.safetensors")
    return {
        "source_bytes": sum(file.stat().st_size for file in files),
        "largest_tensor_bytes": max(4 * int(np.prod(shape)) for shape in shapes.values()),
    }


def architecture(size_gb: float):
    """A Llama of about `size_gb` in float32: TinyLlama's widths, multi-head; under 1 GB those of a toy."""
    from gqa import models

    widths = dict(d_model=2048, num_heads=32, head_dim=64, d_ff=5632, vocab_size=32000)
    if size_gb < 1:
        widths = dict(d_model=64, num_heads=8, head_dim=8, d_ff=176, vocab_size=256)
    config = models.replace(
        models.size("llama_2_7b"), **widths, num_layers=1, decoder_self_kv_heads=widths["num_heads"]
    )
    one, two = (4 * models.num_parameters(models.abstract(models.replace(config, num_layers=n))) for n in (1, 2))
    return models.replace(config, num_layers=max(1, 1 + round((size_gb * 1e9 - one) / (two - one))))


def measure(folder: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and peak bytes of copying and of converting `folder/source`, in turns."""
    from tqdm import tqdm

    source, output = folder / "source", folder / "output"
    heads = json.loads((source / "config.json").read_text())["num_key_value_heads"]
    convert = [sys.executable, "-m", "checkpoints_tools.convert", f"--source={source}", f"--output={output}"]
    convert += [f"--kv_heads={heads // 4}", "--method=mean", "--dtype=bfloat16"]
    commands = {"cp, sync": ["cp", "-r", source, output], "convert, sync": convert}
    runs = {name: {"seconds": [], "peak_bytes": []} for name in commands}
    for _ in tqdm(range(repeats), desc="repeats", unit="repeat"):
        for name, command in commands.items():
            subprocess.run(["sync"], check=True)  # what earlier writes left is none of this run's
            start = time.perf_counter()
            peak_bytes = run_measured(command)
            subprocess.run(["sync"], check=True)
            runs[name]["seconds"].append(time.perf_counter() - start)
            runs[name]["peak_bytes"].append(peak_bytes)
            subprocess.run(["rm", "-r", output], check=True)
    return runs


def run_measured(command: Sequence) -> int:
    """Peak resident bytes of a command, run in this repository; `RuntimeError` with its last words where it fails."""
    words = [sys.executable, "-c", RUN_MEASURED, *map(str, command)]
    process = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {process.stderr[-2000:]}")
    return int(process.stdout.splitlines()[-1])


def summary(sizes: Mapping[str, int], runs: Mapping[str, Mapping[str, Sequence[float]]]) -> dict:
    """Medians, the ratio of the rates, what memory is allowed, and a Markdown table."""
    nbytes = sizes["source_bytes"]
    seconds = {name: statistics.median(run["seconds"]) for name, run in runs.items()}
    ratio = seconds["cp, sync"] / seconds["convert, sync"]
    peak_bytes = max(runs["convert, sync"]["peak_bytes"])
    allowed_bytes = GOAL_BYTES + 2 * sizes["largest_tensor_bytes"]
    lines = ["| | seconds | MB/s | to cp |", "|---|--:|--:|--:|"]
    for name, median in seconds.items():
        lines.append(f"| {name} | {median:.1f} | {nbytes / median / 1e6:.0f} | {seconds['cp, sync'] / median:.2f} |")
    lines += [
        "",
        f"{nbytes / 1e9:.2f} GB; rate of the copy's: {ratio:.2f} (goal: {GOAL_RATIO:g}); "
        f"peak memory: {peak_bytes / 1e9:.2f} GB (goal: {allowed_bytes / 1e9:.2f})",
    ]
    return {
        **sizes,
        "runs": runs,
        "median_seconds": seconds,
        "rate_ratio": ratio,
        "peak_bytes": peak_bytes,
        "allowed_bytes": allowed_bytes,
        "goals_met": {"rate": ratio >= GOAL_RATIO, "memory": peak_bytes <= allowed_bytes},
        "table": lines,
    }


if __name__ == "__main__":
    command_line.run(main)
