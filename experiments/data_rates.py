"""python -m experiments.data_rates [--source=embedded_large] [--repeats=3] [--output=experiments/results/data_rates]

How fast text becomes records, and records batches, on this machine:

- the tokenizer alone: the source's texts, in memory, to ids, on as many threads as there are cores, as SentencePiece's
  `Encode` gives them (lists of Python's integers) and as arrays, which is what preparation asks it for;
- preparation, whole: the same texts from disk to packed records and manifest, for text (span corruption, rows of 512)
  and for a JSONL table of pairs cut from the same text, of CNN/DailyMail's mean lengths;
- the loader: positions a second of the quickstart's batches, against what the quickstart's training reads.

Tokenizer and preparation are timed in turns; a table and JSON go to --output.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from gqa import command_line
from gqa.errors import InputError

ROOT = Path(__file__).parents[1]
VOCABULARY = ROOT / "assets" / "vocabulary" / "python_4096.model"
TRAIN_STEP = ROOT / "experiments" / "results" / "train_step" / "mini_t5.json"  # of the quickstart's model and batch
GOAL_PREPARATION, GOAL_LOADER = 0.8, 20.0
ARTICLE, SUMMARY = 4000, 300  # characters: 781 and 56 words (See et al. 2017, §3)
LOADED_BATCHES = 300
TEXTS_PER_CALL = 64  # of the tokenizer, as preparation calls it


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="embedded_large", help="text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "results" / "data_rates", metavar="DIR")
    arguments = command_line.parse_arguments(parser)
    if arguments.repeats < 1:
        raise InputError(f"--repeats={arguments.repeats}; expected at least 1")

    from experiments.measure import commit, machine, write_json

    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.source, Path(folder), arguments.repeats)
    result |= {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.data_rates", *sys.argv[1:]]),
    }
    lines = table(result)
    print("\n".join(lines))
    write_json(arguments.output / "data_rates.json", result)
    (arguments.output / "data_rates.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(source: str, folder: Path, repeats: int) -> dict:
    """Rates of preparation and loader; `folder` holds what is written meanwhile."""
    from gqa.data.prepare import PrepareSpec

    pairs = folder / "pairs.jsonl"
    write_pairs(source, pairs)
    vocabulary = str(VOCABULARY)
    specs = {
        "text": PrepareSpec("span_corruption", source, vocabulary, 512, None),
        "table of pairs": PrepareSpec("supervised", str(pairs), vocabulary, 512, 256),
    }
    prepared = {name: preparation(spec, folder / "records", repeats) for name, spec in specs.items()}
    return {"preparation": prepared, "loader": loader(source, folder / "loaded", repeats)}


def write_pairs(source: str, path: Path) -> None:
    """A table of the source's text in pieces: what comes first as inputs, the rest as targets."""
    from gqa.data.corpus import documents

    with path.open("w", encoding="utf-8") as file:
        for document in documents(source):
            for start in range(0, len(document.text), ARTICLE + SUMMARY):
                inputs = document.text[start : start + ARTICLE]
                targets = document.text[start + ARTICLE : start + ARTICLE + SUMMARY]
                if inputs.strip() and targets.strip():
                    file.write(json.dumps({"inputs": inputs, "targets": targets}) + "\n")


def preparation(spec, output: Path, repeats: int) -> dict:
    """Seconds, wall and processor, of the tokenizer alone and of the whole preparation, on the same texts."""
    import shutil

    import sentencepiece

    from gqa.data.corpus import SPLITS
    from gqa.data.prepare import prepare

    source, vocabulary = spec.open_source(), spec.open_vocabulary()
    items = [item for split in SPLITS for item in spec.items(source, split, vocabulary)]
    texts = [text for item in items for text in ([item] if isinstance(item, str) else item)]
    cores = os.cpu_count() or 1

    def tokenise() -> int:
        calls = (vocabulary.encode_all(texts[i : i + TEXTS_PER_CALL * cores], cores) for i in _starts(texts, cores))
        return sum(len(ids) for call in calls for ids in call)

    def tokenise_to_lists() -> int:
        return sum(len(ids) for ids in model.Encode(texts, num_threads=cores))

    model = sentencepiece.SentencePieceProcessor(model_file=str(VOCABULARY))
    runs: dict[str, list[tuple[float, float]]] = {"lists": [], "arrays": [], "preparation": []}
    for _ in tqdm(range(repeats), desc="preparation", unit="repeat", disable=None):
        timed(tokenise_to_lists, runs["lists"])
        num_tokens = timed(tokenise, runs["arrays"])
        timed(lambda: prepare(spec, output), runs["preparation"])
        shutil.rmtree(output)
    seconds = {name: statistics.median(wall for wall, _ in times) for name, times in runs.items()}
    return {
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": num_tokens,
        "seconds": {name: [wall for wall, _ in times] for name, times in runs.items()},
        "processor_seconds": {name: [processor for _, processor in times] for name, times in runs.items()},
        "tokens_per_second": {name: num_tokens / median for name, median in seconds.items()},
        "ratio": {name: seconds[name] / seconds["preparation"] for name in ("lists", "arrays")},
    }


def loader(source: str, folder: Path, repeats: int) -> dict:
    """Positions a second of the quickstart's batches, as one thread makes them, and as its training reads them."""
    from gqa.data.loader import train_batches
    from gqa.data.prepare import PrepareSpec, prepare

    step = json.loads(TRAIN_STEP.read_text())
    batch = step["batch"]
    prepare(PrepareSpec("span_corruption", source, str(VOCABULARY), batch["inputs_length"], None), folder)
    batches = train_batches(folder, batch["rows"], seed=0)
    positions = batch["rows"] * (batch["inputs_length"] + batch["targets_length"])
    assert batches(0)["targets"].shape[1] == batch["targets_length"], batches(0)["targets"].shape
    times: list[tuple[float, float]] = []
    for repeat in range(repeats):
        first = repeat * LOADED_BATCHES
        timed(lambda first=first: [batches(first + i) for i in range(LOADED_BATCHES)], times)
    rate = positions * LOADED_BATCHES / statistics.median(wall for wall, _ in times)
    training = positions / (step["milliseconds"]["step"]["ours, unrolled"]["median_ms"] / 1e3)
    return {
        "batch": batch,
        "seconds": [wall for wall, _ in times],
        "positions_per_second": rate,
        "training_positions_per_second": training,
        "training_from": {"file": str(TRAIN_STEP.relative_to(ROOT)), "machine": step["machine"]},
        "ratio": rate / training,
    }


def timed(call: Callable, times: list[tuple[float, float]]):
    """What `call` gives; its wall and processor seconds join `times`."""
    start, before = time.perf_counter(), time.process_time()
    result = call()
    times.append((time.perf_counter() - start, time.process_time() - before))
    return result


def table(result: Mapping) -> list[str]:
    """Markdown of all rates against their goals."""
    lines = ["| | tokens | tokenizer, tokens/s | to arrays | preparation | to the tokenizer | to arrays | goal |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, row in result["preparation"].items():
        rates = row["tokens_per_second"]
        lines.append(
            f"| {name} | {row['tokens']:,} | {rates['lists']:,.0f} | {rates['arrays']:,.0f} | "
            f"{rates['preparation']:,.0f} | {row['ratio']['lists']:.2f} | {row['ratio']['arrays']:.2f} | "
            f"{GOAL_PREPARATION} |"
        )
    loaded = result["loader"]
    batch = loaded["batch"]
    lines += [
        "",
        f"Loader: {loaded['positions_per_second']:,.0f} positions a second in batches of {batch['rows']} rows of "
        f"{batch['inputs_length']} + {batch['targets_length']}; training reads "
        f"{loaded['training_positions_per_second']:,.0f} (`{loaded['training_from']['file']}`, "
        f"{loaded['training_from']['machine']['cpu']}): {loaded['ratio']:.0f}x (goal: {GOAL_LOADER:g}x).",
        "",
        f"`{result['command']}`, {result['machine']['cores']} cores of {result['machine']['cpu']}; medians of "
        f"{len(loaded['seconds'])}.",
    ]
    return lines


def _starts(texts: Sequence[str], cores: int) -> Iterator[int]:
    return iter(range(0, len(texts), TEXTS_PER_CALL * cores))


if __name__ == "__main__":
    command_line.run(main)
