"""python -m experiments.recall [--output=runs/recall]

Writes the task of recall: tables that a model has to read, and several of their entries to find. It tells attention
heads apart as text does not: an answer is right only if the key and the relation that were asked for were both matched.

    inputs   " path color step list size mode … which list size path color …"  16 facts in random order, 8 questions
    targets  " list size mode path color step …"                               the questions with their answers

A fact is key, relation, value: one of 8 keys, one of 4 relations, no pair twice, and one of 16 values, drawn anew in
every row, so that nothing can be learnt by heart. Each word is one piece of the shipped vocabulary: 66 tokens of inputs
and 25 of targets, end of sequence included, of which 8 are values; guessing them gives an accuracy of 0.70.

The folder gets rows/, the two splits as JSON lines, and records/, what training reads; interrupted and run again, the
command goes on.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from gqa.command_line import load_config, parse_arguments, run
from gqa.errors import InputError

CONFIG = Path(__file__).parents[1] / "configs" / "recall" / "teacher.py"
KEYS = "array file list module path string tree vector".split()
RELATIONS = "color size state type".split()
VALUES = "axis base class code copy data dict float index input line method mode name order step".split()
FACTS, QUESTIONS = 16, 8
ROWS = {"train": 40_000, "heldout": 1_000}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/recall"), metavar="DIR", help="(runs/recall)")
    args = parse_arguments(parser)
    if (args.output / "records" / "manifest.json").exists():
        raise InputError(f"{args.output / 'records'} exists; choose a new folder")
    write(args.output, ROWS)


def write(folder: Path, counts: Mapping[str, int]) -> None:
    """Writes `counts[split]` rows of each split, unless they are there, and the records of all."""
    from gqa.data.prepare import PrepareSpec, prepare

    if not (folder / "rows").exists():
        unfinished = folder / "rows.partial"
        unfinished.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for split, count in counts.items():
            with (unfinished / f"{split}.jsonl").open("w") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in rows(rng, count))
        unfinished.rename(folder / "rows")
    data = load_config(CONFIG).data.to_dict()
    prepare(PrepareSpec(**data | {"source": str(folder / "rows")}), folder / "records")
    print(f"wrote {folder}: {', '.join(f'{count:,} rows of {split}' for split, count in counts.items())}")


def rows(rng: np.random.Generator, count: int) -> Iterator[dict[str, str]]:
    """`count` rows of `inputs` and `targets`."""
    pairs = [f" {key} {relation}" for key in KEYS for relation in RELATIONS]
    for _ in range(count):
        known = [pairs[i] for i in rng.choice(len(pairs), FACTS, replace=False)]
        facts = [f"{pair} {VALUES[i]}" for pair, i in zip(known, rng.integers(len(VALUES), size=FACTS), strict=True)]
        asked = rng.choice(FACTS, QUESTIONS, replace=False)
        yield {
            "inputs": "".join([*facts, " which", *(known[i] for i in asked)]),
            "targets": "".join(facts[i] for i in asked),
        }


if __name__ == "__main__":
    run(main)
