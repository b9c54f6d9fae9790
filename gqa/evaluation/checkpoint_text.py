"""A checkpoint as a reader and writer of text: its tokenizer, its special tokens and its model, ready to decode."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax

from gqa import checkpoints, models
from gqa.checkpoints.source import Contents, identity, special_ids
from gqa.data.tokenizer_json import TokenizerJson, tokenizer_file
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError
from gqa.models.llama import LlamaConfig


class CheckpointText:
    """What the model of a checkpoint reads for a text, and the text of what it writes.

    `vocabulary` is the SentencePiece file or `tokenizer.json` of the checkpoint, `eos_ids` the tokens that end a text,
    `eos_id` the tokenizer's own of them (the first where it names none, -1 where there is none), `bos_ids` those that
    begin one. Raises `InputError` for a checkpoint without a tokenizer, with several, with one of more ids than the
    model has, or for an encoder-decoder without EOS.
    """

    def __init__(self, checkpoint: Path, contents: Contents):
        self.is_decoder = isinstance(contents.config, LlamaConfig)
        self.vocabulary = _vocabulary(checkpoint, contents.companions, self.is_decoder)
        if self.vocabulary.size > contents.config.vocab_size:
            raise InputError(
                f"{self.vocabulary.path} has {self.vocabulary.size} ids, the model {contents.config.vocab_size}; "
                "expected the model's own tokenizer"
            )
        ids = special_ids(checkpoint, contents)
        # What the tokenizer calls the end of a text ends it, whatever else does.
        self.eos_ids = tuple(sorted({*ids.get("eos_token_id", []), self.vocabulary.eos_id} - {-1}))
        self.eos_id = self.vocabulary.eos_id
        if self.eos_id < 0:
            self.eos_id = ids.get("eos_token_id", [-1])[0]
        if self.eos_id < 0 and not self.is_decoder:
            raise InputError(
                f"{self.vocabulary.path} names no EOS, which T5's inputs end with; expected eos_token in "
                "tokenizer_config.json or eos_token_id in config.json"
            )
        # Only a tokenizer with BOS belongs to a model that was trained with it.
        bos_id = self.vocabulary.bos_id
        self.bos_ids = [] if bos_id is None else ids.get("bos_token_id", [bos_id])[:1]

    def tokens(self, prompt: str) -> list[int]:
        """What the model reads for `prompt`; raises `InputError` for an empty one."""
        if not prompt:
            raise InputError("the prompt is empty; expected some text")
        if self.is_decoder:
            return [*self.bos_ids, *self.vocabulary.encode(prompt)]
        # T5's inputs end with EOS.
        return [*self.vocabulary.encode_with_sentinels(prompt), self.eos_id]

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text of new tokens: after a decoder's prompt, whose end decides about a space between."""
        if not self.is_decoder:
            return self.decode(new)
        return self.decode([*prompt, *new])[len(self.decode(prompt)) :]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens by themselves."""
        # Embeddings are often larger than the vocabulary: a model may name ids that mean nothing.
        return self.vocabulary.decode([token for token in tokens if token < self.vocabulary.size])


class TextModel:
    """A checkpoint whose tokenizer is read at once and whose weights when they are first needed."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        # XLA:CPU multiplies bfloat16 several times slower than float32.
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self._choices = dict(dtype=dtype, param_dtype=dtype, scan_layers=False, remat="none", dropout_rate=0.0)
        contents = checkpoints.read(checkpoint, **self._choices)
        self.config: models.ModelConfig = contents.config
        self.text = CheckpointText(checkpoint, contents)
        self.identity = identity([*contents.weight_files, *contents.companions])

    @functools.cached_property
    def model(self) -> models.Model:
        """The model in its form for decoding."""
        return checkpoints.load(self.checkpoint, **self._choices).unstacked()


def _vocabulary(checkpoint: Path, companions: Sequence[Path], foreign: bool) -> Vocabulary | TokenizerJson:
    file = tokenizer_file(checkpoint, companions)
    return TokenizerJson(file) if file.suffix == ".json" else Vocabulary(file, foreign=foreign)
