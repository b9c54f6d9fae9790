"""Scores of converted models as one tidy list, whichever experiment measured them."""

import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from experiments.sweep import AXES, SCRATCH
from gqa.checkpoints.hf_config import read_json
from gqa.errors import InputError

TEACHER = "none"  # the method of the teacher itself, as in a sweep's table
SHIPPED_HEADS = 8  # of assets/teacher, which experiments.uptrain_full uptrains
NOT_SCORES = ("seconds", "target_tokens")
LABELS = {
    "loss": "held-out loss, nats a token (lower is better)",
    "accuracy": "held-out accuracy, share of tokens (higher is better)",
}


class Score(NamedTuple):
    """What one run scored."""

    teacher: str
    method: str
    kv_heads: int
    alpha: float
    seed: int
    values: Mapping[str, float]  # loss, accuracy, …


class Results(NamedTuple):
    """The scores of one file of results, all of the same held-out text."""

    name: str  # for the files of its figures
    scores: Sequence[Score]
    heads: Mapping[str, int] = MappingProxyType({})  # key/value heads of the teachers that are known to have so many
    query_heads: Mapping[str, int] = MappingProxyType({})  # the same

    def of(self, teacher: str) -> "Results":
        """Those of one teacher."""
        return self._replace(scores=[score for score in self.scores if score.teacher == teacher])

    def model(self, method: str, kv_heads: int) -> str:
        """Of one teacher's results, as the paper names it: MHA, GQA-8, MQA.

        A teacher is MHA unless it is known to have more query heads.
        """
        own = kv_heads if method == TEACHER else None
        return model_name(kv_heads, (self.heads | self.query_heads).get(self.teachers[0], own))

    @property
    def teacher_name(self) -> str:
        """What the teacher of one teacher's results is."""
        own = next((score.kv_heads for score in self.scores if score.method == TEACHER), 0)
        return self.model(TEACHER, own) if own else "MHA"

    @property
    def teachers(self) -> list[str]:
        """In their order in the file."""
        return list(dict.fromkeys(score.teacher for score in self.scores))

    @property
    def names(self) -> list[str]:
        """Of the scores that every run has."""
        return [name for name in self.scores[0].values if all(name in score.values for score in self.scores)]

    def cells(self, name: str) -> dict[tuple[str, int, float], np.ndarray]:
        """`{(method, kv_heads, alpha): the score of each seed}` of one teacher's results."""
        found: dict[tuple[str, int, float], list[float]] = {}
        for score in self.scores:
            found.setdefault((score.method, score.kv_heads, score.alpha), []).append(score.values[name])
        return {key: np.array(values) for key, values in found.items()}

    @property
    def alpha(self) -> float | None:
        """The share of uptraining that models are compared at; None without any. Training from scratch is no share."""
        uptrained = [score.alpha for score in self.scores if score.method != SCRATCH]
        return compared_share(uptrained) or compared_share(score.alpha for score in self.scores)

    def compared(self) -> list[tuple[str, int, float]]:
        """Of one teacher's cells, those of GQA's Table 1: the teacher as it is and uptrained, conversions uptrained,
        models that were trained from scratch.
        """
        keys = dict.fromkeys((score.method, score.kv_heads, score.alpha) for score in self.scores)
        return [key for key in keys if key[2] == self.alpha or key[0] == SCRATCH or (key[0] == TEACHER and key[2] == 0)]

    def without_scratch(self) -> "Results":
        """The teacher and its conversions."""
        return self._replace(scores=[score for score in self.scores if score.method != SCRATCH])


def compared_share(shares: Iterable[float]) -> float | None:
    """The share of uptraining that models are compared at: 5 % as in the paper, else the most; None if all are 0."""
    shares = {share for share in shares if share > 0}
    return 0.05 if 0.05 in shares else max(shares, default=None)


def model_name(kv_heads: int, heads: int | None = None) -> str:
    """Of so many key/value heads; without the number of heads none is MHA."""
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else f"GQA-{kv_heads}"


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """The mean over seeds and the standard deviation of a sample, 0 of a single one."""
    with np.errstate(invalid="ignore"):  # of a loss that is infinite the spread is no number
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def size_name(config: Mapping[str, Any], folder: str | None = None) -> str:
    """What `experiments.timing` or `throughput` measured: the size, and its folder: one may be measured twice."""
    size = config["size"] + (", changed" if config["changes"] else "")
    return size if folder in (None, size) else f"{folder} ({size})"


def label(name: str) -> str:
    """A score's axis label."""
    task, _, metric = name.rpartition(" ")
    return LABELS.get(name) or (f"{task}, {LABELS['loss']}" if metric == "loss" else name.replace(" rouge", " ROUGE-"))


def is_of_task(name: str) -> bool:
    """Whether a score is one of a task: sweeps name them "TASK METRIC"."""
    return " " in name


def read(path: Path) -> Results | None:
    """The scores in a JSON file of `experiments.sweep`, `conversion_methods` or `uptrain_full`; None of any other.

    Raises `InputError` for one that only begins like theirs.
    """
    content = read_json(path)
    folder = path.parent.name
    if "sites" in _first(content.get("runs")):
        with reading(path, "experiments.conversion_methods"):
            return _known(f"{folder}_{path.stem}", of_conversions(content, path.stem))
    if "teacher" in _first(content.get("runs")):
        with reading(path, "experiments.sweep"):
            _check_text(path, content["runs"])
            return _known(folder, [of_sweep(run) for run in content["runs"]], path.with_name("sweep.json"))
    if "loss_mean" in _first(content.get("rows")):
        with reading(path, "experiments.uptrain_full"):
            return _known(folder, of_uptrain_full(content))
    return None


def share_heads(found: Sequence[Results]) -> list[Results]:
    """`found`, with the heads of teachers that others of them know: a teacher of one name is one model."""
    heads, query_heads = {}, {}
    for results in found:
        heads |= results.heads
        query_heads |= results.query_heads
    return [results._replace(heads=heads | results.heads, query_heads=query_heads) for results in found]


def _known(name: str, scores: Sequence[Score], settings: Path | None = None) -> Results:
    """With the heads of the teachers that are among the scores, unconverted, or in the `settings` of a sweep.

    The most key/value heads of others say nothing: T5-XXL's GQA-8 and MQA are no MHA.
    """
    for score, count in collections.Counter(score[:5] for score in scores).items():
        if count > 1:
            axes = ", ".join(f"{axis}={value}" for axis, value in zip(AXES, score, strict=True))
            raise InputError(f"{name}: {count} results of one run ({axes}); expected one: seeds are other runs")
    own = {score.teacher: score.kv_heads for score in scores if score.method == TEACHER}
    heads, query_heads = _settings(settings) if settings and settings.exists() else ({}, {})
    return Results(name, scores, heads | own, query_heads)


def _check_text(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Raises `InputError` where runs of a teacher were scored on held-out texts of different lengths."""
    texts: dict[str, set[float]] = {}
    for run in runs:
        texts.setdefault(run["teacher"], set()).add(run.get("target_tokens"))
    for teacher, found in texts.items():
        if len(found) > 1:
            tokens = ", ".join(map(str, sorted(found, key=str)))
            raise InputError(f"{path}: runs of {teacher} are scored on {tokens} tokens; expected one held-out text")


def _settings(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The key/value and the query heads of a sweep's teachers, of the sweep.json that it puts beside its results."""
    with reading(path, "experiments.sweep"):
        split = [(*name.partition(".")[::2], value) for name, value in read_json(path).items()]
        heads = {name: int(teacher["kv_heads"]) for kind, name, teacher in split if kind == "teachers"}
        return heads, {name: int(number) for kind, name, number in split if kind == "query_heads"}


@contextlib.contextmanager
def reading(path: Path, experiment: str) -> Iterator[None]:
    """Whatever fails in the block because `path` has another content than `experiment` writes is one `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no result of {experiment}; expected one, or a folder without it") from error


def _first(entries: Any) -> Mapping[str, Any]:
    """The first of a list of objects; an empty one where there is none."""
    return entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}


def of_sweep(run: Mapping[str, Any]) -> Score:
    """A run of `experiments.sweep`: every number beside its axes is a score."""
    values = {
        name: float(value)
        for name, value in run.items()
        if name not in AXES + NOT_SCORES and isinstance(value, int | float)
    }
    return _score(*(run[name] for name in AXES), values)


def of_conversions(content: Mapping[str, Any], teacher: str) -> list[Score]:
    """Runs of `experiments.conversion_methods` that convert all of the family's sites."""
    sites = content["runs"][0]["sites"]
    return [
        _score(
            teacher,
            TEACHER if run["method"] == "teacher" else run["method"],
            run["kv_heads"],
            run["alpha"],
            run["seed"],
            {"loss": float(run["loss"])},
        )
        for run in content["runs"]
        if run["sites"] == sites
    ]


def of_uptrain_full(content: Mapping[str, Any]) -> list[Score]:
    """Rows of `experiments.uptrain_full`, each seed apart."""
    found = []
    for row in content["rows"]:
        kv_heads = {"MHA": SHIPPED_HEADS, "MQA": 1}.get(row["model"]) or int(row["model"].removeprefix("GQA-"))
        method, alpha = TEACHER if row["model"] == "MHA" else "mean", content["alpha"] if row["uptrained"] else 0.0
        losses = map(float, row.get("losses", [row["loss_mean"]]))
        found += [_score("t5", method, kv_heads, alpha, seed, {"loss": loss}) for seed, loss in enumerate(losses, 1)]
    return found


def _score(teacher: str, method: str, kv_heads: int, alpha: float, seed: int, values: Mapping[str, float]) -> Score:
    """Raises `ValueError` or `TypeError` for what is no number."""
    return Score(str(teacher), str(method), int(kv_heads), float(alpha), int(seed), values)
