"""python -m experiments.docstring_baseline [--limit=500] [--output=FILE]

What a fine-tuned model's docstrings have to beat: the function's name in words. ROUGE F-measures, 0 to 100, of the
baseline on the held-out functions of `docstring`.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from gqa.command_line import parse_arguments, run


def main() -> None:
    from gqa.data.docstrings import copy_the_name
    from gqa.data.tasks import examples
    from gqa.evaluation.text_metrics import rouge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="Python source (left out: embedded_large, the task's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N functions (left out: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the scores as JSON")
    args = parse_arguments(parser)
    found = list(tqdm(examples("docstring", "heldout", source=args.source), unit=" functions", delay=1))[: args.limit]
    baseline = rouge([example.targets for example in found], [copy_the_name(example.inputs) for example in found])
    report = {"functions": len(found), "copy_the_name": {name: round(score, 2) for name, score in baseline.items()}}
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
