"""What became of generated instructions: counts by step and reason, lengths in tokens (OpenBezoar table 4)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gqa import files
from gqa.data.instructions.pipeline import Answered, Outcome
from gqa.data.vocabulary import Vocabulary
from gqa.posttraining.config import InstructionsConfig

REFUSED, UNREAD = "refused by the judge", "too long for the judge"
LENGTHS = ("mean", "median", "longest")


class Report:
    """A run's statistics.

    Args:
      config: of the run.
      outcome: what the program came to.
      scores: the judge's, one for each conversation; `None`: it could not read so much.
      vocabulary: that lengths are counted in.
    """

    def __init__(
        self, config: InstructionsConfig, outcome: Outcome, scores: Sequence[float | None], vocabulary: Vocabulary
    ):
        judged = list(zip(outcome.answered, scores, strict=True))
        threshold = config.judge.threshold
        self.accepted: list[tuple[Answered, float]] = [
            (answered, score) for answered, score in judged if score is not None and score >= threshold
        ]
        unread = sum(score is None for score in scores)
        refused = len(judged) - unread - len(self.accepted)
        reasons = [*outcome.rejected.items(), (REFUSED, refused), (UNREAD, unread)]
        self.rejected = {reason: count for reason, count in reasons if count}
        self.content = {
            "program": config.program_name,
            "parent": config.parent,
            "judge": config.judge.checkpoint,
            "threshold": threshold,
            "requests": outcome.requests,
            "instructions": outcome.instructions,
            "candidates": outcome.candidates,
            "judged": len(judged),
            "accepted": len(self.accepted),
            "accepted_share": len(self.accepted) / len(judged) if judged else None,
            "rejected": self.rejected,
            "tokens": {
                name: _lengths([len(vocabulary.encode(answered.messages[place]["content"])) for answered, _ in judged])
                for name, place in (("instruction", -2), ("response", -1))
            },
            "accepted_tokens": {
                name: _lengths(
                    [len(vocabulary.encode(answered.messages[place]["content"])) for answered, _ in self.accepted]
                )
                for name, place in (("instruction", -2), ("response", -1))
            },
        }

    def summary(self) -> str:
        """The reasons and their counts, the most frequent first."""
        ordered = sorted(self.rejected.items(), key=lambda item: -item[1])
        return ", ".join(f"{count} {reason}" for reason, count in ordered) or "there was nothing to judge"

    def table(self) -> str:
        """The statistics in Markdown: a row that stands below those of other programs, then the reasons."""
        found = self.content
        share = "" if found["accepted_share"] is None else f"{found['accepted_share']:.1%}"
        cells = [found["program"], *(found[name] for name in ("requests", "instructions", "candidates", "judged"))]
        cells += [found["accepted"], share]
        heads = ["program", "requests", "instructions", "after filters", "judged", "accepted", "of judged"]
        for name, lengths in found["accepted_tokens"].items():
            heads.append(f"tokens, {name}: {' / '.join(LENGTHS)}")
            cells.append("" if lengths is None else " / ".join(f"{lengths[each]:.0f}" for each in LENGTHS))
        lines = [heads, ["---", *["--:"] * (len(heads) - 1)], cells]
        text = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
        if self.rejected:
            text += "\n| rejected because | |\n|---|--:|\n"
            text += "".join(f"| {reason} | {count} |\n" for reason, count in self.rejected.items())
        return text

    def write(self, output: Path) -> None:
        """Writes the statistics beside `output`: .json, .md and .png."""
        content = json.dumps(self.content, indent=2, ensure_ascii=False) + "\n"
        files.write_text(output.with_suffix(".json"), content)
        files.write_text(output.with_suffix(".md"), self.table())
        with files.whole(output.with_suffix(".png")) as picture:
            self._draw(picture)

    def _draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        bars = {**self.rejected, "accepted": len(self.accepted)}
        figure, axes = plt.subplots(figsize=(7, 0.8 + 0.32 * len(bars)), layout="constrained")
        colors = ["#b0b0b0"] * len(self.rejected) + ["#2a788e"]
        drawn = axes.barh(list(bars), list(bars.values()), color=colors)
        axes.bar_label(drawn, padding=3)
        axes.invert_yaxis()  # the first reason on top
        axes.margins(x=0.1)
        axes.set_title(f"{self.content['program']}: what became of it", fontsize=10)
        axes.set_xlabel("instructions and answers of the parent")
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def _lengths(counts: Sequence[int]) -> dict[str, float] | None:
    if not counts:
        return None
    return {"mean": float(np.mean(counts)), "median": float(np.median(counts)), "longest": float(max(counts))}
