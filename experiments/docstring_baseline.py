"""python -m experiments.docstring_baseline [--limit=500] [--scores=FILE …] [--output=FILE]

What a fine-tuned model's docstrings have to beat: the function's name in words. ROUGE F-measures, 0 to 100, of the
baseline on the held-out functions of `docstring`; beside it those of models, from the scores.json that
`python -m gqa.evaluate --task_file` has written for the same functions.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from gqa.command_line import parse_arguments, run
from gqa.errors import InputError

TASK = "docstring"


def main() -> None:
    """The command line."""
    from experiments.measure import commit, write_json
    from gqa.data.docstrings import copy_the_name
    from gqa.data.tasks import examples
    from gqa.evaluation.text_metrics import rouge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="Python source (left out: embedded_large, the task's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N functions (left out: all)")
    parser.add_argument(
        "--scores",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="scores.json of models; may be repeated",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the scores as JSON")
    args = parse_arguments(parser)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit={args.limit} is below 1; expected 1 or more")
    scored = [(path, *of_models(path)) for path in args.scores]
    found = list(tqdm(examples(TASK, "heldout", source=args.source), unit=" functions", delay=1))[: args.limit]
    for path, rows, _ in scored:
        if rows != len(found):
            raise InputError(f"{path} is of {rows} functions, the baseline of {len(found)}; expected --limit={rows}")
    baseline = rouge([example.targets for example in found], [copy_the_name(example.inputs) for example in found])
    report = {
        "functions": len(found),
        "copy_the_name": {name: round(score, 2) for name, score in baseline.items()},
        "models": [model for _, _, models in scored for model in models],
        "command": " ".join(["python -m experiments.docstring_baseline", *sys.argv[1:]]),
        "commit": commit(),
    }
    print(table(report))
    if args.output:
        write_json(args.output, report)


def of_models(path: Path) -> tuple[int, list[dict]]:
    """Number of functions and the models of a scores.json; raises `InputError` for a file without their ROUGE."""
    from gqa.checkpoints.hf_config import read_json

    content = read_json(path)
    try:
        models = [
            {"model": name, "path": model["path"], "scores": model["scores"][TASK], "beam": content["settings"]["beam"]}
            for name, model in content["checkpoints"].items()
        ]
        if all("rouge1" in model["scores"] for model in models):
            return content["rows"][TASK], models
    except (KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} has no scores of {TASK}; expected those of --task_file={TASK}.jsonl --metrics=rouge")


def table(report: dict) -> str:
    """The report as Markdown."""
    names = list(report["copy_the_name"])
    lines = [f"| {report['functions']} held-out functions | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    lines.append("| the function's name in words | " + " | ".join(map(str, report["copy_the_name"].values())) + " |")
    for model in report["models"]:
        scores = [model["scores"][name] for name in names]
        cells = [f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" for score in scores]
        how = "greedy" if model["beam"] == 1 else f"beam of {model['beam']}"
        lines.append(f"| {model['model']}, {how} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
