"""Orca: explanations in the manner that a system message asks for, guided by the right answer (OpenBezoar)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from gqa.data.instructions.parts import Candidate, NearCopies, Rejected, Request, Seed, plain, user
from gqa.errors import InputError, nearest

REFERENCE = "reference answer"  # named in what the parent is asked, and so in a response that gives the help away


@dataclass(frozen=True)
class Orca:
    """The program and its system messages."""

    # By submixture, of which every seed is given one at random (Mukherjee et al. 2023 table 2); `""`: an empty message,
    # none in the conversation.
    systems: Mapping[str, tuple[str, ...]]
    default: str  # submixture of a seed that names none
    near_copies: NearCopies  # of the right answer, responses that explain nothing

    def __post_init__(self):
        for name, systems in self.systems.items():
            if not systems or not all(isinstance(system, str) for system in systems):
                raise InputError(f"orca.systems.{name}={systems!r}; expected one or more texts")
        if self.default not in self.systems:
            raise InputError(
                f"orca.default={self.default!r}; expected one of {', '.join(self.systems)}; "
                f"nearest: {nearest(self.default, self.systems)}"
            )

    @property
    def per_request(self) -> int:
        """The seed's own instruction."""
        return 1

    @property
    def writes_instructions(self) -> bool:
        """Instructions are the seeds'."""
        return False

    def requests(self, seeds: Sequence[Seed], rng: Random) -> list[Request]:
        """A system message for every seed; `InputError` for one without an answer or of an unknown submixture."""
        made = []
        for seed in seeds:
            name = self.default if seed.submixture is None else seed.submixture
            if name not in self.systems:
                raise InputError(
                    f"seed of line {seed.line}: submixture {name!r}; expected one of {', '.join(self.systems)}; "
                    f"nearest: {nearest(name, self.systems)}"
                )
            if not seed.answer:
                raise InputError(f"seed of line {seed.line} has no answer; expected one to guide the explanation")
            made.append(Request((seed,), rng.choice(self.systems[name]), None))
        return made

    def parse(self, request: Request, text: str) -> list[Candidate | Rejected]:
        """The seed's instruction under the system message; asked with the right answer, kept without."""
        (seed,) = request.seeds
        system = [{"role": "system", "content": request.method}] if request.method else []
        guided = (
            f"{seed.text}\n\nThe {REFERENCE} is: {seed.answer}\n\nRespond as if you had found it yourself: come to the "
            "same answer, explain how, and do not mention that it was given."
        )
        return [Candidate(request, [*system, user(seed.text)], [*system, user(guided)], None)]

    def refusal(self, candidate: Candidate, response: str) -> str | None:
        """Whether the response gives the help away or is no more than the right answer."""
        (seed,) = candidate.request.seeds
        if REFERENCE in plain(response):
            return f"names the {REFERENCE}"
        if self.near_copies.one_of(plain(response), [plain(seed.answer)]):
            return f"repeats the {REFERENCE}"
        return None
