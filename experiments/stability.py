"""How steadily runs train (GQA, appendix A): spikes of the training loss, spread of the last held-out loss by seed."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from experiments import sweep
from experiments.scores import TEACHER, compared_share, model_name, reading
from gqa.checkpoints.hf_config import read_json
from gqa.training import metrics

WINDOW = 11  # lines of metrics before a loss that say what is usual
FACTOR = 6.0  # robust standard deviations above that are a spike
SCRATCH, UPTRAINED, TRAINED = "from scratch", "uptrained", "trained"  # of a run of gqa.train it is not known


class Curve(NamedTuple):
    """The losses of one run."""

    model: str  # runs of one model differ in their seed alone
    kind: str  # how it was trained
    seed: int
    steps: np.ndarray
    losses: np.ndarray  # of training batches, at `steps`
    heldout: float | None  # the last one

    @property
    def spikes(self) -> np.ndarray:
        """Where in `steps` the loss jumps up."""
        return spikes(self.losses)

    @property
    def countable(self) -> bool:
        """Whether there are lines enough for a spike to be seen."""
        return len(self.losses) > WINDOW


def spikes(losses: np.ndarray) -> np.ndarray:
    """Indices of the losses that jump up: more than `FACTOR` robust standard deviations above the median of the
    `WINDOW` before them, or no number at all.

    The deviation is that of the window, 1.4826 times the median of |loss - its median|, but no less than windows of the
    run have by their median: a curve that still falls does not hide spikes, nor does chance in few lines make any.
    """
    known = np.isfinite(losses)
    later = np.flatnonzero(known)[np.flatnonzero(known) >= WINDOW]
    windows = [losses[i - WINDOW : i][known[i - WINDOW : i]] for i in later]
    usual = np.array([np.median(window) for window in windows])
    spread = np.array([1.4826 * np.median(np.abs(window - np.median(window))) for window in windows])
    scale = np.maximum(spread, np.median(spread)) if len(later) else spread
    return np.sort(np.concatenate([np.flatnonzero(~known), later[losses[later] - usual > FACTOR * scale]]))


def read(folders: Sequence[Path], heads: Mapping[str, int] = MappingProxyType({})) -> dict[str, list[Curve]]:
    """The runs in `folders`, of gqa.train ("runs") or of sweeps (by teacher, as tasks' losses do not compare): folders
    NAME-s1, NAME-s2 … or NAME-seed1 … hold seeds of NAME.

    Of a sweep those that uptrain for 5 % (else the largest share) from mean pooling, the teacher's, and those trained
    from scratch, which are named as the paper does; `heads` are the teachers'. A run that is in several folders counts
    once; runs of fewer than two seeds are left out.
    """
    found = {(path, path.relative_to(folder).parts) for folder in folders for path in folder.rglob(metrics.JSONL)}
    paths = sorted({path for path, parts in found if not {"checkpoints", "uptrained"} & set(parts)})
    found = list(_runs(path.parent for path in paths))
    shares: dict[str, set[float]] = {}
    for run in found:
        if run.curve.kind == UPTRAINED:
            shares.setdefault(run.teacher, set()).add(run.alpha)
    wanted = {teacher: compared_share(each) for teacher, each in shares.items()}
    runs: dict[tuple[str, int], _Run] = {}
    for run in found:
        if run.curve.kind != UPTRAINED or run.alpha == wanted[run.teacher]:
            runs.setdefault((run.curve.model, run.curve.seed), run)
    models = [model for model, _ in runs]
    kept = [run for run in runs.values() if models.count(run.curve.model) > 1]
    order = [TRAINED, SCRATCH, UPTRAINED]
    kept.sort(key=lambda run: (order.index(run.curve.kind), run.teacher, -run.kv_heads))
    curves: dict[str, list[Curve]] = {}
    for run in kept:
        curves.setdefault(run.teacher or "runs", []).append(run.curve._replace(model=run.name(heads)))
    return curves


class _Run(NamedTuple):
    """A curve and what its sweep says of it."""

    curve: Curve
    teacher: str = ""
    method: str = ""
    kv_heads: int = 0
    alpha: float = 0.0

    def name(self, heads: Mapping[str, int]) -> str:
        """As the paper names it; its folder's where no sweep made it."""
        if not self.teacher:
            return self.curve.model
        model = model_name(self.kv_heads, heads.get(self.teacher, self.kv_heads if self.method == TEACHER else None))
        return f"{model}, {self.curve.kind}"


def _runs(folders: Iterator[Path]) -> Iterator[_Run]:
    for folder in folders:
        name = re.fullmatch(r"(.+?)-(?:s|seed)(\d+)", folder.name)
        if name is None:
            continue
        lines, kind, of_sweep = metrics.read(folder), TRAINED, ()
        if (path := folder / "result.json").exists():
            result = read_json(path)
            with reading(path, "experiments.sweep"):
                if result["method"] not in (TEACHER, "mean", sweep.SCRATCH):
                    continue
                kind = SCRATCH if result["method"] == sweep.SCRATCH else UPTRAINED
                of_sweep = (result["teacher"], result["method"], int(result["kv_heads"]), float(result["alpha"]))
        with reading(folder / metrics.JSONL, "gqa.train"):
            training = [(line["step"], float(line["loss"])) for line in lines if line["split"] == "train"]
            heldout = [float(line["loss"]) for line in lines if line["split"] == "heldout"]
        if training:
            steps, losses = map(np.array, zip(*training, strict=True))
            curve = Curve(name[1], kind, int(name[2]), steps, losses, heldout[-1] if heldout else None)
            yield _Run(curve, *of_sweep)
