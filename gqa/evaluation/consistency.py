"""Whether an instruction that only the first turn states is obeyed in the later ones (Llama 2 §3.3, table 30).

Obedience is counted by a stated rule, so that no judge is needed. A line of the file is

    {"instruction": "Always act as Napoleon.", "turns": ["Hi.", "Who are you?"], "rule": {"contains": ["Napoleon"]}}

| rule | what every response has to be |
|---|---|
| `contains` | one with at least one of these words or phrases |
| `lacks` | one with none of these |
| `max_words` | no longer than this |

Several rules hold together. An empty response obeys none, and ends its dialogue: no later turn counts as obeyed.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gqa import files
from gqa.data.conversations import lines, of_line
from gqa.data.templates import Template, Unusable
from gqa.data.tokenizer_json import open_vocabulary
from gqa.decode import batches, journal
from gqa.errors import InputError, nearest
from gqa.evaluation.checkpoint_text import TextModel

RULES = ("contains", "lacks", "max_words")
DIALOGUES, JOURNAL = "dialogues.jsonl", ".dialogues.journal"

# Of scripts that put spaces between words: not Thai, Lao, Burmese, Khmer, kana, Chinese, nor Hangul with its particles.
_LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"

Respond = Callable[[int, Mapping[int, list[dict]]], Mapping[int, str | None]]


@dataclass(frozen=True)
class Rule:
    """What every response has to be."""

    contains: tuple[str, ...] = ()  # one of them; none: anything
    lacks: tuple[str, ...] = ()
    max_words: int | None = None

    def holds(self, response: str) -> bool:
        """Whether a response obeys."""
        if not response.strip():
            return False
        if self.contains and not any(_says(response, text) for text in self.contains):
            return False
        if any(_says(response, text) for text in self.lacks):
            return False
        return self.max_words is None or len(response.split()) <= self.max_words


class Dialogue(NamedTuple):
    """What a user says, turn by turn, and what holds in all of them."""

    line: int  # of the file
    instruction: str  # joined to the first turn only
    turns: tuple[str, ...]
    rule: Rule


class Held(NamedTuple):
    """A dialogue as it went; where it outgrew the model's positions, or what is read back, without its last turns."""

    messages: list[dict]
    obeyed: list[bool]  # by turn


class Share(NamedTuple):
    """Of a turn."""

    obeyed: float  # share of the dialogues
    dialogues: int  # that came to this turn


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """The dialogues of a JSONL file; `InputError`, with the line's number, for a line that is none."""
    found = []
    for number, row in lines(path):
        with of_line(path, number):
            found.append(_dialogue(number, row))
    if not found:
        raise InputError(f"{path} is empty; expected dialogues, a JSON object a line")
    return found


def hold(dialogues: Sequence[Dialogue], respond: Respond) -> list[Held]:
    """Holds the dialogues, all of them turn by turn.

    `respond(turn, conversations by number)` gives the response to each, or `None` where there can be none.
    """
    held = [Held([], []) for _ in dialogues]
    for turn in range(max(len(dialogue.turns) for dialogue in dialogues)):
        going = {}
        for number, dialogue in enumerate(dialogues):
            if turn == len(held[number].obeyed) and turn < len(dialogue.turns):
                text = dialogue.turns[turn]
                text = f"{dialogue.instruction}\n\n{text}" if turn == 0 else text
                going[number] = [*held[number].messages, {"role": "user", "content": text}]
        for number, response in respond(turn, going).items() if going else ():
            if response is not None:
                held[number].messages[:] = [*going[number], {"role": "assistant", "content": response}]
                held[number].obeyed.append(dialogues[number].rule.holds(response))
                if not response.strip():  # no template goes on from it
                    held[number].obeyed.extend([False] * (len(dialogues[number].turns) - turn - 1))
    return held


def shares(held: Sequence[Held]) -> list[Share]:
    """The share of dialogues in which the instruction held, by turn."""
    found = []
    for turn in range(max((len(each.obeyed) for each in held), default=0)):
        obeyed = [each.obeyed[turn] for each in held if turn < len(each.obeyed)]
        found.append(Share(sum(obeyed) / len(obeyed), len(obeyed)))
    return found


def check_template(checkpoint: TextModel, name: str) -> Template:
    """The template for a checkpoint's vocabulary; `InputError` for what has no conversations."""
    if not checkpoint.text.is_decoder:
        raise InputError(f"{checkpoint.checkpoint} is an encoder-decoder; expected a decoder for --dialogues")
    # As in training: a text that spells a special token is text.
    return Template(name, open_vocabulary(checkpoint.text.vocabulary.path, foreign=True))


def hold_with(
    checkpoint: TextModel, dialogues: Sequence[Dialogue], template: Template, settings: batches.Settings, folder: Path
) -> list[Held]:
    """Holds the dialogues with a checkpoint, into `dialogues.jsonl` of `folder`; started again, it goes on.

    Raises `InputError` for a folder with another run's results.
    """
    settings = replace(settings, eos_ids=checkpoint.text.eos_ids)
    identity = {
        "dialogues": hashlib.sha256(repr(dialogues).encode()).hexdigest(),
        "checkpoint": checkpoint.identity,
        "settings": repr((template.name, replace(settings, batch_size=1))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(dialogue.turns) for dialogue in dialogues)
    with (
        open(folder / JOURNAL, "ab+") as file,
        tqdm(total=total, unit="response", delay=1, dynamic_ncols=True) as bar,
    ):
        done = journal.open_journal(file, folder / JOURNAL, identity)

        def respond(turn: int, conversations: Mapping[int, list[dict]]) -> dict[int, str | None]:
            numbers = {turn * len(dialogues) + number: number for number in conversations}
            waiting = {}
            for place, number in numbers.items():
                try:
                    tokens = template.prompt(conversations[number])
                except Unusable:  # an answer before that cannot be read back
                    continue
                fits = len(tokens) + settings.max_new_tokens <= checkpoint.config.max_position
                if place not in done and fits:
                    waiting[place] = tokens
            bar.update(len(numbers) - len(waiting))
            for place, new in batches.generate_all(checkpoint.model, waiting, settings) if waiting else ():
                journal.append(file, place, new)
                done[place] = new
                bar.update()
            return {number: _text(template, settings, done.get(place)) for place, number in numbers.items()}

        held = hold(dialogues, respond)
    cut = [
        dialogue.line for each, dialogue in zip(held, dialogues, strict=True) if len(each.obeyed) < len(dialogue.turns)
    ]
    if cut:
        print(
            f"{checkpoint.checkpoint}: {len(cut)} of {len(dialogues)} dialogues ended before their last turn, where a "
            f"prompt does not fit its positions or cannot be read back (line {', '.join(map(str, cut[:5]))}"
            f"{', …' if len(cut) > 5 else ''})",
            file=sys.stderr,
        )
    rows = (
        {"messages": each.messages, "obeyed": each.obeyed, "line": dialogue.line}
        for each, dialogue in zip(held, dialogues, strict=True)
    )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write_text(folder / DIALOGUES, text)
    return held


def table(found: Mapping[str, Sequence[Share]]) -> str:
    """The shares of every checkpoint in Markdown, a turn a line, as Llama 2's table 30."""
    lines = [f"| turn | {' | '.join(found)} |", "|--:|" + "--:|" * len(found)]
    for turn in range(max(map(len, found.values()))):
        cells = [
            f"{each[turn].obeyed:.0%} of {each[turn].dialogues}" if turn < len(each) else "" for each in found.values()
        ]
        lines.append(f"| {turn + 1} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Sequence[Share]], path: Path) -> None:
    """The picture: a line a checkpoint."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for number, (name, each) in enumerate(found.items()):
        color = plt.get_cmap("viridis")(number / max(len(found) - 1, 1) * 0.85)
        shares = [share.obeyed for share in each]
        axes.plot(range(1, len(each) + 1), shares, marker="o", markersize=4, color=color, label=name)
    axes.set_ylim(-0.05, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("turn")
    axes.set_ylabel("instruction obeyed, of dialogues")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _dialogue(number: int, row: Mapping) -> Dialogue:
    for name in ("instruction", "turns", "rule"):
        if name not in row:
            raise InputError(
                f"there is no {name!r}; expected instruction, turns and rule; nearest: {nearest(name, row)}"
            )
    if not isinstance(row["instruction"], str) or not row["instruction"].strip():
        raise InputError(f"instruction is {row['instruction']!r}; expected a text")
    turns, rule = row["turns"], row["rule"]
    if not _texts(turns):
        raise InputError(f"turns is {turns!r}; expected a list of texts")
    if not isinstance(rule, Mapping) or not rule:
        raise InputError(f"rule is {rule!r}; expected an object with {', '.join(RULES)}, or some of them")
    for name, value in rule.items():
        if name not in RULES:
            raise InputError(f"rule {name!r}; expected one of {', '.join(RULES)}; nearest: {nearest(name, RULES)}")
        if name == "max_words" and (type(value) is not int or value < 1):
            raise InputError(f"rule max_words is {value!r}; expected a number of 1 or more")
        if name != "max_words" and not _texts(value):
            raise InputError(f"rule {name} is {value!r}; expected a list of texts")
    words = {name: tuple(rule.get(name, ())) for name in ("contains", "lacks")}
    return Dialogue(number, row["instruction"], tuple(turns), Rule(**words, max_words=rule.get("max_words")))


def _texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each.strip() for each in value)


def _says(response: str, text: str) -> bool:
    """Whether `text` stands in a response, in whatever case; a word at its ends is not part of another."""
    words = text.split()
    pattern = r"\s+".join(map(re.escape, words))
    if re.match(_LETTER, words[0][0]):
        pattern = f"(?<!{_LETTER}){pattern}"
    if re.match(_LETTER, words[-1][-1]):
        pattern += f"(?!{_LETTER})"
    return re.search(pattern, response, re.IGNORECASE) is not None


def _text(template: Template, settings: batches.Settings, tokens: Sequence[int] | None) -> str | None:
    if tokens is None:
        return None
    return template.response(tokens[:-1] if tokens and tokens[-1] in settings.eos_ids else tokens)
