"""python -m gqa.data.vocabulary --source=embedded_large --size=4096 --output=FILE [--type=unigram]

Trains a SentencePiece vocabulary on the train split of a text source. --size counts T5's 100 sentinels, which are no
part of the file: as in T5, whoever loads it appends them.
"""

import argparse
import io
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from gqa.command_line import parse_arguments, run
from gqa.data.corpus import Corpus
from gqa.errors import InputError

NUM_SENTINELS = 100  # T5's extra_ids
TYPES = ("unigram", "bpe")

# Sampled training text: enough for every piece of a small vocabulary to be seen often, and a minute of training.
TRAINING_CHARACTERS = 20_000_000

_SPACE = "\u2581"  # what SentencePiece writes for a space inside a piece
_ANCHOR = "\ue000"  # a private character, part of no piece
_LINE_PIECES = ["\n", "\t", "\n\n", "\n\n\n"] + ["\n" + _SPACE * n for n in (4, 8, 12, 16, 20)]
_RUN_PIECES = [_SPACE * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16)]


class Vocabulary:
    """Token ids of text: a SentencePiece model whose ids T5's sentinels follow.

    The file holds `size - 100` pieces with pad 0, eos 1 and unk 2; the sentinels are the last ids, descending
    (`<extra_id_0>` is `size - 1`), and are added here, as seqio (`extra_ids=100`) and transformers' `T5Tokenizer` add
    them: one file and one numbering for all three. Trap: transformers 5 rebuilds the tokenizer with T5's own treatment
    of spaces whatever the file says, so there the ids of indented text differ.

    A file with other special ids, such as Llama's, is accepted with `foreign`: its ids stand and no sentinels follow.

    Raises `InputError` for a file that is missing, is no whole SentencePiece model, or has other special ids.
    """

    pad_id = 0
    eos_id = 1
    unk_id = 2

    def __init__(self, path: str | Path, *, foreign: bool = False):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"vocabulary {path} not found; expected a SentencePiece .model file")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self.path.read_bytes())
            num_pieces = self._model.GetPieceSize()
        except (RuntimeError, TypeError) as error:
            raise InputError(f"vocabulary {path} is no whole SentencePiece model: {error}") from error
        if num_pieces == 0:
            raise InputError(f"vocabulary {path} is no whole SentencePiece model: it has no pieces")
        found = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        is_t5 = found == (self.pad_id, self.eos_id, self.unk_id)
        if foreign:
            self.pad_id, self.eos_id, self.unk_id = found
        elif not is_t5:
            raise InputError(f"vocabulary {path} has pad, eos, unk = {found}; expected T5's (0, 1, 2)")
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self._num_pieces = num_pieces
        self._num_sentinels = NUM_SENTINELS if is_t5 else 0
        # SentencePiece writes a space as U+2581, so it reads back a U+2581 of the text as a space: where the model
        # has byte pieces, that character is spelled in bytes instead.
        byte_ids = [self._model.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_mark_ids = None if self.unk_id in byte_ids else byte_ids
        self._anchor_ids = self._model.Encode(_ANCHOR)
        self._adds_space = self._model.IdToPiece(self._model.Encode("a")[0]).startswith(_SPACE)

    @property
    def special_ids(self) -> dict[str, int]:
        """The special tokens that no text is encoded as (BOS, EOS, …) by their spelling."""
        return {
            self._model.IdToPiece(i): i
            for i in range(self._num_pieces)
            if self._model.IsControl(i) and not self._model.IsUnknown(i)
        }

    @property
    def token_ids(self) -> dict[str, int]:
        """The special ids that it has, as a checkpoint's `config.json` names them."""
        ids = {"pad_token_id": self.pad_id, "bos_token_id": self.bos_id, "eos_token_id": self.eos_id}
        return {name: number for name, number in ids.items() if number is not None and number >= 0}

    @property
    def size(self) -> int:
        """Number of ids, sentinels included: the least that a model's embedding must have."""
        return self._num_pieces + self._num_sentinels

    def sentinel_id(self, index: int) -> int:
        """Id of `<extra_id_{index}>`."""
        if not 0 <= index < self._num_sentinels:
            raise ValueError(f"sentinel index={index} is not in 0..{self._num_sentinels - 1}")
        return self.size - 1 - index

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of `text`, without EOS; text that spells a sentinel is text.

        `continued`: it follows on other text, so no space is put before it where the model puts one before a text.
        """
        if not continued or not self._adds_space:
            return self.encode_all([text], num_threads=1)[0]
        return self.encode_all([_ANCHOR + text], num_threads=1)[0][len(self._anchor_ids) :]

    def encode_all(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """`encode` of each text, on `num_threads` threads."""
        if self._space_mark_ids is None:
            return self._model.Encode(list(texts), num_threads=num_threads)
        parts = [text.split(_SPACE) for text in texts]
        encoded = iter(self._model.Encode([part for text in parts for part in text], num_threads=num_threads))
        rows = []
        for text in parts:
            row = next(encoded)
            for _ in text[1:]:
                row = [*row, *self._space_mark_ids, *next(encoded)]
            rows.append(row)
        return rows

    def encode_with_sentinels(self, text: str) -> list[int]:
        """`encode`, with every `<extra_id_N>` of the text as that sentinel: `def f(<extra_id_0>):`."""
        ids = []
        rest = text
        while rest:
            found = min(
                ((rest.find(name), i, name) for i, name in _SENTINEL_NAMES if name in rest), default=(len(rest), 0, "")
            )
            start, index, name = found
            ids += self.encode(rest[:start]) + ([self.sentinel_id(index)] if name else [])
            rest = rest[start + len(name) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: padding and EOS are left out, a sentinel reads `<extra_id_N>`.

        Raises `ValueError` for an id outside `0..size - 1`.
        """
        text, run_ids = [], []
        for token in map(int, ids):
            if not 0 <= token < self.size:
                raise ValueError(f"token id {token} is not in 0..{self.size - 1}")
            if token < self._num_pieces:
                run_ids.append(token)
            else:
                text += [self._model.Decode(run_ids), f"<extra_id_{self.size - 1 - token}>"]
                run_ids = []
        return "".join([*text, self._model.Decode(run_ids)])


_SENTINEL_NAMES = [(i, f"<extra_id_{i}>") for i in range(NUM_SENTINELS)]


def train(source: str, size: int, kind: str, output: str | Path) -> None:
    """Writes a SentencePiece model of `size - 100` pieces trained on the train split of `source`.

    Whitespace is kept as it stands and unknown characters fall back to bytes, so every text survives a round trip;
    line ends and indentation have pieces of their own. The same text gives the same bytes. Raises `InputError` for a
    size that is too small for the special pieces or too large for the text.
    """
    if kind not in TYPES:
        raise InputError(f"type={kind!r}; expected one of {', '.join(TYPES)}")
    smallest = 3 + 256 + len(_LINE_PIECES) + len(_RUN_PIECES) + NUM_SENTINELS + 100
    if size < smallest:
        raise InputError(f"size={size} is too small for the special pieces; expected {smallest} or more")
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_training_lines(source),
            model_writer=model,
            vocab_size=size - NUM_SENTINELS,
            model_type=kind,
            pad_id=Vocabulary.pad_id,
            eos_id=Vocabulary.eos_id,
            unk_id=Vocabulary.unk_id,
            bos_id=-1,
            user_defined_symbols=_LINE_PIECES + _RUN_PIECES,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            split_by_unicode_script=False,  # `snake_case` may be one piece: 8 % fewer tokens of Python
            character_coverage=0.9999,
            num_threads=2,  # part of the result: partial sums are added thread by thread
            minloglevel=1,
        )
    except RuntimeError as error:
        raise InputError(f"size={size} does not suit source {source!r}: {error}") from error
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    temporary.replace(output)


def _training_lines(source: str) -> Iterator[str]:
    """Lines of randomly ordered train documents, up to `TRAINING_CHARACTERS`."""
    corpus = Corpus(source)
    names = corpus.names("train")
    random.Random(0).shuffle(names)
    characters = 0
    for name in names:
        for line in corpus.read(name).text.split("\n"):
            # Indentation is the user-defined pieces' part, and lines over 4192 bytes are data.
            if line.strip() and len(line.encode()) < 4192:
                yield line.strip()
                characters += len(line)
        if characters > TRAINING_CHARACTERS:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="embedded, embedded_large, or a folder or file of text")
    parser.add_argument("--size", required=True, type=int, help="number of ids, the 100 sentinels included")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .model file to write")
    parser.add_argument("--type", default="unigram", choices=TYPES, help="algorithm (T5: unigram; Llama: bpe)")
    args = parse_arguments(parser)
    train(args.source, args.size, args.type, args.output)
    print(f"wrote {args.output}: {Vocabulary(args.output).size} ids, the last {NUM_SENTINELS} of them sentinels")


if __name__ == "__main__":
    run(main)
