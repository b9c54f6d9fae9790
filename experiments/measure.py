"""What the experiments measure of a checkpoint, and on what machine."""

import os
import platform
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gqa import files, models
from gqa.decode import generate


def machine() -> dict[str, str | int]:
    """The machine and versions that a result comes from."""
    return {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def cpu() -> str:
    """The processor's name."""
    if not Path("/proc/cpuinfo").exists():
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit of the working tree, with `+` where it has changes; `unknown` outside a checkout."""
    try:
        root = Path(__file__).parent
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def write_json(path: Path, content: dict) -> None:
    """Writes a result as one complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, shared=True)


def decode_times(
    checkpoints: dict[str, models.Model], *, batch_size: int, inputs_length: int, num_tokens: int, repetitions: int
) -> dict[str, dict[str, float]]:
    """Milliseconds a decoding step of each encoder-decoder, measured in turns: median, fastest and slowest repetition.

    A step makes one token for each of `batch_size` rows of `inputs_length` random input tokens; exactly `num_tokens`
    steps are timed, the encoder and the compilation are not.
    """
    tokens = np.random.default_rng(0).integers(3, 1000, (batch_size, inputs_length), dtype=np.int32)
    ready = {name: model.unstacked() for name, model in checkpoints.items()}
    encoded = {name: generate.prefill(model, jnp.asarray(tokens), None, num_tokens) for name, model in ready.items()}
    seconds = {name: [] for name in ready}
    for repetition in range(repetitions + 1):  # the first compiles
        for name, model in ready.items():
            prefilled = jax.block_until_ready(jax.tree.map(jnp.copy, encoded[name]))  # decoding uses it up
            start = time.perf_counter()
            jax.block_until_ready(generate.decode(model, prefilled, num_tokens, eos_ids=()))
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_ms": 1e3 * float(np.median(times)) / num_tokens,
            "min_ms": 1e3 * min(times) / num_tokens,
            "max_ms": 1e3 * max(times) / num_tokens,
        }
        for name, times in seconds.items()
    }
