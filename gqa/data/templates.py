"""python -m gqa.data.templates --template=NAME --input=FILE.jsonl --vocabulary=FILE.model [--number=3]

Shows what a template makes of the conversations of a file: the text of each, trained tokens between ⟦ and ⟧.
--template=tokenizer is the chat_template of the tokenizer_config.json beside the vocabulary.

A line of the file is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, with a
"system" message first or without, or {"instruction": "…", "input": "…", "output": "…"}, "input" and "system" left out
or not.
"""

import argparse
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gqa.command_line import parse_arguments, run
from gqa.data.chat_template import ChatTemplate
from gqa.data.tokenizer_json import TokenizerJson, open_vocabulary
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError, nearest

Message = Mapping  # "role", "content"; a user's may have "input", an assistant's "train": False (no loss on it)
Pieces = Iterator[tuple[str | int, bool]]  # text or id of a special token, and whether it is trained

ROLES = ("system", "user", "assistant")
TOKENIZER = "tokenizer"


class Unusable(InputError):
    """A well-formed example that there is nothing to learn from: left out and counted where many are read."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason  # in a few words, to count by


class Example(NamedTuple):
    """A conversation in tokens; the first one starts it and is predicted from nothing."""

    tokens: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n], True on what the model learns to say


class Turn(NamedTuple):
    """What a user says and what the assistant answers."""

    user: str
    input: str | None  # what an instruction is about (Alpaca)
    response: str | None  # None: the prompt of a generation ends here
    trained: bool

    @property
    def text(self) -> str:
        """Instruction and input in one."""
        return f"{self.user}\n\n{self.input}" if self.input else self.user


def _alpaca(system: str | None, turns: Sequence[Turn], special: "_Special") -> Pieces:
    """Stanford Alpaca's `train.py`; a system message takes the place of its first paragraph."""
    more = ", paired with an input that provides further context" if turns[0].input else ""
    default = f"Below is an instruction that describes a task{more}. "
    default += "Write a response that appropriately completes the request."
    yield from special.start()
    yield system or default, False
    for turn in turns:
        given = f"\n\n### Input:\n{turn.input}" if turn.input else ""
        yield f"\n\n### Instruction:\n{turn.user}{given}\n\n### Response:", False
        yield from special.response(turn.response, turn)


def _openbezoar(system: str | None, turns: Sequence[Turn], special: "_Special") -> Pieces:
    """OpenBezoar: system, instruction and response, each under its heading."""
    default = "Below is an instruction, optionally paired with an input that provides further context, write a "
    yield from special.start()
    yield f"### System:\n{system or default + 'response that appropriately completes the request.'}", False
    for turn in turns:
        yield f"\n\n### Instruction:\n{turn.text}\n\n### Response:\n", False
        yield from special.response(turn.response, turn)


def _human_bot(system: str | None, turns: Sequence[Turn], special: "_Special") -> Pieces:
    """h2oGPT: the `<human>:` that closes a response is trained, it teaches the model to stop."""
    yield from special.start()
    yield (f"{system}\n" if system else "") + "<human>:", False
    for number, turn in enumerate(turns):
        yield f" {turn.text}\n<bot>:", False
        if turn.response is not None:
            yield f" {turn.response}\n<human>:", turn.trained
            if number == len(turns) - 1:
                yield from special.end(turn)


def _llama2(system: str | None, turns: Sequence[Turn], special: "_Special") -> Pieces:
    """Llama 2's `generation.py`: every turn begins with BOS; the system message is part of the first user's."""
    for number, turn in enumerate(turns):
        head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and number == 0 else ""
        yield from special.start()
        yield f"[INST] {(head + turn.text).strip()} [/INST]", False
        yield from special.response(turn.response and f" {turn.response.strip()} ", turn)


_TEMPLATES: dict[str, Callable[[str | None, Sequence[Turn], "_Special"], Pieces]] = {
    "alpaca": _alpaca,
    "openbezoar": _openbezoar,
    "human_bot": _human_bot,
    "llama2": _llama2,
}
TEMPLATES = (*_TEMPLATES, TOKENIZER)


class _Special(NamedTuple):
    """The special tokens that templates put around texts, never read from a text."""

    bos_id: int | None
    eos_id: int

    def start(self) -> Pieces:
        if self.bos_id is not None:
            yield self.bos_id, False

    def end(self, turn: Turn) -> Pieces:
        yield self.eos_id, turn.trained

    def response(self, text: str | None, turn: Turn) -> Pieces:
        if turn.response is not None:
            yield text, turn.trained
            yield from self.end(turn)


class Template:
    """A template by name for a vocabulary: conversations to tokens."""

    def __init__(self, name: str, vocabulary: Vocabulary | TokenizerJson):
        """Raises `InputError` for an unknown name and where the tokenizer beside the vocabulary has no template."""
        if name not in TEMPLATES:
            raise InputError(
                f"template={name!r}; expected one of {', '.join(TEMPLATES)}; nearest: {nearest(name, TEMPLATES)}"
            )
        if vocabulary.eos_id < 0 and name != TOKENIZER:
            raise InputError(f"vocabulary {vocabulary.path} has no EOS, which ends a response of template {name}")
        self.name, self.vocabulary = name, vocabulary
        self._chat, self._reader = None, vocabulary
        if name == TOKENIZER:
            parsed = {}
            if isinstance(vocabulary, TokenizerJson):
                # Whole, special tokens in it, as transformers reads it: they may take the blanks beside them.
                self._reader, parsed = TokenizerJson(vocabulary.path), vocabulary.special_ids
            self._chat = ChatTemplate(vocabulary.path.parent, vocabulary.special_ids, parsed)

    @property
    def num_ids(self) -> int:
        """Ids that its tokens are below: the vocabulary's, or more where the tokenizer has added some."""
        added = self._chat.special_ids.values() if self._chat else ()
        return max(self.vocabulary.size, *(number + 1 for number in added), 0)

    @property
    def eos_id(self) -> int:
        """What ends a response: of a tokenizer's own template its EOS, where it names one."""
        if self._chat is not None and self._chat.eos is not None:
            return self._chat.special_ids[self._chat.eos]
        return self.vocabulary.eos_id

    def ending(self, eos_ids: Collection[int]) -> list[int]:
        """The tokens that end an example: the last of `eos_ids`, and what the template writes after it.

        ChatML writes a new line. One of `eos_ids` where the template writes none of them; nothing where there is none.
        """
        own = [self.eos_id] if self.eos_id in eos_ids else sorted(eos_ids)[:1]
        try:
            tokens = self.example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]).tokens
        except InputError:  # a template that refuses so short a conversation
            return own
        places = np.flatnonzero(np.isin(tokens, list(eos_ids)))
        return tokens[places[-1] :].tolist() if len(places) else own

    def example(self, messages: Sequence[Message]) -> Example:
        """A conversation with the responses that are trained: text and end of every assistant's message.

        Raises `InputError` for what `check` refuses.
        """
        check(messages)
        if messages[-1]["role"] != "assistant":
            raise InputError(f"message {len(messages)}, the last, is a user's; expected a response to train on")
        return self._encode(self._pieces(messages))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens from which the model goes on with a response to the last message, a user's."""
        check(messages)
        if messages[-1]["role"] == "assistant":
            raise InputError(f"message {len(messages)}, the last, is a response; expected a user's")
        return self._encode(self._pieces(messages)).tokens.tolist()

    def response(self, tokens: Sequence[int]) -> str:
        """The text of a response that the model gave to a `prompt`, without what the template puts around it."""
        special = set(self._chat.special_ids.values()) if self._chat else set()
        text = self.vocabulary.decode([id for id in tokens if id < self.vocabulary.size and id not in special])
        if self.name == "human_bot":
            text = text.rstrip().removesuffix("<human>:")
        return text.strip()

    def _pieces(self, messages: Sequence[Message]) -> Pieces:
        if self._chat is not None:
            plain = [
                message if "input" not in message else {**message, "content": _joined(message)} for message in messages
            ]
            for number, message in enumerate(plain, start=1):
                if spelled := self._chat.spelled(message["content"]):
                    raise Unusable(
                        "special token in a text", f"message {number} spells the special token {spelled!r}; take it out"
                    )
            return self._chat.pieces(plain)
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        turns = list(_turns(messages[system is not None :]))
        bos_id = self.vocabulary.bos_id
        return _TEMPLATES[self.name](system, turns, _Special(bos_id, self.vocabulary.eos_id))

    def _encode(self, pieces: Iterable[tuple[str | int, bool]]) -> Example:
        tokens, trained, after_text = [], [], False
        reads_special = self._reader is not self.vocabulary
        # Texts of one kind are one: a tokenizer sees them whole. Where a response begins, tokens end, so that it is
        # predicted from just the tokens that a prompt has.
        for (kind, is_trained), group in itertools.groupby(pieces, lambda piece: (type(piece[0]), piece[1])):
            group = [piece for piece, _ in group]
            ids = group if kind is int else self._reader.encode("".join(group), continued=after_text)
            tokens += ids
            trained += [is_trained] * len(ids)
            after_text = kind is str or reads_special
        return Example(np.array(tokens, np.int32), np.array(trained, bool))


def check(messages: Sequence[Message]) -> None:
    """Raises `InputError`, with the message's number, unless users and assistant take turns, system at most first.

    Every message has a text, and an "input" of text and a "train" that is true or false where it has these; only the
    last may be a user's without a response.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("there are no messages; expected a list of {role, content}")
    expected = "user"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise InputError(f"message {number} has no role and content; expected {{role, content}}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            found = nearest(str(role), ROLES)
            raise InputError(
                f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}; nearest: {found}"
            )
        if not isinstance(content, str):
            raise InputError(f"message {number} has a {type(content).__name__} as content; expected text")
        if not isinstance(message.get("input"), str | None):
            raise InputError(f"message {number} has a {type(message['input']).__name__} as input; expected text")
        if not isinstance(message.get("train", True), bool):
            raise InputError(f"message {number} has train {message['train']!r}; expected true or false")
        if role == "system":
            if number > 1:
                raise InputError(f"message {number} is a system message; expected it first or not at all")
            continue
        if role != expected:
            raise InputError(f"message {number} is of role {role}; expected {expected}: they take turns")
        if role == "assistant" and not content.strip():
            raise Unusable("empty response", f"message {number} is an empty response; expected some text")
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] == "system":
        raise InputError("the conversation is a system message alone; expected a user's after it")


def marked(example: Example, vocabulary: Vocabulary | TokenizerJson) -> str:
    """The text of an example, trained tokens between ⟦ and ⟧, special ones by their name in ‹›."""
    names = {number: f"‹{name}›" for name, number in vocabulary.special_ids.items()}
    text, run_ids, shown, was_trained = "", [], "", False
    flagged = zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
    groups = itertools.groupby(flagged, lambda pair: (pair[1], pair[0] not in names and pair[0] < vocabulary.size))
    for (trained, is_text), group in groups:
        if trained != was_trained:
            text += "⟦" if trained else "⟧"
        was_trained = trained
        ids = [token for token, _ in group]
        if not is_text:
            text += "".join(names.get(token, f"‹{token}›") for token in ids)
            run_ids, shown = [], ""
            continue
        run_ids += ids
        # Not token by token: one of several bytes of a character is none. And from where the run starts: alone, a
        # piece would lose its space.
        decoded = vocabulary.decode(run_ids)
        text += decoded[len(shown) :]
        shown = decoded
    return text + ("⟧" if was_trained else "")


def _joined(message: Message) -> str:
    return Turn(message["content"], message.get("input"), None, False).text


def _turns(messages: Sequence[Message]) -> Iterator[Turn]:
    for user, assistant in itertools.zip_longest(messages[::2], messages[1::2]):
        response = None if assistant is None else assistant["content"]
        trained = assistant is not None and assistant.get("train", True)
        yield Turn(user["content"], user.get("input") or None, response, trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", required=True, choices=TEMPLATES)
    parser.add_argument("--input", required=True, type=Path, metavar="FILE", help="conversations, a JSON object a line")
    parser.add_argument("--vocabulary", required=True, metavar="FILE", help="SentencePiece .model or tokenizer.json")
    parser.add_argument("--number", type=int, default=3, metavar="N", help="conversations shown (default 3)")
    arguments = parse_arguments(parser)
    from gqa.data.conversations import lines, messages_of

    if arguments.number < 1:
        raise InputError(f"--number={arguments.number}; expected 1 or more")
    template = Template(arguments.template, open_vocabulary(arguments.vocabulary, foreign=True))
    shown = list(itertools.islice(lines(arguments.input), arguments.number))
    if not shown:
        raise InputError(f"{arguments.input} is empty; expected conversations, a JSON object a line")
    for number, row in shown:
        try:
            example = template.example(messages_of(row))
        except InputError as error:
            raise InputError(f"{arguments.input} line {number}: {error}") from error
        print(f"line {number}: {len(example.tokens)} tokens, {example.trained.sum()} trained")
        print(marked(example, template.vocabulary), end="\n\n")


if __name__ == "__main__":
    run(main)
