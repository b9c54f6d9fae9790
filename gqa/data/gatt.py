"""Ghost attention (Llama 2 §3.3): dialogues that obey an instruction which only their first turn still states."""

import random
from collections.abc import Callable, Mapping, Sequence

from gqa.errors import InputError


def ghost_dialogue(
    user_turns: Sequence[str], instruction: str, respond: Callable[[list[dict]], str], kept: str | None = None
) -> list[dict]:
    """The messages of a dialogue to fine-tune on: instruction in the first turn only, loss on the last response only.

    Args:
      user_turns: what the user says, turn by turn.
      instruction: joined to every user turn while the responses are sampled, as by a user who repeats it.
      respond: samples a response to messages that end with a user's.
      kept: the instruction as the first turn keeps it, such as its short form; `None`: as it is.

    Raises `InputError` where there are no turns or the instruction is empty.
    """
    if not user_turns or not instruction.strip():
        raise InputError("ghost attention needs an instruction and at least one user turn; one of them is empty")
    asked: list[dict] = []
    for text in user_turns:
        asked.append({"role": "user", "content": f"{instruction}\n\n{text}"})
        asked.append({"role": "assistant", "content": respond(list(asked))})
    messages = []
    for number, text in enumerate(user_turns):
        first = f"{kept or instruction}\n\n{text}" if number == 0 else text
        messages.append({"role": "user", "content": first})
        response = dict(asked[2 * number + 1])
        if number < len(user_turns) - 1:
            response["train"] = False  # sampled under an instruction that is no longer there
        messages.append(response)
    return messages


def random_instruction(
    constraints: Mapping[str, Sequence[str]], forms: Mapping[str, str], rng: random.Random
) -> tuple[str, str]:
    """An instruction, and what the first turn keeps of it: half of the time its short form (Llama 2 §3.3).

    Args:
      constraints: by kind, such as hobby, language and public figure, what to choose from: `{"figure": ["Napoleon"]}`.
      forms: by kind, a sentence with `{}` for the choice: `{"figure": "Always act as {} from now on."}`.
      rng: decides; one or more kinds are combined. The short form reads `Figure: Napoleon.`
    """
    if not constraints or set(constraints) - set(forms):
        raise InputError(
            f"constraints {sorted(constraints)} and forms {sorted(forms)}; expected the same kinds, not none"
        )
    kinds = rng.sample(sorted(constraints), rng.randint(1, len(constraints)))
    chosen = {kind: rng.choice(constraints[kind]) for kind in kinds}
    long = " ".join(forms[kind].format(choice) for kind, choice in chosen.items())
    short = " ".join(f"{kind.capitalize()}: {choice}." for kind, choice in chosen.items())
    return long, short if rng.random() < 0.5 else long
