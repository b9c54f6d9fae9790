"""A reward model on preferences: how often it is right, overall and by rating, and whether it is as sure as that.

By its ranking loss it says that the chosen response wins with probability σ(r(chosen) - r(rejected)). A calibrated
model is right in 70 % of the pairs of which it is 70 % sure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa.checkpoints import reward
from gqa.data.conversations import RATINGS, cut, last_turn_only, lines, of_line, pair_of
from gqa.data.templates import Template, Unusable
from gqa.data.tokenizer_json import open_vocabulary
from gqa.decode.score import rewards
from gqa.errors import InputError
from gqa.evaluation.checkpoint_text import TextModel

BINS = 10  # of the confidence, from 0.5 to 1
NOT_RATED = "not rated"


class Pair(NamedTuple):
    """Two responses to a prompt, each in tokens with it."""

    chosen: list[int]
    rejected: list[int]
    rating: int  # its place in RATINGS from 1; 0: none


def read_pairs(path: Path, template: Template, max_tokens: int) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of a file, and how many lines were left out for what reason (those that training leaves out).

    Raises `InputError`, with the line's number, for a line that is no preference, and where none is usable.
    """
    pairs, skipped = [], {}
    for number, row in lines(path):
        try:
            with of_line(path, number):
                *both, rating = pair_of(row)
                texts = [cut(template.example(last_turn_only(messages)), max_tokens).tokens for messages in both]
        except Unusable as unusable:
            skipped[unusable.reason] = skipped.get(unusable.reason, 0) + 1
            continue
        pairs.append(Pair(*(tokens.tolist() for tokens in texts), rating))
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise InputError(f"{path} has no usable preferences ({reasons or 'it is empty'})")
    return pairs, skipped


def evaluate(checkpoint: Path, path: Path, template_name: str, batch_size: int) -> dict[str, Any]:
    """What `summary` says of the reward model in `checkpoint` and the preferences of a file.

    Raises `InputError` for a folder that is no reward model's, and as `read_pairs`.
    """
    opened = TextModel(checkpoint)
    if not opened.text.is_decoder:
        raise InputError(f"{checkpoint} is an encoder-decoder; expected a reward model that gqa.train wrote")
    # As in training: a text that spells a special token is text.
    template = Template(template_name, open_vocabulary(opened.text.vocabulary.path, foreign=True))
    if template.num_ids > opened.config.vocab_size:
        raise InputError(
            f"template {template_name} makes {template.num_ids} ids, {checkpoint} has {opened.config.vocab_size}; "
            "expected the template that the reward model was trained with"
        )
    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    model = reward.load(checkpoint, **choices)
    pairs, skipped = read_pairs(path, template, opened.config.max_position)
    scores_2P = rewards(model, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], batch_size)
    margins_P = scores_2P[: len(pairs)] - scores_2P[len(pairs) :]
    return {"checkpoint": str(checkpoint), "left_out": skipped} | summary(margins_P, [pair.rating for pair in pairs])


def summary(margins_P: np.ndarray, ratings_P: Sequence[int]) -> dict[str, Any]:
    """Accuracy overall and by rating, ranking loss in nats, and the calibration of `r(chosen) - r(rejected)`.

    The confidence of a pair is σ(|margin|), at least a half; equal scores are half right. `calibration_error` is the
    expected one (Guo et al. 2017): the mean over pairs of how far the accuracy of their bin is from its confidence.
    """
    margins_P, ratings_P = np.asarray(margins_P, np.float64), np.asarray(ratings_P)
    right_P = 0.5 + np.sign(margins_P) / 2
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    place_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {
            "confidence": float(confidence_P[place_P == place].mean()),
            "accuracy": float(right_P[place_P == place].mean()),
            "pairs": int((place_P == place).sum()),
        }
        for place in np.unique(place_P)
    ]
    names = (NOT_RATED, *RATINGS)
    return {
        "pairs": len(margins_P),
        "accuracy": float(right_P.mean()),
        "by_rating": {
            names[rating]: {
                "accuracy": float(right_P[ratings_P == rating].mean()),
                "pairs": int(sum(ratings_P == rating)),
            }
            for rating in np.unique(ratings_P)
        },
        "loss": float(np.mean(np.logaddexp(0, -margins_P))),
        "calibration_error": sum(bin["pairs"] * abs(bin["accuracy"] - bin["confidence"]) for bin in bins)
        / len(margins_P),
        "calibration": bins,
    }


def table(found: Mapping[str, Any]) -> str:
    """A summary in Markdown."""
    rows = [("all", found["accuracy"], found["pairs"])]
    rows += [(name, each["accuracy"], each["pairs"]) for name, each in found["by_rating"].items()]
    text = ["| pairs | accuracy | number |", "|---|--:|--:|"]
    text += [f"| {name} | {accuracy:.3f} | {count} |" for name, accuracy, count in rows]
    text += ["", f"Ranking loss {found['loss']:.4f} nats, expected calibration error {found['calibration_error']:.3f}."]
    text += [f"Left out: {count} of reason '{reason}'." for reason, count in found["left_out"].items()]
    return "\n".join(text)


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The calibration of each model by name: accuracy against confidence, the area of a point its number of pairs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.4, 4), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], ":", color="grey", label="calibrated")
    for number, (name, one) in enumerate(found.items()):
        color = plt.get_cmap("viridis")(number / max(len(found) - 1, 1) * 0.85)
        x, y, pairs = ([bin[key] for bin in one["calibration"]] for key in ("confidence", "accuracy", "pairs"))
        label = f"{name}, error {one['calibration_error']:.3f}"
        axes.plot(x, y, color=color, linewidth=1)
        axes.scatter(x, y, s=[10 + 200 * count / one["pairs"] for count in pairs], color=color, alpha=0.7, label=label)
    axes.set(xlabel="confidence, σ(|difference of rewards|)", ylabel="share of pairs that it is right in")
    axes.set_ylim(bottom=min(0.45, axes.get_ylim()[0]), top=1.03)
    axes.grid(alpha=0.3)
    legend = axes.legend(fontsize=8, loc="lower right")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([30])
    figure.savefig(path, dpi=130)
    plt.close(figure)
