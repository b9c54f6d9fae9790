"""A tokenizer's own `chat_template`: Jinja from a stranger, rendered in a sandbox to text with special tokens in it.

Nothing of the folder is executed: the template is data, what it may do is Jinja's immutable sandbox without repetition
of strings, and it sees the messages and the spelling of the special tokens alone.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gqa.errors import InputError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"  # newer checkpoints keep it in a file of its own
_SPELLED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The `chat_template` in a folder, with the special tokens that it may write.

    Raises `InputError` for a folder without one, and for one that is no Jinja.
    """

    def __init__(self, folder: str | Path, special_ids: Mapping[str, int], parsed: Collection[str] = ()):
        """`special_ids`: the vocabulary's own special tokens by spelling; the folder's added ones join them.

        `parsed`: those that the vocabulary itself reads in a text, which stay in the text of a piece.
        """
        import jinja2

        folder = Path(folder)
        self.path = folder / CONFIG
        config = _read(self.path) if self.path.is_file() else {}
        source = config.get("chat_template")
        if (folder / TEMPLATE).is_file():
            self.path = folder / TEMPLATE
            source = self.path.read_text(encoding="utf-8")
        if isinstance(source, list):  # several by name
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise InputError(f"{folder} has no chat_template in {CONFIG} and no {TEMPLATE}; choose another template")
        self.special_ids = dict(special_ids)
        added = config.get("added_tokens_decoder")
        for number, token in (added if isinstance(added, dict) else {}).items():
            if number.isdecimal() and isinstance(token, dict) and token.get("special") and token.get("content"):
                self.special_ids[str(token["content"])] = int(number)
        self._variables = {name: _spelling(config[name]) for name in _SPELLED if config.get(name)}
        self.eos = self._variables.get("eos_token")
        if self.eos is not None and self.eos not in self.special_ids:
            raise InputError(
                f"{folder / CONFIG} has eos_token {self.eos!r}, which is no special token of the vocabulary"
            )
        self._special = _any_of(self.special_ids)
        self._split_at = _any_of(spelled for spelled in self.special_ids if spelled not in parsed)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"{self.path}: the chat_template is no Jinja: {error}") from error

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool) -> str:
        """The text of a conversation; `InputError` with the template's own words where it refuses one."""
        import jinja2

        try:
            return self._template.render(
                messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            )
        except RecursionError as error:
            raise InputError(f"the chat_template of {self.path} calls itself without end") from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InputError(f"the chat_template of {self.path} refuses the conversation: {error}") from error

    def pieces(self, messages: Sequence[Mapping]) -> list[tuple[str | int, bool]]:
        """`(text or id of a special token, trained)` in order; what an assistant message adds is trained.

        What that is shows by rendering the conversation with and without the message. Raises `InputError` where a
        message changes how earlier ones are rendered, so that no such part exists.
        """
        done, found = "", []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:number], add_generation_prompt=True)
            whole = self.render(messages[: number + 1], add_generation_prompt=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise InputError(
                    f"the chat_template of {self.path} renders earlier messages otherwise once message {number + 1} "
                    "follows; train on conversations of one turn"
                )
            response, trained = whole[len(prompt) :], message.get("train", True)
            found += [*self._split(prompt[len(done) :], False), *self._split(response, trained)]
            if self.eos is not None and not self.spelled(response):
                found.append((self.special_ids[self.eos], trained))  # a response that never ends is not learnt
            done = whole
        if messages[-1]["role"] != "assistant":
            prompt = self.render(messages, add_generation_prompt=True)
            if not prompt.startswith(done):  # such as one that leaves out what an assistant thought before
                done, found = "", []
            found += self._split(prompt[len(done) :], False)
        return found

    def spelled(self, text: str) -> str | None:
        """The first special token that a text spells."""
        found = self._special.search(text)
        return found.group() if found else None

    def _split(self, text: str, trained: bool) -> Iterator[tuple[str | int, bool]]:
        start = 0
        for found in self._split_at.finditer(text):
            if found.start() > start:
                yield text[start : found.start()], trained
            yield self.special_ids[found.group()], trained
            start = found.end()
        if start < len(text):
            yield text[start:], trained


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def _any_of(spellings: Iterable[str]) -> re.Pattern:
    """Finds the longest of them at a place; of none, nothing."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")


def _spelling(token) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _environment():
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}`, transformers' mark of what an assistant says: its body."""

        tags = frozenset({"generation"})

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        # 'a' * 10**10 would take all memory.
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context, operator, left, right):
            if operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
                raise SecurityError(f"{operator} of other than two numbers is not allowed")
            return left * right

    def raise_exception(message):
        raise jinja2.TemplateError(str(message))

    # As transformers sets it up, so that templates give the same text.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    return environment
