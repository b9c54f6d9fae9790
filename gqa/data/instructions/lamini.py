"""LaMini: new instructions in the manner of a few examples, and about given topics (Wu et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from gqa.data.instructions.parts import Candidate, NearCopies, Rejected, Request, Seed, tagged, user
from gqa.errors import InputError

TAG = "example"
EXAMPLES, TOPICS = "examples", "topics"  # methods


@dataclass(frozen=True)
class Lamini:
    """The program and its sizes."""

    calls: int  # of the parent
    shown: int  # seeds in a call (LaMini: 3)
    asked: int  # new instructions in a call (OpenBezoar: 5)
    topics: str | None  # text file, a topic a line, for topic-guided calls; None: example-guided
    topics_shown: int  # topics in a call (LaMini: 3)
    near_copies: NearCopies  # of a seed, which are dropped

    def __post_init__(self):
        for name in ("calls", "shown", "asked", "topics_shown"):
            if getattr(self, name) < 1:
                raise InputError(f"lamini.{name}={getattr(self, name)}; expected at least 1")

    @property
    def per_request(self) -> int:
        """Instructions that a call asks for."""
        return self.asked

    @property
    def writes_instructions(self) -> bool:
        """Instructions are new."""
        return True

    def requests(self, seeds: Sequence[Seed], rng: Random) -> list[Request]:
        """Calls with examples, and topics, drawn at random; `InputError` where there are fewer than a call shows."""
        topics = [] if self.topics is None else _read_topics(self.topics)
        for name, given, count in (("shown", seeds, self.shown), ("topics_shown", topics, self.topics_shown)):
            if len(given) < count and not (name == "topics_shown" and self.topics is None):
                raise InputError(f"lamini.{name}={count} of {len(given)} that there are; expected at most {len(given)}")
        made = []
        for _ in range(self.calls):
            chosen = tuple(rng.sample(seeds, self.shown))
            about = rng.sample(topics, self.topics_shown) if topics else []
            made.append(Request(chosen, TOPICS if topics else EXAMPLES, [user(self._text(chosen, about))]))
        return made

    def _text(self, seeds: Sequence[Seed], topics: Sequence[str]) -> str:
        shown = "\n".join(f"<{TAG}>{seed.text}</{TAG}>" for seed in seeds)
        about = f" Each of them is about one of these topics: {', '.join(topics)}." if topics else ""
        return (
            f"Here are instructions that people gave to an assistant, each between <{TAG}> and </{TAG}>.\n\n{shown}\n\n"
            f"Write {self.asked} new instructions in the same manner, each between <{TAG}> and </{TAG}>.{about} They "
            "ask for different things, in different words and lengths, and each can be understood by itself. Do not "
            "carry them out."
        )

    def parse(self, request: Request, text: str) -> list[Candidate | Rejected]:
        """The instructions between tags."""
        found: list[Candidate | Rejected] = []
        candidates = 0
        for inner in tagged(text, TAG):
            if isinstance(inner, Rejected):
                found.append(inner)
            elif candidates == self.asked:
                found.append(Rejected("more than asked for"))
            else:
                candidates += 1
                found.append(Candidate(request, [user(inner)], [user(inner)], None))
        return found

    def refusal(self, candidate: Candidate, response: str) -> str | None:
        """None: the judge decides."""
        return None


def _read_topics(path: str) -> list[str]:
    if not Path(path).is_file():
        raise InputError(f"lamini.topics={path} is not a file; expected text, a topic a line")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"lamini.topics={path}: byte {error.start + 1} is no UTF-8") from None
    topics = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not topics:
        raise InputError(f"lamini.topics={path} is empty; expected text, a topic a line")
    return topics
