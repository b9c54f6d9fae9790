"""A Hugging Face `tokenizer.json` read as `gqa.data.vocabulary.Vocabulary` reads a SentencePiece file."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gqa.data.vocabulary import NUM_SENTINELS, Vocabulary, without_surrogates
from gqa.errors import InputError

FILE, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_ANCHOR = "\ue000"  # a private character, part of no token


class TokenizerJson:
    """Token ids of text by a checkpoint's `tokenizer.json` and the `tokenizer_config.json` beside it.

    `bos_id` is None where the tokenizer puts none before a text, `eos_id` and `pad_id` -1 where it names none. What
    spells a special token in a text is that token, or, with `plain`, text. Raises `InputError` for a file that is none,
    and where the package `tokenizers` is missing.
    """

    def __init__(self, path: Path, *, plain: bool = False):
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise InputError(f"{path} needs the package tokenizers: pip install -e '.[eval]'") from None
        self.path = path
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # what the package raises has no type of its own
            raise InputError(f"{path} is no tokenizer: {error}") from error
        # The file keeps how it was last called: texts are neither cut nor filled up, as transformers reads it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = 1 + max(self.ids.values(), default=-1)
        config = _read_config(path.with_name(CONFIG))
        self.eos_id = self._named(config, "eos_token")
        self.pad_id = self._named(config, "pad_token")
        self.unk_id = self._named(config, "unk_token")
        first = self._tokenizer.encode("").ids
        self.bos_id = first[0] if first and first[0] != self.eos_id else None
        self._tokenizer.encode_special_tokens = plain
        start = self._tokenizer.encode("a", add_special_tokens=False).tokens
        self._adds_space = bool(start) and start[0].startswith("\u2581")
        self._num_anchor_ids = len(self._tokenizer.encode(_ANCHOR, add_special_tokens=False).ids)

    def _named(self, config: Mapping, name: str) -> int:
        token = config.get(name)
        spelled = token.get("content") if isinstance(token, dict) else token
        if spelled is None:
            return -1
        number = self._tokenizer.token_to_id(spelled) if isinstance(spelled, str) else None
        if number is None:
            raise InputError(f"{self.path.with_name(CONFIG)}: {name}={spelled!r} is no token of {self.path.name}")
        return number

    @property
    def files(self) -> list[Path]:
        """The files that it is read from, for a checkpoint to take along."""
        return [file for file in (self.path, self.path.with_name(CONFIG)) if file.is_file()]

    @functools.cached_property
    def sha256(self) -> str:
        """Of all that decides its ids."""
        total = hashlib.sha256(self.path.read_bytes())
        total.update(json.dumps(self.token_ids).encode())
        return total.hexdigest()

    @property
    def ids(self) -> dict[str, int]:
        """All tokens by their spelling."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def special_ids(self) -> dict[str, int]:
        """The special tokens (BOS, EOS, …) by their spelling."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    @property
    def token_ids(self) -> dict[str, int]:
        """The special ids that it has, as a checkpoint's `config.json` names them."""
        ids = {"pad_token_id": self.pad_id, "bos_token_id": self.bos_id, "eos_token_id": self.eos_id}
        return {name: number for name, number in ids.items() if number is not None and number >= 0}

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of `text`, without BOS and EOS.

        `continued`: it follows on other text, so no space is put before it where the tokenizer puts one before a text.
        """
        text = without_surrogates(text)
        if not continued or not self._adds_space:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(_ANCHOR + text, add_special_tokens=False).ids[self._num_anchor_ids :]

    def encode_all(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        """`encode` of each text, int32; on the package's own threads, whatever `num_threads`.

        Halves of surrogate pairs are question marks.
        """
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # rare, so no look at every text before
            found = self._tokenizer.encode_batch_fast(list(map(without_surrogates, texts)), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def encode_with_sentinels(self, text: str) -> list[int]:
        """`encode`: T5's sentinels are tokens of its file."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def check_t5(self) -> None:
        """Raises `InputError` unless the special ids are T5's: pad 0, EOS 1, unknown 2, the sentinels last."""
        found = (self.pad_id, self.eos_id, self.unk_id)
        if found != (Vocabulary.pad_id, Vocabulary.eos_id, Vocabulary.unk_id):
            raise InputError(f"vocabulary {self.path} has pad, eos, unk = {found}; expected T5's (0, 1, 2)")
        sentinels = [self._tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(NUM_SENTINELS)]
        if sentinels != [self.size - 1 - i for i in range(NUM_SENTINELS)]:
            raise InputError(f"vocabulary {self.path} has not T5's {NUM_SENTINELS} sentinels <extra_id_N> as last ids")


def open_vocabulary(path: str | Path, *, foreign: bool = False) -> Vocabulary | TokenizerJson:
    """The vocabulary of a SentencePiece file, of a `tokenizer.json`, or of a checkpoint's folder that has one of them.

    A text that spells a special token is text. The special ids are T5's, or any with `foreign`. Raises `InputError` for
    other ones, and for what is no whole vocabulary.
    """
    path = Path(path)
    if path.is_dir():
        path = tokenizer_file(path, sorted(path.iterdir()))
    if path.suffix != ".json":
        return Vocabulary(path, foreign=foreign)
    if not path.is_file():
        raise InputError(f"vocabulary {path} not found; expected a {FILE} or a SentencePiece .model file")
    vocabulary = TokenizerJson(path, plain=True)
    if not foreign:
        vocabulary.check_t5()
    return vocabulary


def tokenizer_file(checkpoint: str | Path, files: Sequence[Path]) -> Path:
    """Which of a checkpoint's files is its tokenizer: SentencePiece's before `tokenizer.json`.

    Fine-tuning may have added tokens (ChatML's `<|im_start|>`), which SentencePiece's file lacks: then it is
    `tokenizer.json`. Raises `InputError` where there is none, and where there are several of SentencePiece.
    """
    models = [file for file in files if file.suffix == ".model"]
    if len(models) > 1:
        raise InputError(
            f"{checkpoint} has {len(models)} files *.model ({models[0].name}, {models[1].name}); expected one"
        )
    jsons = [file for file in files if file.name == FILE]
    found = jsons if models and jsons and _has_added_tokens(models[0], files) else models or jsons
    if not found:
        raise InputError(
            f"{checkpoint} has no tokenizer; expected a SentencePiece file *.model or a {FILE} in it: copy it there"
        )
    return found[0]


def _has_added_tokens(model: Path, files: Sequence[Path]) -> bool:
    """Whether files beside SentencePiece's name tokens beyond its own, of those that the checkpoint has a row for."""
    numbers: list[Any] = []
    for file in files:
        if file.name == FILE and isinstance(tokens := _read_config(file).get("added_tokens"), list):
            numbers += [token.get("id") for token in tokens if isinstance(token, dict)]
        elif file.name == CONFIG and isinstance(tokens := _read_config(file).get("added_tokens_decoder"), dict):
            numbers += [int(number) for number in tokens if number.isdecimal() and len(number) < 20]
        elif file.name == ADDED:
            numbers += _read_config(file).values()
    # Some name a token for padding that no embedding has.
    num_rows = _read_config(model.with_name("config.json")).get("vocab_size")
    least, end = Vocabulary(model, foreign=True).size, num_rows if type(num_rows) is int else math.inf
    return any(type(number) is int and least <= number < end for number in numbers)


def _read_config(path: Path) -> Mapping:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON object: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is no JSON object: it holds a {type(config).__name__}")
    return config
