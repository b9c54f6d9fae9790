"""python -m experiments.docstring_baseline [--limit=500] [--output=FILE]

What a fine-tuned model's docstrings have to beat: the function's name in words. ROUGE F-measures, 0 to 100, of the
baseline on the held-out functions of `docstring`.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from gqa.command_line import parse_arguments, run
from gqa.errors import InputError

ROUGE = ("rouge1", "rouge2", "rougeLsum")


def scores(answers, predictions) -> dict[str, float]:
    """Means of ROUGE F-measures, without stemming, as T5 was evaluated (Raffel et al. 2020)."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise InputError(f"ROUGE needs rouge-score ({error}): pip install 'gqa[data]'") from error
    scorer = rouge_scorer.RougeScorer(ROUGE)
    totals = dict.fromkeys(ROUGE, 0.0)
    for answer, prediction in zip(answers, predictions, strict=True):
        for name, score in scorer.score(answer, prediction).items():
            totals[name] += 100 * score.fmeasure
    return {name: total / len(answers) for name, total in totals.items()}


def main() -> None:
    from gqa.data.docstrings import copy_the_name
    from gqa.data.tasks import examples

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="Python source (left out: embedded_large, the task's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N functions (left out: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the scores as JSON")
    args = parse_arguments(parser)
    found = list(tqdm(examples("docstring", "heldout", source=args.source), unit=" functions", delay=1))[: args.limit]
    baseline = scores([example.targets for example in found], [copy_the_name(example.inputs) for example in found])
    report = {"functions": len(found), "copy_the_name": {name: round(score, 2) for name, score in baseline.items()}}
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
