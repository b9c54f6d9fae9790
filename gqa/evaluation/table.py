"""Scores of several checkpoints beside each other: GQA's Table 1, averages over seeds, the best step of a run."""

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from gqa.errors import InputError
from gqa.evaluation import text_metrics

# Task -> its column and its metric, in the table's order (GQA, Table 1).
TABLE_1 = {
    "cnn_dailymail": ("CNN R1", "rouge"),
    "arxiv": ("arXiv R1", "rouge"),
    "pubmed": ("PubMed R1", "rouge"),
    "media_sum": ("MediaSum R1", "rouge"),
    "multi_news": ("Multi-News R1", "rouge"),
    "wmt14_en_de": ("WMT BLEU", "bleu"),
    "trivia_qa": ("TriviaQA F1", "trivia_qa"),
}

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # task -> score -> its value and interval


def headlines(scores: Scores, metrics: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Each task's score for the table, that of its first metric, in the table's order."""
    ordered = sorted(scores, key=lambda task: list(TABLE_1).index(task) if task in TABLE_1 else len(TABLE_1))
    return {task: scores[task][text_metrics.find(metrics[task][0]).headline]["value"] for task in ordered}


def average(row: Mapping[str, float]) -> float:
    """The table's first column: the mean over tasks."""
    return statistics.fmean(row.values())


def mean_and_spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`{name: {mean, spread}}` over rows of the same names; the spread is the standard deviation of a sample."""
    return {
        name: {
            "mean": statistics.fmean(row[name] for row in rows),
            "spread": statistics.stdev(row[name] for row in rows) if len(rows) > 1 else 0.0,
        }
        for name in rows[0]
    }


def table(rows: Mapping[str, Mapping[str, float]], metrics: Mapping[str, Sequence[str]], averaged: bool) -> str:
    """Markdown of headlines by checkpoint, laid out as GQA's Table 1 without the time, and their average."""
    tasks = list(next(iter(rows.values())))
    names = ["avg", *(_column(task, metrics[task][0]) for task in tasks)]
    lines = [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    full = {name: {"avg": average(row), **row} for name, row in rows.items()}
    for name, row in full.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in row.values())} |")
    if averaged and len(rows) > 1:
        cells = [f"{both['mean']:.1f} ± {both['spread']:.1f}" for both in mean_and_spread(list(full.values())).values()]
        lines.append(f"| mean of {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def labels(paths: Sequence[Path]) -> list[str]:
    """A short name for each folder that no other one has; `InputError` for a folder that is there twice."""
    parts = [Path(os.path.abspath(path)).parts[1:] or ("root",) for path in paths]  # without ".."
    if len(set(parts)) < len(parts):
        twice = next(path for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1)
        raise InputError(f"checkpoint {twice} is named twice; expected different ones")
    counts = range(1, max(map(len, parts)) + 1)
    shorts = (["_".join(part[-count:]) for part in parts] for count in counts)
    return next(short for short in shorts if len(set(short)) == len(short))


def _column(task: str, metric: str) -> str:
    column, usual = TABLE_1.get(task, (None, None))
    return column if metric == usual else f"{task} {text_metrics.find(metric).headline}"
