"""How steadily runs train (GQA, appendix A): spikes of the training loss, spread of the last held-out loss by seed."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.scores import reading
from gqa.checkpoints.hf_config import read_json
from gqa.training import metrics

WINDOW = 11  # lines of metrics before a loss that say what is usual
FACTOR = 6.0  # robust standard deviations above that are a spike


class Curve(NamedTuple):
    """The losses of one run."""

    model: str  # runs of one model differ in their seed alone
    seed: int
    steps: np.ndarray
    losses: np.ndarray  # of training batches, at `steps`
    heldout: float | None  # the last one

    @property
    def spikes(self) -> np.ndarray:
        """Where in `steps` the loss jumps up."""
        return spikes(self.losses)


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


def read(folders: Sequence[Path], alpha: float | None) -> list[Curve]:
    """The runs in `folders`, of gqa.train or of a sweep: folders NAME-s1, NAME-s2 … or NAME-seed1 … hold seeds of NAME.

    Of a sweep those that uptrain for `alpha` (None: the largest) from mean pooling, the teacher's, and those trained
    from scratch. A run that is in several folders counts once; runs of fewer than two seeds are left out.
    """
    found = {(path, path.relative_to(folder).parts) for folder in folders for path in folder.rglob(metrics.JSONL)}
    paths = sorted({path for path, parts in found if not {"checkpoints", "uptrained"} & set(parts)})
    found = list(_curves(path.parent for path in paths))
    shares = {share for _, share in found if share is not None}
    wanted = max(shares, default=None) if alpha is None else alpha
    curves: dict[tuple[str, int], Curve] = {}
    for curve, share in found:
        if share in (None, wanted):
            curves.setdefault((curve.model, curve.seed), curve)
    models = [model for model, _ in curves]
    return [curve for curve in curves.values() if models.count(curve.model) > 1]


def _curves(runs: Iterator[Path]) -> Iterator[tuple[Curve, float | None]]:
    """Each run and its α, None where it does not uptrain."""
    for run in runs:
        name, lines, alpha = re.fullmatch(r"(.+?)-(?:s|seed)(\d+)", run.name), metrics.read(run), None
        if name is None:
            continue
        if (path := run / "result.json").exists():
            result = read_json(path)
            with reading(path, "experiments.sweep"):
                if result["method"] not in ("none", "mean", "scratch"):
                    continue
                alpha = float(result["alpha"]) if result["method"] != "scratch" else None
        with reading(run / metrics.JSONL, "gqa.train"):
            training = [(line["step"], float(line["loss"])) for line in lines if line["split"] == "train"]
            heldout = [float(line["loss"]) for line in lines if line["split"] == "heldout"]
        if training:
            steps, losses = map(np.array, zip(*training, strict=True))
            yield Curve(name[1], int(name[2]), steps, losses, heldout[-1] if heldout else None), alpha
