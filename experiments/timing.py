"""python -m experiments.timing --config=configs/timing/t5_xxl.py [--output=DIR [--add]] [--config.kv_heads=1,8 …]

Time per sample against the number of key/value heads (GQA §3.1, fig. 6), on random weights of a model's shapes: the
largest batch that fits, a warm-up, the median and spread of repetitions; apart, what a decoding step takes, the bytes
that it has to read by arithmetic (weights, self- and cross-attention cache, as allocated) and the share that this is of
the bandwidth which a large copy reaches in the same run; how fast attention alone reads the caches. Below: a file of
prompts of mixed length with and without continuous batching (decoders), and speculation with a more grouped draft. A
table, timing.json, written after every row, and timing.png.

Each pair of config.weights (None, int8, int4) and config.cache (None, int8) is measured with every number of heads.

Two runs on a machine whose speed drifts do not compare; run in turns, each adding its repetitions to its earlier ones
(--add), they do.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.bandwidth import cache_seconds, copy_bandwidth, seconds, step_bytes
from experiments.scores import size_name
from gqa import command_line
from gqa.errors import InputError, one_of

KEYS = ("size", "changes", "kv_heads", "dtype", "weights", "cache", "max_batch_size", "inputs_length", "new_tokens")
KEYS += ("repetitions", "num_prompts", "num_drafted", "draft_kv_heads", "split_k")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config_argument(parser)
    parser.add_argument(
        "--output", type=Path, help="folder for timing.json and timing.png; must not exist unless --add"
    )
    parser.add_argument("--add", action="store_true", help="add to the repetitions in --output, where there are some")
    arguments, config = command_line.parse(parser)
    command_line.check_keys(config, KEYS, "configs/timing/t5_xxl.py")
    least = dict(max_batch_size=1, inputs_length=1, new_tokens=1, repetitions=1, num_prompts=0, num_drafted=0)
    for name, number in least.items():
        if config[name] < number:
            raise InputError(f"config.{name}={config[name]}; expected at least {number}")
    if config.new_tokens < 2:
        raise InputError("config.new_tokens=1; expected at least 2, so that steps can be told from reading the input")
    earlier = None
    if arguments.output and arguments.output.exists():
        if not arguments.add:
            raise InputError(f"--output={arguments.output} exists already; name a new folder, or add to it with --add")
        earlier = read_earlier(arguments.output / "timing.json", config)
    elif arguments.add and not arguments.output:
        raise InputError("--add without --output; expected the folder to add to")
    measure(config, " ".join(["python -m experiments.timing", *sys.argv[1:]]), arguments.output, earlier=earlier)


def read_earlier(path: Path, config) -> dict[str, Any]:
    """The timing.json at `path`, which has to be of this configuration and machine."""
    from experiments.measure import machine

    try:
        results = json.loads(path.read_text())
        theirs = {"config": results["config"], "machine": results["machine"]}
        _ = (
            [dict(part) for part in theirs.values()],
            results["copy_gb_per_second"],
            [row["repetitions"]["decoding"] for row in results["rows"]],
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is no measurement to add to ({type(error).__name__}: {error})") from None
    ours = json.loads(json.dumps({"config": config.to_dict(), "machine": machine()}))
    for part, values in ours.items():
        if theirs[part] != values:
            changed = [name for name in values if theirs[part].get(name) != values[name]]
            raise InputError(f"{path} is of another {part} ({', '.join(changed)} differ); name a new folder")
    return results


def measure(
    config,
    command: str,
    output: Path | None,
    may_go_on: Callable[[], bool] = lambda: True,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The results of all rows of `config`, written to `output` after every row; stops when it may not go on.

    A row goes on with the repetitions of its like in the results `earlier`.
    """
    from gqa.training.memory import keep_freed_memory

    keep_freed_memory()
    from experiments import pictures
    from experiments.measure import commit, machine, write_json
    from gqa import models
    from gqa.decode.generate import check_lengths
    from gqa.models.heads import nearest_divisors
    from gqa.models.quantize import check_weights
    from gqa.nn.cache import check_cache_dtype
    from gqa.training.config import DTYPES

    if not config.kv_heads:
        raise InputError(f"config.kv_heads={config.kv_heads}; expected at least one number of heads")
    if len(config.weights) != len(config.cache) or not config.weights:
        raise InputError(f"config.weights={config.weights} and config.cache={config.cache}; expected as many of each")
    formats = list(zip(config.weights, config.cache, strict=True))
    for weights, cache in formats:
        check_cache_dtype(cache)
        if weights is not None:
            check_weights(weights)
    one_of("config.dtype", config.dtype, DTYPES)
    architecture = models.replace(
        models.size(config.size), **config.changes, dtype=config.dtype, param_dtype=config.dtype, remat="none"
    )
    family = models.FAMILIES[models.family_of(architecture)]
    architectures = {
        K: models.replace(architecture, **{f"{site}_kv_heads": K for site in family.converted_sites})
        for K in config.kv_heads
    }  # refuses what does not divide, before anything is allocated
    for K in config.kv_heads:
        draft = config.draft_kv_heads
        if config.num_drafted and (draft < 1 or (draft < K and K % draft)):
            raise InputError(
                f"config.draft_kv_heads={draft} does not divide the {K} key/value heads of a model; nearest: "
                f"{nearest_divisors(K, draft)}"
            )
    check_lengths(architecture, config.inputs_length, config.new_tokens)
    results = {
        "command": command,
        "machine": machine(),
        "commit": commit(),
        "config": config.to_dict(),
        # The best of the whole run: a shared machine is slow at times.
        "copy_gb_per_second": earlier["copy_gb_per_second"] if earlier else 0.0,
        "rows": list(earlier["rows"]) if earlier else [],
    }
    for (weights, cache), K in tqdm(list(itertools.product(formats, config.kv_heads)), desc="models", unit="model"):
        if not may_go_on():
            break
        results["copy_gb_per_second"] = max(results["copy_gb_per_second"], copy_bandwidth() / 1e9)
        before = next(
            (r for r in results["rows"] if (r["kv_heads"], r["weights"], r["cache"]) == (K, weights, cache)), None
        )
        if before:
            results["rows"].remove(before)
        results["rows"].append(row(config, architectures[K], K, weights, cache, before))
        results["rows"].sort(key=lambda row: (formats.index((row["weights"], row["cache"])), row["kv_heads"]))
        if output:
            write_json(output / "timing.json", results)
    if results["rows"]:
        print(table(results), flush=True)
        if output:
            pictures.save(pictures.time_against_groups(results, output.name), output / "timing.png")
    return results


def row(
    config,
    architecture,
    num_kv_heads: int,
    weights: str | None,
    cache: str | None,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    """The measurements of one model, on top of the repetitions of `before`."""
    import jax

    from gqa import models
    from gqa.models.quantize import quantize

    def make(key):
        model = models.create(architecture, key)
        return (model if weights is None else quantize(model, weights)).unstacked()

    model = jax.block_until_ready(jax.jit(make)(jax.random.key(0)))
    for site in models.FAMILIES[models.family_of(architecture)].converted_sites:
        for attention in models.site_attention(model, site):
            attention.split_k = config.split_k
    kind = {"kv_heads": num_kv_heads, "weights": weights, "cache": cache}
    batch_size = config.max_batch_size
    while True:
        try:
            as_large = before is not None and before["batch_size"] == batch_size
            times = _times(config, model, batch_size, kind, before["repetitions"] if as_large else None)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch_size == 1:
                raise
            batch_size //= 2
    row = kind | {"batch_size": batch_size} | times
    if weights or cache:
        return row
    if config.num_prompts and isinstance(model, models.llama.Llama):
        row["mixed_prompts"] = mixed_prompts(config, model, batch_size)
    if config.num_drafted and num_kv_heads > config.draft_kv_heads:
        row["speculation"] = speculation(config, model)
    return row


def mixed_prompts(config, model, batch_size: int) -> dict[str, Any]:
    """New tokens a second of many prompts of mixed length: whole batches in turn, and rows replaced as they finish.

    Prompts have an eighth to all of `inputs_length` tokens. Tokens are drawn, and so many of the vocabulary end a row
    that it has about a quarter of `new_tokens`. Both make the same tokens.
    """
    import jax

    from gqa.decode import batches, generate
    from gqa.decode.buckets import bucket, padded
    from gqa.decode.sampling import sampling

    rng = np.random.default_rng(0)
    vocab_size, longest = model.config.vocab_size, config.inputs_length
    lengths = rng.integers(max(1, longest // 8), longest + 1, config.num_prompts)
    prompts = {number: rng.integers(3, vocab_size, length).tolist() for number, length in enumerate(lengths)}
    settings = batches.Settings(
        max_new_tokens=config.new_tokens,
        eos_ids=tuple(range(min(vocab_size // 2, 4 * vocab_size // config.new_tokens))),
        sampling=sampling(1.0),
        seed=0,
        num_beams=1,
        length_penalty=1.0,
        batch_size=batch_size,
        cache_dtype=None,
    )

    def in_turn() -> int:
        total = 0
        for first in range(0, len(prompts), batch_size):
            numbers = range(first, min(first + batch_size, len(prompts)))
            inputs, lengths = padded([prompts[number] for number in numbers], batch_size, bucket(longest))
            rows = np.arange(first, first + batch_size, dtype=np.int32)
            state = generate.prefill(model, inputs, lengths, config.new_tokens, rows)
            ends = dict(eos_ids=settings.eos_ids, sampling=settings.sampling, seed=settings.seed)
            total += int(jax.device_get(generate.decode(model, state, config.new_tokens, **ends).counts_B).sum())
        return total

    def continuous() -> int:
        return sum(len(tokens) for _, tokens in batches.generate_all(model, prompts, settings))

    result: dict[str, Any] = {"num_prompts": config.num_prompts}
    for name, run in (("in_turn", in_turn), ("continuous", continuous)):
        run()  # compiles
        start = time.perf_counter()
        result["new_tokens"] = run()
        result[f"{name}_tokens_per_second"] = result["new_tokens"] / (time.perf_counter() - start)
    return result


def speculation(config, model) -> dict[str, Any]:
    """Greedy decoding of one row alone and with a draft made of the model by conversion, in turns.

    The draft's proposals are accepted as random weights have it, which says nothing of trained ones.
    """
    import jax

    from gqa import convert, models
    from gqa.decode import generate, speculative

    kv_heads = dict.fromkeys(models.FAMILIES[models.family_of(model.config)].converted_sites, config.draft_kv_heads)
    make = jax.jit(lambda model: convert.convert(model, kv_heads, "mean", jax.random.key(0)).unstacked())
    draft = jax.block_until_ready(make(model))
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, config.inputs_length), np.int32)
    settings = dict(max_new_tokens=config.new_tokens, eos_ids=())
    runs = {
        "seconds_alone": lambda: generate.generate(model, tokens, None, **settings),
        "seconds_with_draft": lambda: speculative.generate(
            model, draft, tokens, None, num_drafted=config.num_drafted, **settings
        ),
    }
    made = {name: jax.block_until_ready(run()) for name, run in runs.items()}["seconds_with_draft"]  # compiles
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(config.repetitions)]
    return {
        "draft_kv_heads": config.draft_kv_heads,
        "num_drafted": config.num_drafted,
        "accepted": int(made.num_accepted) / int(made.num_proposed),
        **{name: float(np.median([each[name] for each in times])) for name in runs},
    }


def _times(config, model, batch_size: int, kind: dict, before: dict[str, list[float]] | None) -> dict[str, Any]:
    import jax

    from gqa.decode import generate

    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch_size, config.inputs_length), np.int32)
    tokens = jax.device_put(tokens)

    def read():
        return generate.prefill(model, tokens, None, config.new_tokens, cache_dtype=kind["cache"])

    def decode(state):
        return generate.decode(model, state, config.new_tokens, eos_ids=())

    first_calls = [seconds(read)]
    state = jax.block_until_ready(read())
    first_calls.append(seconds(lambda: decode(state)))
    reading, decoding = [list(before[part]) if before else [] for part in ("reading", "decoding")]  # seconds of each
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
        "repetitions": {"reading": reading, "decoding": decoding},
        "compile_seconds": max(0.0, sum(first_calls) - float(np.median(reading)) - float(np.median(decoding))),
        "step_bytes": predicted,
        "gb_per_second": total / step / 1e9,
        "cache_seconds": None if kind["cache"] else cache_seconds(model.config, batch_size, *lengths),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    base = max(results["rows"], key=lambda row: row["kv_heads"])  # of several in the first format
    lines = [
        "| K | weights, cache | batch | s a sample | reading, s | step, ms | step, GB: weights + self + cross | GB/s "
        f"| of copy | caches alone, the rest: GB/s | time, bytes against K = {base['kv_heads']} | compiling, s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
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
            f"| {row['gb_per_second'] / results['copy_gb_per_second']:.0%} | {_alone(row)} "
            f"| {row['step_ms'] / base['step_ms']:.2f}, {total / base_bytes:.2f} "
            f"| {row['compile_seconds']:.1f} |"
        )
    lines += _table_of(
        "| K | prompts of mixed length | whole batches in turn, new tokens/s | continuous batching, new tokens/s |",
        results["rows"],
        "mixed_prompts",
        lambda found: (
            f"{found['num_prompts']} | {found['in_turn_tokens_per_second']:.1f} "
            f"| {found['continuous_tokens_per_second']:.1f}"
        ),
    )
    lines += _table_of(
        "| K | draft | accepted | one sample alone, s | with the draft, s |",
        results["rows"],
        "speculation",
        lambda found: (
            f"K = {found['draft_kv_heads']}, {found['num_drafted']} tokens | {found['accepted']:.0%} "
            f"| {found['seconds_alone']:.3f} | {found['seconds_with_draft']:.3f}"
        ),
    )
    config = results["config"]
    machine = results["machine"]
    repetitions = min(len(row["repetitions"]["reading"]) for row in results["rows"])
    return "\n".join(
        [
            *lines,
            "",
            f"{size_name(config)}, {config['dtype']}, input {config['inputs_length']}, {config['new_tokens']} new "
            f"tokens, median of {repetitions}; {machine['num_devices']} x {machine['device']}, "
            f"{machine['cores']} cores; a large copy reaches {results['copy_gb_per_second']:.1f} GB/s.",
        ]
    )


def _alone(row: dict[str, Any]) -> str:
    """What a second reads of the caches, attention alone, and of the weights in the rest of the step."""
    if row["cache_seconds"] is None:
        return ""
    of_caches = row["step_bytes"]["self_cache"] + row["step_bytes"]["cross_cache"]
    rest = row["step_ms"] / 1e3 - row["cache_seconds"]
    weights = f"{row['step_bytes']['weights'] / rest / 1e9:.1f}" if rest > 0 else "–"  # attention alone was slower
    return f"{of_caches / row['cache_seconds'] / 1e9:.1f}, {weights}"


def _table_of(header: str, rows: list[dict[str, Any]], name: str, cells: Callable[[dict], str]) -> list[str]:
    """A further table, of the rows that measured `name`."""
    found = [f"| {row['kv_heads']} | {cells(row[name])} |" for row in rows if name in row]
    return ["", header, "|" + "--:|" * (header.count("|") - 1), *found] if found else []


if __name__ == "__main__":
    command_line.run(main)
