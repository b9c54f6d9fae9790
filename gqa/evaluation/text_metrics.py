"""Scores of generated text, 0 to 100: ROUGE, BLEU, exact match and F1, each with a bootstrap confidence interval.

Settings are those of T5's own evaluation (Raffel et al. 2020), which GQA's Table 1 continues: ROUGE F-measures without
stemming, a new sentence after " . "; BLEU on sacrebleu's international tokens; answers by TriviaQA's normalisation. One
difference: ROUGE is the mean over rows, T5's the median of resampled means, which are drawn anew each time.
"""

import collections
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gqa.errors import InputError, nearest

ROUGE = ("rouge1", "rouge2", "rougeLsum")
_MAX_NGRAM = 4  # of BLEU


class Metric(NamedTuple):
    """A score of a corpus that is a function of sums over its rows."""

    statistics: Callable[[Sequence[str], str], Sequence[float]]  # of a row's right answers and its prediction
    scores: Callable[[np.ndarray, int], dict[str, float]]  # of the sums and the number of rows
    headline: str  # the score that stands in tables


class Interval(NamedTuple):
    """A score and where it lies in 95 % of resampled corpora."""

    value: float
    low: float
    high: float


def evaluate(
    name: str, targets: Sequence[str | Sequence[str]], predictions: Sequence[str], *, samples: int, seed: int
) -> dict[str, Interval]:
    """The scores of the metric `name` by score, with intervals from `samples` resampled corpora.

    Args:
      name: one of `METRICS`.
      targets: the right answer of each row, or all of them.
      predictions: as many.
      samples: of the bootstrap; the same corpus and seed give the same intervals.
      seed: of the bootstrap.

    Raises `InputError` for an unknown metric, none or unequal numbers of rows, and rows without a right answer.
    """
    metric = find(name)
    if len(targets) != len(predictions) or not len(targets):
        raise InputError(f"{len(targets)} targets and {len(predictions)} predictions; expected as many of each, not 0")
    answers = [[target] if isinstance(target, str) else list(target) for target in targets]
    if [] in answers:
        raise InputError(f"row {answers.index([]) + 1} has no right answer; expected at least one")
    rows = np.array([metric.statistics(*row) for row in zip(answers, predictions, strict=True)], np.float64)
    values = metric.scores(rows.sum(0), len(rows))
    rng = np.random.default_rng(seed)
    drawn = [metric.scores(rows[rng.integers(len(rows), size=len(rows))].sum(0), len(rows)) for _ in range(samples)]
    intervals = {}
    for score, value in values.items():
        low, high = np.percentile([other[score] for other in drawn] or [value], [2.5, 97.5])
        intervals[score] = Interval(value, float(low), float(high))
    return intervals


def rouge(targets: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L over sentences, by the answer that each finds nearest."""
    return _values("rouge", targets, predictions)


def bleu(targets: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """BLEU of the corpus, by sacrebleu."""
    return _values("bleu", targets, predictions)


def trivia_qa(targets: Sequence[str | Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Mean F1 over words and share of exact matches, each by the right answer nearest to the prediction."""
    return _values("trivia_qa", targets, predictions)


def find(name: str) -> Metric:
    """The metric of that name; `InputError` with the nearest for an unknown one."""
    if name not in METRICS:
        raise InputError(f"metric {name!r} is unknown; expected one of {', '.join(METRICS)}; {_nearest(name)}")
    return METRICS[name]


def check(name: str) -> None:
    """Raises `InputError` for an unknown metric and for one whose package is not installed."""
    find(name).statistics([""], "")  # imports it


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words: TriviaQA's `normalize_answer`."""
    text = "".join(" " if character in _PUNCTUATION else character for character in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _nearest(name: str) -> str:
    return f"nearest: {nearest(name, METRICS)}"


def _values(name: str, targets, predictions) -> dict[str, float]:
    intervals = evaluate(name, targets, predictions, samples=0, seed=0)
    return {score: interval.value for score, interval in intervals.items()}


def _means(names: Sequence[str]) -> Callable[[np.ndarray, int], dict[str, float]]:
    return lambda sums, count: {name: float(100 * total / count) for name, total in zip(names, sums, strict=True)}


@functools.cache
def _rouge_scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise InputError("ROUGE needs the package rouge-score: pip install -e '.[eval]'") from None
    return RougeScorer(ROUGE)


def _rouge_statistics(answers: Sequence[str], prediction: str) -> list[float]:
    sentences = lambda text: text.replace(" . ", " .\n")  # noqa: E731
    found = _rouge_scorer().score_multi([sentences(answer) for answer in answers], sentences(prediction))
    return [found[name].fmeasure for name in ROUGE]


@functools.cache
def _sacrebleu():
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError:
        raise InputError("BLEU needs the package sacrebleu: pip install -e '.[eval]'") from None
    return BLEU(tokenize="intl", smooth_method="exp", max_ngram_order=_MAX_NGRAM)


def _bleu_statistics(answers: Sequence[str], prediction: str) -> list[float]:
    found = _sacrebleu().corpus_score([prediction], [[answer] for answer in answers])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def _bleu_scores(sums: np.ndarray, count: int) -> dict[str, float]:
    sys_len, ref_len, *ngrams = (int(number) for number in sums)
    found = _sacrebleu().compute_bleu(
        ngrams[:_MAX_NGRAM], ngrams[_MAX_NGRAM:], sys_len, ref_len, smooth_method="exp", max_ngram_order=_MAX_NGRAM
    )
    return {"bleu": float(found.score)}


# The characters that the official evaluation adds to ASCII's; it replaces the underscore first, with the same result.
_PUNCTUATION = frozenset(string.punctuation + "‘’´`")


def _trivia_qa_statistics(answers: Sequence[str], prediction: str) -> list[float]:
    found = normalized_answer(prediction)
    right = [normalized_answer(answer) for answer in answers]
    return [max(_f1(answer.split(), found.split()) for answer in right), float(found in right)]


def _f1(answer: Sequence[str], prediction: Sequence[str]) -> float:
    common = sum((collections.Counter(answer) & collections.Counter(prediction)).values())
    return 2 * common / (len(answer) + len(prediction)) if common else 0.0


METRICS: Mapping[str, Metric] = {
    "rouge": Metric(_rouge_statistics, _means(ROUGE), "rouge1"),
    "bleu": Metric(_bleu_statistics, _bleu_scores, "bleu"),
    "trivia_qa": Metric(_trivia_qa_statistics, _means(("f1", "exact_match")), "f1"),
}
