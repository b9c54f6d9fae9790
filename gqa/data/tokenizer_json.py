"""A Hugging Face `tokenizer.json` read as `gqa.data.vocabulary.Vocabulary` reads a SentencePiece file."""

import json
from collections.abc import Sequence
from pathlib import Path

from gqa.errors import InputError


class TokenizerJson:
    """Token ids of text by a checkpoint's `tokenizer.json` and the `tokenizer_config.json` beside it.

    `bos_id` is None where the tokenizer puts none before a text, `eos_id` -1 where it names none. Raises `InputError`
    for a file that is none, and where the package `tokenizers` is missing.
    """

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise InputError(f"{path} needs the package tokenizers: pip install -e '.[eval]'") from None
        self.path = path
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # what the package raises has no type of its own
            raise InputError(f"{path} is no tokenizer: {error}") from error
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_id = self._named(path.with_name("tokenizer_config.json"), "eos_token")
        first = self._tokenizer.encode("").ids
        self.bos_id = first[0] if first and first[0] != self.eos_id else None

    def _named(self, config: Path, name: str) -> int:
        if not config.is_file():
            return -1
        try:
            token = json.loads(config.read_text(encoding="utf-8")).get(name)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{config} is no JSON object: {error}") from error
        spelled = token.get("content") if isinstance(token, dict) else token
        if spelled is None:
            return -1
        number = self._tokenizer.token_to_id(spelled) if isinstance(spelled, str) else None
        if number is None:
            raise InputError(f"{config}: {name}={spelled!r} is no token of {self.path.name}")
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_sentinels(self, text: str) -> list[int]:
        """`encode`: T5's sentinels are tokens of its file."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
