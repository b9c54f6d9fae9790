"""python -m experiments.timing --config=configs/timing/t5_xxl.py [--output=DIR] [--config.kv_heads=1,8 …]

Time per sample against the number of key/value heads (GQA §3.1, fig. 6), on random weights of a model's shapes: the
largest batch that fits, a warm-up, the median and spread of repetitions; apart, what a decoding step takes, the bytes
that it has to read by arithmetic (weights, self- and cross-attention cache, as allocated) and the share that this is of
the bandwidth which a large copy reaches in the same run. A table, timing.json and timing.png.

Each pair of config.weights (None, int8, int4) and config.cache (None, int8) is measured with every number of heads.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gqa import command_line
from gqa.errors import InputError

COPY_BYTES = 2**30  # of the array whose copy measures the bandwidth; large against any cache


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config_argument(parser)
    parser.add_argument("--output", type=Path, help="folder for timing.json and timing.png; must not exist")
    arguments, config = command_line.parse(parser)
    for name in ("max_batch_size", "inputs_length", "new_tokens", "repetitions"):
        if config[name] < 1:
            raise InputError(f"config.{name}={config[name]}; expected at least 1")
    if config.new_tokens < 2:
        raise InputError("config.new_tokens=1; expected at least 2, so that steps can be told from reading the input")
    if arguments.output and arguments.output.exists():
        raise InputError(f"--output={arguments.output} exists already; name a new folder")
    from gqa.training.memory import keep_freed_memory

    keep_freed_memory()
    from experiments.measure import commit, machine, write_json
    from gqa import models
    from gqa.models.quantize import check_weights
    from gqa.nn.cache import check_cache_dtype

    if len(config.weights) != len(config.cache) or not config.weights:
        raise InputError(f"config.weights={config.weights} and config.cache={config.cache}; expected as many of each")
    formats = list(zip(config.weights, config.cache, strict=True))
    for weights, cache in formats:
        check_cache_dtype(cache)
        if weights is not None:
            check_weights(weights)
    architecture = models.replace(
        models.size(config.size), **config.changes, dtype=config.dtype, param_dtype=config.dtype, remat="none"
    )
    family = models.FAMILIES[models.family_of(architecture)]
    architectures = [
        models.replace(architecture, **{f"{site}_kv_heads": K for site in family.converted_sites})
        for K in sorted(config.kv_heads)
    ]  # refuses what does not divide, before anything is allocated
    bandwidth = copy_bandwidth()
    models_by_heads = list(zip(sorted(config.kv_heads), architectures, strict=True))
    rows = [
        row(config, each, K, weights, cache, bandwidth)
        for (weights, cache), (K, each) in tqdm(list(itertools.product(formats, models_by_heads)), desc="models")
    ]
    results = {
        "command": " ".join(["python -m experiments.timing", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit(),
        "config": config.to_dict(),
        "copy_gb_per_second": bandwidth / 1e9,
        "rows": rows,
    }
    print(table(results))
    if arguments.output:
        write_json(arguments.output / "timing.json", results)
        draw(results, arguments.output / "timing.png")


def copy_bandwidth(num_bytes: int = COPY_BYTES) -> float:
    """Bytes a second that reading and writing a large array reaches, the best of several."""
    import jax
    import jax.numpy as jnp

    copy = jax.jit(lambda x: x + 1.0)
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    jax.block_until_ready(copy(x))
    return 2 * num_bytes / min(seconds(lambda: copy(x)) for _ in range(5))


def seconds(function: Callable[[], Any]) -> float:
    """Time of a call, its result ready on the device."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def step_bytes(
    architecture, batch_size: int, inputs_length: int, new_tokens: int, cache_dtype: str | None, weights: str | None
) -> dict:
    """What one decoding step reads: weights once, and all of the caches as they are allocated."""
    import jax
    import jax.numpy as jnp

    from gqa import models
    from gqa.models.quantize import quantize

    def num_bytes(*parts) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts))

    model = models.abstract(architecture)
    if weights is not None:
        model = jax.eval_shape(lambda model: quantize(model, weights), model)
    is_t5 = isinstance(model, models.t5.T5)
    read = num_bytes(model.decoder, model.embedding if architecture.tied_logits else model.logits)
    if is_t5:  # keys and values of the inputs are computed once
        read -= num_bytes(*((site.key, site.value) for site in models.site_attention(model, "cross")))
    # A key and a value of a head and position; int8 has a float32 scale each.
    entry = jnp.dtype(architecture.dtype).itemsize * architecture.head_dim
    if cache_dtype == "int8":
        entry = architecture.head_dim + 4
    per_token = {
        site: 2 * sum(architecture.kv_heads(site)) * entry * batch_size
        for site in ("decoder_self", "cross")[: 1 + is_t5]
    }
    length = new_tokens if is_t5 else inputs_length + new_tokens - 1
    return {
        "weights": read,
        "self_cache": per_token["decoder_self"] * length,
        "cross_cache": per_token["cross"] * inputs_length if is_t5 else 0,
    }


def row(
    config, architecture, num_kv_heads: int, weights: str | None, cache: str | None, bandwidth: float
) -> dict[str, Any]:
    """The measurements of one model."""
    import jax

    from gqa import models
    from gqa.models.quantize import quantize

    def make(key):
        model = models.create(architecture, key)
        return (model if weights is None else quantize(model, weights)).unstacked()

    model = jax.block_until_ready(jax.jit(make)(jax.random.key(0)))
    kind = {"kv_heads": num_kv_heads, "weights": weights, "cache": cache}
    batch_size = config.max_batch_size
    while True:
        try:
            return kind | {"batch_size": batch_size} | _times(config, model, batch_size, kind, bandwidth)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch_size == 1:
                raise
            batch_size //= 2


def _times(config, model, batch_size: int, kind: dict, bandwidth: float) -> dict[str, Any]:
    import jax

    from gqa.decode import generate

    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch_size, config.inputs_length), np.int32)
    tokens = jax.device_put(tokens)

    def read():
        return generate.prefill(model, tokens, None, config.new_tokens, cache_dtype=kind["cache"])

    def decode(state):
        return generate.decode(model, state, config.new_tokens, eos_ids=())

    compilation = [seconds(read)]
    state = jax.block_until_ready(read())
    compilation.append(seconds(lambda: decode(state)))
    reading, decoding = [], []
    for _ in range(config.repetitions):
        start = time.perf_counter()
        state = jax.block_until_ready(read())
        reading.append(time.perf_counter() - start)
        decoding.append(seconds(lambda state=state: decode(state)))
    step = float(np.median(decoding)) / config.new_tokens
    lengths = config.inputs_length, config.new_tokens
    predicted = step_bytes(model.config, batch_size, *lengths, kind["cache"], kind["weights"])
    total = sum(predicted.values())
    samples = [(a + b) / batch_size for a, b in zip(reading, decoding, strict=True)]
    return {
        "seconds_per_sample": float(np.median(samples)),
        "seconds_per_sample_range": [min(samples), max(samples)],
        "reading_seconds": float(np.median(reading)),
        "step_ms": 1e3 * step,
        "step_ms_range": [1e3 * min(decoding) / config.new_tokens, 1e3 * max(decoding) / config.new_tokens],
        "first_call_seconds": sum(compilation),
        "step_bytes": predicted,
        "gb_per_second": total / step / 1e9,
        "share_of_copy": total / step / bandwidth,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    base = max(results["rows"], key=lambda row: row["kv_heads"])  # of several in the first format
    lines = [
        "| K | weights, cache | batch | s a sample | reading, s | step, ms | step, GB: weights + self + cross | GB/s "
        f"| of copy | time, bytes against K = {base['kv_heads']} |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    base_bytes = sum(base["step_bytes"].values())
    for row in results["rows"]:
        low, high = row["seconds_per_sample_range"]
        parts = " + ".join(f"{value / 1e9:.2f}" for value in row["step_bytes"].values())
        total = sum(row["step_bytes"].values())
        kind = ", ".join(row[part] or results["config"]["dtype"] for part in ("weights", "cache"))
        lines.append(
            f"| {row['kv_heads']} | {kind} | {row['batch_size']} "
            f"| {row['seconds_per_sample']:.4f} ({low:.4f} to {high:.4f}) "
            f"| {row['reading_seconds']:.3f} | {row['step_ms']:.2f} | {parts} | {row['gb_per_second']:.1f} "
            f"| {row['share_of_copy']:.0%} | {row['step_ms'] / base['step_ms']:.2f}, {total / base_bytes:.2f} |"
        )
    config = results["config"]
    machine = results["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{config['size']}, {config['dtype']}, input {config['inputs_length']}, {config['new_tokens']} new tokens, "
            f"median of {config['repetitions']}; {machine['num_devices']} x {machine['device']}, "
            f"{machine['cores']} cores; a large copy reaches {results['copy_gb_per_second']:.1f} GB/s.",
        ]
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Time per sample against groups (GQA fig. 6), and what the bytes alone would take at the copy's bandwidth."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    config = results["config"]
    rows = [
        row for row in results["rows"] if (row["weights"], row["cache"]) == (config["weights"][0], config["cache"][0])
    ]
    K = [row["kv_heads"] for row in rows]
    times = np.array([row["seconds_per_sample"] for row in rows])
    spread = np.abs(np.array([row["seconds_per_sample_range"] for row in rows]).T - times)
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    axes.errorbar(K, times, spread, fmt="o-", color="black", capsize=3, label="measured")
    copy = 1e9 * results["copy_gb_per_second"]
    at_copy_speed = [config["new_tokens"] * sum(row["step_bytes"].values()) / copy for row in rows]
    bytes_alone = [(row["reading_seconds"] + t) / row["batch_size"] for row, t in zip(rows, at_copy_speed, strict=True)]
    label = "reading, and the steps' bytes at copy speed"
    axes.plot(K, bytes_alone, "s--", color="0.5", markerfacecolor="white", label=label)
    for number, row in zip(K, rows, strict=True):
        axes.annotate(
            f"batch {row['batch_size']}",
            (number, row["seconds_per_sample"]),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(K, list(map(str, K)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("key/value heads")
    axes.set_ylabel("time per sample, s")
    axes.set_title(f"{config['size']}: input {config['inputs_length']}, {config['new_tokens']} new tokens")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    command_line.run(main)
