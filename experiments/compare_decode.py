"""python -m experiments.compare_decode --family=llama [--kv_heads=16,4,1] [--batch=1,8] [--output=FILE.json]

Greedy decoding side by side with other implementations: the same random weights, the same prompts, the same number of
new tokens, in turns. On a CPU transformers on torch and CTranslate2, all in float32, and transformers in bfloat16; on a
GPU, in bfloat16, transformers as it is and with a static cache and compiled. Reading the prompt and a decoding step are
reported apart: a step is what each further token adds, from runs of 1 and of all tokens. Says which share of the tokens
is the same. FILE.json is written after every row, and rows that it has are not measured again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gqa import command_line
from gqa.errors import InputError

OURS = "this library"

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
    "llama_2_7b": ("llama_2_7b", {}, 2048),
    "mini": ("llama_mini", {}, 16),
    "mini_t5": ("t5_1_1_mini", {}, 16),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=FAMILIES, help="the model's shapes")
    parser.add_argument("--kv_heads", help="key/value heads, comma-separated (default: as many as query heads)")
    parser.add_argument("--batch", default="1,8", help="batch sizes, comma-separated (default: 1,8)")
    parser.add_argument("--new_tokens", type=int, default=64, help="new tokens of a row (default: 64)")
    parser.add_argument("--repetitions", type=int, default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--output", type=Path, help="file for the result as JSON; goes on where it ends")
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
    import jax

    from experiments.measure import commit, machine, write_json
    from gqa import models

    size, changes, length = FAMILIES[arguments.family]
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    base = models.replace(models.size(size), **changes, dtype=dtype, param_dtype=dtype, remat="none")
    is_t5 = isinstance(base, models.t5.T5Config)
    wanted = _numbers("--kv_heads", arguments.kv_heads) if arguments.kv_heads else [base.num_heads]
    if is_t5 and wanted != [base.num_heads]:
        raise InputError(
            f"--kv_heads={arguments.kv_heads}: stock T5 has {base.num_heads} at every attention; leave it out"
        )
    architectures = wanted if is_t5 else [models.replace(base, decoder_self_kv_heads=K) for K in wanted]
    what = {
        "machine": machine() | {"torch": torch.__version__, "transformers": transformers.__version__},
        "family": arguments.family,
        "dtype": dtype,
        "prompt_length": length,
        "new_tokens": arguments.new_tokens,
        "repetitions": arguments.repetitions,
    }
    rows = _finished(arguments.output, what)
    done = {(row["kv_heads"], row["batch"]) for row in rows}
    print("\n".join(table(rows)), flush=True)
    for K, architecture in zip(wanted, [base] if is_t5 else architectures, strict=True):
        missing = [batch for batch in batches if (K, batch) not in done]
        found = implementations(architecture, arguments.new_tokens) if missing else {}
        for batch in missing:
            prompts = np.random.default_rng(0).integers(3, base.vocab_size, (batch, length), np.int32)
            row = {"kv_heads": K, "batch": batch, "commit": commit()}
            row |= compare(found, prompts, arguments.new_tokens, arguments.repetitions)
            rows.append(row)
            print("\n".join(table([row])[2:]), flush=True)
            if arguments.output:
                command = " ".join(["python -m experiments.compare_decode", *sys.argv[1:]])
                write_json(arguments.output, {"command": command, **what, "rows": rows})


def _finished(path: Path | None, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that an earlier run of the same comparison left."""
    if path is None or not path.exists():
        return []
    try:
        results = json.loads(path.read_text())
        other = [name for name, value in what.items() if results[name] != value]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"--output={path} is no result of this command; name a new file") from None
    if other:
        raise InputError(f"--output={path} is of another {', '.join(other)}; name a new file")
    return results["rows"]


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{name}={text}; expected positive numbers such as 1,8")
    return numbers


def implementations(architecture, new_tokens: int) -> dict[str, Callable | str]:
    """Implementations with the same random weights: `(prompts, count) -> new tokens`, or why there is none.

    Their caches have room for `new_tokens`.
    """
    import jax
    import torch

    from gqa import models
    from gqa.checkpoints import hf

    model = models.create(architecture, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "model"
        hf.save(model, saved, dtype=architecture.param_dtype)
        found: dict[str, Callable | str] = {OURS: _ours(model.unstacked(), new_tokens)}
        if jax.default_backend() == "cpu":
            found["transformers"] = _transformers(saved, "cpu", torch.float32)
            found["ctranslate2"] = _ctranslate2(saved, Path(folder) / "converted", architecture)
            found["transformers bfloat16"] = _transformers(saved, "cpu", torch.bfloat16)
        elif torch.cuda.is_available():
            found["transformers"] = _transformers(saved, "cuda", torch.bfloat16)
            found["transformers static, compiled"] = _transformers(saved, "cuda", torch.bfloat16, "static")
        else:
            found["transformers"] = "torch has no CUDA here"
    return found


def _ours(model, new_tokens: int) -> Callable:
    import jax

    from gqa.decode import generate

    def run(prompts: np.ndarray, count: int) -> np.ndarray:
        # One program for all counts: the cache has room for all tokens either way.
        state = generate.prefill(model, jax.numpy.asarray(prompts), None, new_tokens)
        return np.asarray(generate.decode(model, state, count, eos_ids=()).tokens_BN)[:, :count]

    return run


def _transformers(folder: Path, device: str, dtype, cache: str | None = None) -> Callable:
    import torch
    import transformers

    is_t5 = json.loads((folder / "config.json").read_text())["model_type"] == "t5"
    auto = transformers.AutoModelForSeq2SeqLM if is_t5 else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.generation_config.eos_token_id = None

    def run(prompts: np.ndarray, count: int) -> np.ndarray:
        inputs = torch.tensor(prompts, dtype=torch.long, device=device)
        settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1, use_cache=True)
        with torch.inference_mode():
            # With a static cache, which lies as long as all tokens need, `generate` compiles the steps on a GPU.
            found = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), cache_implementation=cache, **settings
            )
        return found[:, -count:].cpu().numpy()

    return run


class _Numerals:
    """The tokenizer that CTranslate2's converter asks for: every token is its number in digits."""

    pad_token, eos_token, unk_token, bos_token = "0", "1", "2", "1"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.vocab_size)}

    def convert_ids_to_tokens(self, number: int) -> str:
        return str(number)


def _ctranslate2(folder: Path, converted: Path, architecture) -> Callable | str:
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return "not installed; expected pip install ctranslate2"
    from gqa import models

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class, model_name_or_path, **kwargs):
            return _Numerals(architecture.vocab_size)

    Converter(str(folder)).convert(str(converted), quantization="float32")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = dict(device="cpu", compute_type="float32", inter_threads=1, intra_threads=threads)
    if isinstance(architecture, models.t5.T5Config):
        model = ctranslate2.Translator(str(converted), **settings)
    else:
        model = ctranslate2.Generator(str(converted), **settings)

    def run(prompts: np.ndarray, count: int) -> np.ndarray:
        tokens = [list(map(str, row)) for row in prompts.tolist()]
        if isinstance(model, ctranslate2.Translator):
            limits = dict(max_input_length=0, min_decoding_length=count, max_decoding_length=count)
            found = [result.hypotheses[0] for result in model.translate_batch(tokens, beam_size=1, **limits)]
        else:
            limits = dict(min_length=count, max_length=count, include_prompt_in_result=False)
            found = [result.sequences[0] for result in model.generate_batch(tokens, beam_size=1, **limits)]
        return np.array(found, dtype=np.int32)  # of digits

    return run


def compare(found: dict[str, Callable | str], prompts: np.ndarray, new_tokens: int, repetitions: int) -> dict[str, Any]:
    """By implementation: medians, in turns; against ours, the share of equal tokens and how much faster ours is."""
    runs = {name: run for name, run in found.items() if callable(run)}
    counts = (1, new_tokens)
    seconds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in runs}
    tokens = {}
    with tqdm(total=len(runs) * (1 + 2 * repetitions), desc=f"batch {len(prompts)}", unit="run", delay=1) as progress:
        for name, run in runs.items():  # also compiles
            tokens[name] = run(prompts, new_tokens)
            progress.update()
        for _ in range(repetitions):
            for count in counts:
                for name, run in runs.items():
                    seconds[name][count].append(_seconds(lambda run=run, count=count: run(prompts, count)))
                    progress.update()
    row: dict[str, Any] = {}
    for name, run in found.items():
        if name not in runs:
            row[name] = {"missing": run}
            continue
        first, whole = (float(np.median(seconds[name][count])) for count in counts)
        times = {"first_token_s": first, "step_ms": 1e3 * (whole - first) / (new_tokens - 1), "sample_s": whole}
        row[name] = dict(times)
        if name != OURS:
            row[name]["same_tokens"] = float((tokens[OURS] == tokens[name]).mean())
            row[name]["ours_faster_by"] = {key: value / row[OURS][key] for key, value in times.items()}
    return row


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a Markdown table, a line for each implementation."""
    lines = [
        "| K | batch | | first token, s | step, ms | sample, s "
        "| first token, step, sample: ours is faster by | same tokens |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for name, of in row.items():
            if not isinstance(of, dict):
                continue
            cells = [str(row["kv_heads"]), str(row["batch"]), name]
            if "missing" in of:
                cells += [of["missing"], "", "", "", ""]
            else:
                cells += [f"{of['first_token_s']:.3f}", f"{of['step_ms']:.1f}", f"{of['sample_s']:.2f}"]
                faster = of.get("ours_faster_by", {})
                cells += [", ".join(f"{ratio:.2f}x" for ratio in faster.values())]
                cells += [f"{of['same_tokens']:.0%}" if faster else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    command_line.run(main)
