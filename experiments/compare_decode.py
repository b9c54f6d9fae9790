"""python -m experiments.compare_decode --family=llama [--kv_heads=16,4,1] [--batch=1,8] [--output=FILE.json]

Greedy decoding side by side with transformers on torch: the same random weights in float32 on the CPU, the same
prompts, the same number of new tokens, in turns. Reading the prompt and a decoding step are reported apart: a step is
what each further token adds, from runs of 1 and of all tokens. Says whether both gave the same tokens.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gqa import command_line
from gqa.errors import InputError

# Family -> architecture, its changes, prompt length; what the comparison is about.
FAMILIES = {
    "llama": (
        "llama_2_7b",
        dict(vocab_size=32000, d_model=1024, num_heads=16, head_dim=64, d_ff=2816, num_layers=12, max_position=1024)
        | dict(decoder_self_kv_heads=16),
        512,
    ),
    "t5_base": ("t5_1_1_base", {}, 512),
    "t5_large": ("t5_1_1_large", {}, 512),
    "mini": ("llama_mini", {}, 16),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=FAMILIES, help="the model's shapes")
    parser.add_argument("--kv_heads", help="key/value heads, comma-separated (default: as many as query heads)")
    parser.add_argument("--batch", default="1,8", help="batch sizes, comma-separated (default: 1,8)")
    parser.add_argument("--new_tokens", type=int, default=64, help="new tokens of a row (default: 64)")
    parser.add_argument("--repetitions", type=int, default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    arguments = command_line.parse_arguments(parser)
    if arguments.new_tokens < 2 or arguments.repetitions < 1:
        raise InputError(
            f"--new_tokens={arguments.new_tokens} --repetitions={arguments.repetitions}; expected at least 2 and 1"
        )
    batches = _numbers("--batch", arguments.batch)
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError("torch and transformers are not installed; expected pip install -e '.[parity]'") from None
    from gqa.training.memory import keep_freed_memory

    keep_freed_memory()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from experiments.measure import commit, machine, write_json
    from gqa import models

    size, changes, length = FAMILIES[arguments.family]
    base = models.replace(models.size(size), **changes, dtype="float32", param_dtype="float32", remat="none")
    is_t5 = isinstance(base, models.t5.T5Config)
    wanted = _numbers("--kv_heads", arguments.kv_heads) if arguments.kv_heads else [base.num_heads]
    if is_t5 and wanted != [base.num_heads]:
        raise InputError(
            f"--kv_heads={arguments.kv_heads}: stock T5 has {base.num_heads} at every attention; leave it out"
        )
    architectures = wanted if is_t5 else [models.replace(base, decoder_self_kv_heads=K) for K in wanted]
    rows = []
    for K, architecture in zip(wanted, [base] if is_t5 else architectures, strict=True):
        ours, theirs = _both(architecture)
        for batch in batches:
            rows.append(
                {"kv_heads": K, "batch": batch}
                | compare(ours, theirs, batch, length, arguments.new_tokens, arguments.repetitions)
            )
            print(table(rows[-1:])[-1], flush=True)
    results = {
        "command": " ".join(["python -m experiments.compare_decode", *sys.argv[1:]]),
        "machine": machine() | {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit(),
        "family": arguments.family,
        "prompt_length": length,
        "new_tokens": arguments.new_tokens,
        "rows": rows,
    }
    print("\n".join(table(rows)))
    if arguments.output:
        write_json(arguments.output, results)


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{name}={text}; expected positive numbers such as 1,8")
    return numbers


def _both(architecture) -> tuple[Any, Any]:
    """Our model in its decoding form, and transformers' with the same weights."""
    import jax
    import torch
    import transformers

    from gqa import models
    from gqa.checkpoints import hf

    model = models.create(architecture, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        hf.save(model, Path(folder) / "model", dtype="float32")
        auto = transformers.AutoModelForCausalLM
        if isinstance(architecture, models.t5.T5Config):
            auto = transformers.AutoModelForSeq2SeqLM
        theirs = auto.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    return model.unstacked(), theirs


def compare(ours, theirs, batch: int, length: int, new_tokens: int, repetitions: int) -> dict[str, Any]:
    """Medians of both, in turns, and whether their tokens are the same."""
    import jax
    import torch

    from gqa.decode import generate

    tokens = np.random.default_rng(0).integers(3, ours.config.vocab_size, (batch, length), np.int32)
    inputs, torch_inputs = jax.numpy.asarray(tokens), torch.tensor(tokens, dtype=torch.long)
    mask = torch.ones_like(torch_inputs)

    def run_ours(count: int) -> np.ndarray:
        # One program for all counts: the cache has room for all tokens either way.
        state = generate.prefill(ours, inputs, None, new_tokens)
        return np.asarray(generate.decode(ours, state, count, eos_ids=()).tokens_BN)[:, :count]

    def run_theirs(count: int) -> np.ndarray:
        settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1, use_cache=True)
        with torch.inference_mode():
            found = theirs.generate(torch_inputs, attention_mask=mask, **settings)
        return found[:, -count:].numpy()

    results = {"ours": run_ours(new_tokens), "theirs": run_theirs(new_tokens)}  # also compiles
    runs: dict[str, dict[int, list[float]]] = {name: {1: [], new_tokens: []} for name in results}
    for _ in range(repetitions):
        for count in (1, new_tokens):
            for name, run in (("ours", run_ours), ("theirs", run_theirs)):
                runs[name][count].append(_seconds(lambda run=run, count=count: run(count)))
    row: dict[str, Any] = {"same_tokens": float((results["ours"] == results["theirs"]).mean())}
    for name, seconds in runs.items():
        first, whole = (float(np.median(seconds[count])) for count in (1, new_tokens))
        row[name] = {"first_token_s": first, "sample_s": whole, "step_ms": 1e3 * (whole - first) / (new_tokens - 1)}
    row["speedup"] = {key: row["theirs"][key] / row["ours"][key] for key in row["ours"]}
    return row


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a Markdown table; times are ours / transformers'."""
    lines = [
        "| K | batch | first token, s | step, ms | sample, s | step: faster by | sample: faster by | same tokens |"
    ]
    lines.append("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        pairs = [f"{row['ours'][key]:.{digits}f} / {row['theirs'][key]:.{digits}f}" for key, digits in _SHOWN]
        ratios = [f"{row['speedup'][key]:.2f}x" for key in ("step_ms", "sample_s")]
        same = f"{row['same_tokens']:.0%}"
        lines.append("| " + " | ".join([str(row["kv_heads"]), str(row["batch"]), *pairs, *ratios, same]) + " |")
    return lines


_SHOWN = (("first_token_s", 3), ("step_ms", 1), ("sample_s", 2))


if __name__ == "__main__":
    command_line.run(main)
