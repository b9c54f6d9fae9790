"""What a cleaning has read, repaired and dropped, with examples: JSON to compute with, Markdown to read."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from gqa import files
from gqa.data.cleaning import Cleaned, CleaningConfig

_EXAMPLES = 3  # of each filter: the first
_SHOWN = 200  # characters of an example's text


class Report:
    """Counts what becomes of rows; `bad` are those that could not be read."""

    def __init__(self, source: str, config: CleaningConfig, evaluation: Sequence[str]):
        self.source, self.config, self.evaluation = source, config, tuple(evaluation)
        self.evaluation_texts = 0, 0  # of the evaluation sets, and of these too short to be compared
        self.bad = self.kept = self.repaired = 0
        self.characters = self.kept_characters = 0
        self.dropped: Counter = Counter()
        self._dropped_characters: Counter = Counter()
        self._examples: dict[str, list[dict[str, str]]] = {}

    @property
    def read(self) -> int:
        """Rows that could be read."""
        return self.kept + self.dropped.total()

    def counts(self) -> dict:
        """All that has been counted so far, for `add_counts` of another report."""
        names = ("bad", "kept", "repaired", "characters", "kept_characters")
        parts = {"dropped": self.dropped, "dropped_characters": self._dropped_characters, "examples": self._examples}
        return {name: getattr(self, name) for name in names} | {name: dict(part) for name, part in parts.items()}

    def add_counts(self, counts: Mapping) -> None:
        """Adds the `counts` of the rows that follow on these."""
        for name in ("bad", "kept", "repaired", "characters", "kept_characters"):
            setattr(self, name, getattr(self, name) + counts[name])
        self.dropped.update(counts["dropped"])
        self._dropped_characters.update(counts["dropped_characters"])
        for name, examples in counts["examples"].items():
            here = self._examples.setdefault(name, [])
            here += examples[: _EXAMPLES - len(here)]

    def add(self, name: str, cleaned: Cleaned, rejection: tuple[str, str] | None) -> None:
        """Counts a row, where it stands and what became of it."""
        texts = [cleaned.row[role] for role in self.config.roles]
        size = sum(map(len, texts))
        self.characters += size
        if rejection is None:
            self.kept += 1
            self.kept_characters += size
            self.repaired += cleaned.repaired
            return
        filtered, why = rejection
        self.dropped[filtered] += 1
        self._dropped_characters[filtered] += size
        examples = self._examples.setdefault(filtered, [])
        if len(examples) < _EXAMPLES:
            shown = " ⏵ ".join(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…" for text in texts)
            examples.append({"where": name, "why": why, "text": shown})

    def summary(self) -> str:
        """How many rows which filter dropped, in one line."""
        return ", ".join(f"{count} {name}" for name, count in self.dropped.most_common()) or "none"

    def to_json(self) -> dict:
        """All of it; nothing depends on time, machine or number of processes."""
        return {
            "source": Path(self.source).name,
            "evaluation": [Path(path).name for path in self.evaluation],
            "evaluation_texts": dict(zip(("read", "too_short"), self.evaluation_texts, strict=True)),
            "config": dataclasses.asdict(self.config),
            "rows": {"read": self.read, "bad": self.bad, "kept": self.kept, "repaired": self.repaired},
            "characters": {"read": self.characters, "kept": self.kept_characters},
            "dropped": {
                name: {
                    "rows": count,
                    "share": round(count / self.read, 6),
                    "characters": self._dropped_characters[name],
                    "examples": self._examples[name],
                }
                for name, count in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
            },
        }

    def table(self) -> list[str]:
        """A Markdown table of rows by filter."""
        found = self.to_json()
        lines = ["| | rows | share | characters |", "|---|--:|--:|--:|"]
        for name, of in found["dropped"].items():
            lines.append(f"| {name} | {of['rows']:,} | {of['share']:.2%} | {of['characters']:,} |")
        share = self.kept / max(self.read, 1)
        lines.append(f"| **kept** | {self.kept:,} | {share:.2%} | {self.kept_characters:,} |")
        return lines

    def write(self, output: Path) -> None:
        """Writes `NAME.report.json` and `NAME.report.md` beside NAME.jsonl."""
        content = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        files.write_text(output.with_suffix(".report.json"), content, shared=True)
        files.write_text(output.with_suffix(".report.md"), "\n".join(self._markdown()) + "\n", shared=True)

    def _markdown(self) -> list[str]:
        found = self.to_json()
        lines = [f"# Cleaning of {found['source']}", ""]
        lines.append(
            f"{self.read:,} rows read, {self.bad:,} that could not be; {self.kept:,} kept, "
            f"{self.repaired:,} of them repaired."
        )
        if self.evaluation:
            num_texts, num_short = self.evaluation_texts
            lines.append(
                f"Held against the evaluation sets {', '.join(found['evaluation'])}; {num_short:,} of {num_texts:,} "
                f"evaluation texts are shorter than {self.config.contamination.ngram} words and were not compared."
            )
        lines += ["", *self.table()]
        for name, of in found["dropped"].items():
            lines += ["", f"## {name}", ""]
            for example in of["examples"]:
                lines.append(f"- {example['where']}: {example['why']}")
                lines += ["", *_quoted(example), ""]
        return lines


def _quoted(example: Mapping[str, str]) -> list[str]:
    return [f"      {line}" for line in example["text"].replace("\r", "\n").split("\n")]
