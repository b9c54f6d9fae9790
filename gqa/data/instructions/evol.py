"""Evol-Instruct: instructions made harder, or others like them, and evolutions that failed (Xu et al. 2023 §3.2)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from gqa.data.instructions.parts import Candidate, NearCopies, Rejected, Request, Seed, plain, tagged, user
from gqa.errors import InputError

TAG, GIVEN = "prompt", "given"
BREADTH = "breadth"
# In depth, what is done to the seed.
DEPTH = {
    "constraints": "add one more condition that the answer has to meet",
    "deepening": "where it asks about a matter, ask about it more deeply and more broadly",
    "concretising": "replace general notions by more specific ones",
    "reasoning": "where a few simple thoughts would do, ask for reasoning in several steps",
}
METHODS = (*DEPTH, BREADTH)
# Words of the request, which an evolution that copies from it contains.
NAMED = ("given prompt", "rewritten prompt", "created prompt", "new prompt", f"<{GIVEN}>", f"</{GIVEN}>")
DECLINED, SHORT = "sorry", 80  # a shorter response, in words, with this word declines
STOP_WORDS = frozenset(
    "a about after all also am an and any are as at be because been before being but by can could did do does doing "
    "for from had has have having he her here hers him his how i if in into is it its just me more most my nor not "
    "of off on once only or other our out over own same she should so some such than that the their them then there "
    "these they this those through to too under until up very was we were what when where which while who whom why "
    "will with would you your".split()
)


@dataclass(frozen=True)
class Evol:
    """The program; its output as seeds is the next round of evolution."""

    methods: int  # of the five, drawn at random for every seed, a call each
    near_copies: NearCopies  # of a seed, which are dropped

    def __post_init__(self):
        if not 1 <= self.methods <= len(METHODS):
            raise InputError(f"evol.methods={self.methods}; expected 1 to {len(METHODS)}: {', '.join(METHODS)}")

    @property
    def per_request(self) -> int:
        """A prompt a call."""
        return 1

    @property
    def writes_instructions(self) -> bool:
        """Instructions are new."""
        return True

    def requests(self, seeds: Sequence[Seed], rng: Random) -> list[Request]:
        """Every seed by as many methods as asked for, drawn at random."""
        return [
            Request((seed,), method, [user(_text(seed, method))])
            for seed in seeds
            for method in rng.sample(METHODS, self.methods)
        ]

    def parse(self, request: Request, text: str) -> list[Candidate | Rejected]:
        """The prompt between tags, unless it is the seed or names the request it was made for."""
        found = list(tagged(text, TAG))
        if len(found) > 1 and not isinstance(found[0], Rejected):
            return [Rejected(f"several <{TAG}>")]
        (inner, *_), (seed,) = found, request.seeds
        if isinstance(inner, Rejected):
            return [inner]
        if plain(inner) == plain(seed.text):
            return [Rejected("equal to its seed")]
        if any(words in plain(inner) for words in NAMED):
            return [Rejected("names its request")]
        return [Candidate(request, [user(inner)], [user(inner)], [user(_same(seed.text, inner))])]

    def refusal(self, candidate: Candidate, response: str) -> str | None:
        """Whether the response shows that the evolved prompt cannot be answered."""
        words = re.findall(r"\w+", response.lower())
        if DECLINED in words and len(words) < SHORT:
            return "declined"
        if all(word in STOP_WORDS for word in words):
            return "says nothing"
        return None


def _text(seed: Seed, method: str) -> str:
    head = f"Between <{GIVEN}> and </{GIVEN}> is a prompt that a person wrote for an assistant.\n\n"
    given = f"<{GIVEN}>\n{seed.text}\n</{GIVEN}>\n\n"
    if method == BREADTH:
        task = (
            "Take it as inspiration for another prompt: of the same field, about something rarer, of about the same "
            "length and difficulty."
        )
    else:
        task = (
            f"Rewrite it so that it is somewhat harder to answer: {DEPTH[method]}. Leave out nothing that it contains, "
            "such as tables, code or text to work on, and add no more than 10 to 20 words."
        )
    tail = (
        f" A person has to understand it and be able to answer it. Write it between <{TAG}> and </{TAG}>, and no more."
    )
    return head + given + task + tail


def _same(one: str, other: str) -> str:
    return (
        f"First prompt:\n{one}\n\nSecond prompt:\n{other}\n\nDo both ask for the same, under the same conditions and "
        "in the same depth and breadth? Answer Yes or No."
    )
