"""python -m experiments.throughput --config=configs/throughput/llama_small.py [--output=DIR] [--config.memory_gb=2 …]

New tokens a second against the batch, which doubles until the memory is full, with several numbers of key/value heads
(Llama 2, appendix A.2.1, fig. 24), on random weights of a decoder's shapes. Every row has read a prompt of
`config.context` tokens; the time is that of the steps that follow. What a batch needs is known from its compiled
program before it is run, so that a machine without a limit of its own can be given one. A table, throughput.json,
written after every batch, and throughput.png.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scores import size_name
from gqa import command_line
from gqa.errors import InputError, one_of

KEYS = ("size", "changes", "kv_heads", "dtype", "memory_gb", "context", "new_tokens", "repetitions")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config_argument(parser)
    parser.add_argument("--output", type=Path, help="folder for throughput.json and throughput.png; must not exist")
    arguments, config = command_line.parse(parser)
    command_line.check_keys(config, KEYS, "configs/throughput/llama_2_7b.py")
    if not config.kv_heads:
        raise InputError(f"config.kv_heads={config.kv_heads}; expected at least one number of heads")
    for name in ("context", "new_tokens", "repetitions"):
        if config[name] < 1:
            raise InputError(f"config.{name}={config[name]}; expected at least 1")
    if arguments.output and arguments.output.exists():
        raise InputError(f"--output={arguments.output} exists already; name a new folder")
    measure(config, " ".join(["python -m experiments.throughput", *sys.argv[1:]]), arguments.output)


def measure(config, command: str, output: Path | None) -> dict[str, Any]:
    """The results of all of `config`'s models, written to `output` after every batch."""
    from tqdm import tqdm

    from experiments import pictures
    from experiments.measure import commit, machine, write_json
    from gqa import models
    from gqa.training.config import DTYPES

    one_of("config.dtype", config.dtype, DTYPES)
    if models.family_of(models.size(config.size)) != "llama":
        raise InputError(f"config.size={config.size} is no decoder; expected one, such as llama_2_7b")
    architecture = models.replace(
        models.size(config.size), **config.changes, dtype=config.dtype, param_dtype=config.dtype, remat="none"
    )
    if config.context + config.new_tokens > architecture.max_position:
        room = architecture.max_position - config.new_tokens
        if room < 1:
            longest = architecture.max_position - min(config.context, architecture.max_position - 1)
            raise InputError(
                f"config.new_tokens={config.new_tokens} are more than the model has positions for; nearest: {longest}"
            )
        raise InputError(f"config.context={config.context} is longer than the model has positions for; nearest: {room}")
    architectures = {K: models.replace(architecture, decoder_self_kv_heads=K) for K in config.kv_heads}
    memory_bytes = _memory_bytes(config.memory_gb)
    results = {
        "command": command,
        "machine": machine(),
        "commit": commit(),
        "config": config.to_dict(),
        "memory_bytes": memory_bytes,
        "rows": [],
    }
    with tqdm(desc="batches", unit="batch") as bar:
        for K, changed in architectures.items():
            model, batch_size, fits = _random(changed), 1, True
            while fits:
                bar.set_postfix_str(f"K = {K}, batch {batch_size}")
                row = _row(config, model, batch_size, memory_bytes)
                results["rows"].append({"kv_heads": K} | row)
                if output:
                    write_json(output / "throughput.json", results)
                bar.update()
                batch_size, fits = 2 * batch_size, row["tokens_per_second"] is not None
            del model
    print(table(results), flush=True)
    if output:
        pictures.save(pictures.throughput(results, output.name), output / "throughput.png")
    return results


def _memory_bytes(memory_gb: float | None) -> int:
    import jax

    if memory_gb is not None:
        if not 0 < memory_gb < math.inf:
            raise InputError(f"config.memory_gb={memory_gb}; expected a positive number of gigabytes")
        return int(1e9 * memory_gb)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise InputError("config.memory_gb: None is for a device with a memory of its own; give a number, such as 2")
    return limit


def _random(architecture):
    import jax

    from gqa import models

    return jax.block_until_ready(jax.jit(lambda key: models.create(architecture, key).unstacked())(jax.random.key(0)))


def _row(config, model, batch_size: int, memory_bytes: int) -> dict[str, Any]:
    """A batch's bytes, and where they are no more than `memory_bytes` its times, else None in their place."""
    import jax

    from gqa.decode import generate

    rows_B = np.arange(batch_size, dtype=np.int32)
    prompt_1S = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, config.context), np.int32)
    read = generate.prefill(model, prompt_1S, None, config.new_tokens)
    # Before there is an array of the batch's size.
    state = jax.eval_shape(lambda read: generate.repeated(read, batch_size, rows_B), read)
    arguments = np.int32(config.new_tokens), np.int32(1), generate.eos_array(()), None, jax.random.key(0)
    try:
        program = generate.decode_program.lower(model, state, *arguments).compile()
        memory = program.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed += memory.temp_size_in_bytes
        row = {"batch_size": batch_size, "bytes": needed}
        if needed <= memory_bytes:
            return row | _times(config, program, model, read, rows_B, arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row = {"batch_size": batch_size, "bytes": None}
    return row | dict.fromkeys(("tokens_per_second", "tokens_per_second_range", "step_ms"))


def _times(config, program, model, read, rows_B: np.ndarray, arguments: tuple) -> dict[str, Any]:
    import jax

    from gqa.decode import generate

    seconds = []
    for repetition in range(config.repetitions + 1):  # the first warms up
        state = jax.block_until_ready(generate.repeated(read, len(rows_B), rows_B))
        start = time.perf_counter()
        jax.block_until_ready(program(model, state, *arguments))
        if repetition:
            seconds.append(time.perf_counter() - start)
    middle, new_tokens = float(np.median(seconds)), len(rows_B) * config.new_tokens
    return {
        "tokens_per_second": new_tokens / middle,
        "tokens_per_second_range": [new_tokens / max(seconds), new_tokens / min(seconds)],
        "step_ms": 1e3 * middle / config.new_tokens,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table: a line a batch."""
    kv_heads = sorted({row["kv_heads"] for row in results["rows"]}, reverse=True)
    rows = {(row["kv_heads"], row["batch_size"]): row for row in results["rows"]}
    lines = [
        "| batch | " + " | ".join(f"K = {K}: tokens/s | step, ms | GB" for K in kv_heads) + " |",
        "|--:|" + "--:|--:|--:|" * len(kv_heads),
    ]
    for batch_size in sorted({row["batch_size"] for row in results["rows"]}):
        cells = [str(batch_size)]
        for K in kv_heads:
            row = rows.get((K, batch_size))
            if row is None:
                cells += ["", "", ""]
                continue
            needed = "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.3g}"
            rate, step = row["tokens_per_second"], row["step_ms"]
            cells += ["does not fit", "", needed] if rate is None else [f"{rate:,.0f}", f"{step:.1f}", needed]
        lines.append(f"| {' | '.join(cells)} |")
    config, machine = results["config"], results["machine"]
    lines += [
        "",
        f"{size_name(config)}, {config['dtype']}, context {config['context']}, {config['new_tokens']} new tokens, "
        f"{results['memory_bytes'] / 1e9:.3g} GB; median of {config['repetitions']}; {machine['num_devices']} x "
        f"{machine['device']}, {machine['cores']} cores.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
