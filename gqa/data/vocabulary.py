r"""python -m gqa.data.vocabulary --source=embedded_large --size=4096 --output=FILE [--type=unigram]

Trains a SentencePiece vocabulary on the train split of whatever preparation reads: text, tables, conversations, a
public dataset. Digits are pieces by themselves, and what has no piece is spelled in bytes.

    python -m gqa.data.vocabulary --type=llama --source=FOLDER --size=32000 --output=tokenizer.model
    python -m gqa.data.vocabulary --task=supervised --source=qa.csv --fields=inputs=question,targets=answer \
        --size=8192 --output=FILE

| --type | algorithm | special ids | |
|---|---|---|---|
| `unigram`, `bpe` | as named | T5's: pad 0, EOS 1, unknown 2 | T5's 100 sentinels follow |
| `llama` | BPE | Llama's: unknown 0, BOS 1, EOS 2, no padding | a space is put before a text |

--size counts the sentinels, which are no part of the file: as in T5, whoever loads it appends them.
"""

import argparse
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from gqa import files
from gqa.command_line import parse_arguments, run
from gqa.errors import InputError

NUM_SENTINELS = 100  # T5's extra_ids
TYPES = ("unigram", "bpe", "llama")

# Sampled training text: enough for every piece of a small vocabulary to be seen often, and a minute of training.
TRAINING_CHARACTERS = 20_000_000

_LINE_BYTES = 4191  # SentencePiece passes over longer ones

_SPACE = "\u2581"  # what SentencePiece writes for a space inside a piece
_ANCHOR = "\ue000"  # a private character, part of no piece
# A sentinel that is a piece of the file: its name and score, and its type, by which text is read as it.
_OWN_SENTINEL = re.compile(rb"\n.(\n.(?:\xe2\x96\x81)?<extra_id_\d\d?>(?:\x15.{4})?)(?:\x18.)?", re.DOTALL)
_LINE_PIECES = ["\n", "\t", "\n\n", "\n\n\n"] + ["\n" + _SPACE * n for n in (4, 8, 12, 16, 20)]
_RUN_PIECES = [_SPACE * n for n in (2, 3, 4, 5, 6, 7, 8, 12, 16)]


class Vocabulary:
    """Token ids of text: a SentencePiece model whose ids T5's sentinels follow, or end.

    The file holds `size - 100` pieces with pad 0, eos 1 and unk 2; the sentinels are the last ids, descending
    (`<extra_id_0>` is `size - 1`), and are added here, as seqio (`extra_ids=100`) and transformers' `T5Tokenizer` add
    them: one file and one numbering for all three. A file that ends with them itself, as mT5's does, gets no others; a
    text that spells one is text there too. Trap: transformers 5 rebuilds the tokenizer with T5's own treatment of
    spaces whatever the file says, so there the ids of indented text differ.

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
        self._num_sentinels = NUM_SENTINELS if is_t5 else 0
        self._num_pieces = num_pieces
        if is_t5 and any(self._model.PieceToId(space + "<extra_id_0>") != self.unk_id for space in ("", _SPACE)):
            self._keep_own_sentinels()
        # SentencePiece writes a space as U+2581, so it reads back a U+2581 of the text as a space: where the model
        # has byte pieces, that character is spelled in bytes instead.
        byte_ids = [self._model.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_mark_ids = None if self.unk_id in byte_ids else byte_ids
        self._num_anchor_ids = len(self._model.Encode(_ANCHOR))
        self._adds_space = self._model.IdToPiece(self._model.Encode("a")[0]).startswith(_SPACE)

    def _keep_own_sentinels(self) -> None:
        """Counts the file's last pieces as the sentinels, and reads no text as one of them."""
        self._model.LoadFromSerializedProto(_OWN_SENTINEL.sub(_unused, self.path.read_bytes()))
        self._num_pieces -= NUM_SENTINELS
        for index, name in _SENTINEL_NAMES:
            token = max(self.sentinel_id(index), 0)
            if self._model.IdToPiece(token).removeprefix(_SPACE) != name or not self._model.IsUnused(token):
                raise InputError(
                    f"vocabulary {self.path} has <extra_id_0>, but not all {NUM_SENTINELS} sentinels of T5 as last ids"
                )

    @property
    def files(self) -> list[Path]:
        """The files that it is read from, for a checkpoint to take along."""
        return [self.path]

    @functools.cached_property
    def sha256(self) -> str:
        """Of all that decides its ids."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

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
            return self.encode_all([text], num_threads=1)[0].tolist()
        return self.encode_all([_ANCHOR + text], num_threads=1)[0][self._num_anchor_ids :].tolist()

    def encode_all(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        """`encode` of each text, int32, on `num_threads` threads; halves of surrogate pairs are question marks."""
        try:
            return self._encode_all(texts, num_threads)
        except TypeError:  # rare, so no look at every text before
            return self._encode_all(list(map(without_surrogates, texts)), num_threads)

    def _encode_all(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        if self._space_mark_ids is None:
            return self._model.EncodeAsNumpy(list(texts), num_threads=num_threads)
        # What follows on a spelled space mark is no text of its own: the model must not put a space before it.
        anchor, skipped = (_ANCHOR, self._num_anchor_ids) if self._adds_space else ("", 0)
        parts = [text.split(_SPACE) for text in texts]
        pieces = [anchor * (i > 0) + part for text in parts for i, part in enumerate(text)]
        encoded = iter(self._model.EncodeAsNumpy(pieces, num_threads=num_threads))
        rows = []
        for text in parts:
            row = [next(encoded)]
            for _ in text[1:]:
                row += [self._space_mark_ids, next(encoded)[skipped:]]
            rows.append(row[0] if len(row) == 1 else np.concatenate(row, dtype=np.int32))
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


def _unused(piece: re.Match[bytes]) -> bytes:
    """A piece in SentencePiece's file as one of type 5, which has its id and is no part of any text."""
    entry = piece[1] + b"\x18\x05"
    return b"\n" + bytes([len(entry)]) + entry


def without_surrogates(text: str) -> str:
    """`text` with question marks for halves of surrogate pairs, which JSON may spell and UTF-8 has none of."""
    return text.encode("utf-8", "replace").decode()


_SENTINEL_NAMES = [(i, f"<extra_id_{i}>") for i in range(NUM_SENTINELS)]


_T5_IDS = {"pad_id": Vocabulary.pad_id, "eos_id": Vocabulary.eos_id, "unk_id": Vocabulary.unk_id, "bos_id": -1}
_LLAMA_IDS = {"pad_id": -1, "eos_id": 2, "unk_id": 0, "bos_id": 1}


def train(
    source: str | None,
    size: int,
    kind: str,
    output: str | Path,
    *,
    task: str = "causal_lm",
    fields: Mapping[str, str] | None = None,
) -> None:
    """Writes a SentencePiece model of `size` ids (of T5's kinds, 100 of them are sentinels: no pieces).

    `kind` is one of `TYPES`; it is trained on the train split of what `task` reads (`gqa.data.tasks.open_source`).
    Whitespace is kept as it stands and unknown characters fall back to bytes, so every text survives a round trip; of
    T5's kinds line ends and indentation have pieces of their own. The same text gives the same bytes. Raises
    `InputError` for a source that cannot be read, and for a size that is too small for the special pieces or too large
    for the text.
    """
    if kind not in TYPES:
        raise InputError(f"type={kind!r}; expected one of {', '.join(TYPES)}")
    is_llama = kind == "llama"
    num_pieces = size if is_llama else size - NUM_SENTINELS
    # Llama's has none: it learns runs of spaces, and a line end is a byte.
    symbols = [] if is_llama else _LINE_PIECES + _RUN_PIECES
    smallest = 3 + 256 + len(symbols) + 100 + size - num_pieces
    if size < smallest:
        raise InputError(f"size={size} is too small for the special pieces; expected {smallest} or more")
    output = Path(output)
    lines = _training_lines(source, task, fields, indented=is_llama)
    first = next(lines, None)  # what is wrong with the source shows here, not within SentencePiece
    if first is None:
        raise InputError(f"the train split of {source or task} has no text")
    output.parent.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            vocab_size=num_pieces,
            model_type="bpe" if is_llama else kind,
            **(_LLAMA_IDS if is_llama else _T5_IDS),
            user_defined_symbols=symbols,
            allow_whitespace_only_pieces=is_llama,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=is_llama,
            split_digits=True,
            split_by_unicode_script=False,  # `snake_case` may be one piece: 8 % fewer tokens of Python
            character_coverage=0.9999,
            num_threads=2,  # part of the result: partial sums are added thread by thread
            minloglevel=1,
        )
    except RuntimeError as error:
        most = re.search(r"Please set it to a value <= (\d+)", str(error))
        if most is None:
            raise InputError(f"size={size} does not suit source {source or task!r}: {error}") from error
        largest = int(most[1]) + size - num_pieces
        expected = f"{smallest} to {largest}" if largest >= smallest else f"more text, for {smallest} or more"
        raise InputError(
            f"size={size} does not suit source {source or task!r}, which has text for {largest} ids; "
            f"expected {expected}"
        ) from error
    with files.whole(output, shared=True) as unfinished:
        unfinished.write_bytes(model.getvalue())


def _training_lines(source: str | None, task: str, fields: Mapping[str, str] | None, indented: bool) -> Iterator[str]:
    """Lines of train documents, up to `TRAINING_CHARACTERS`, with or without their indentation."""
    characters = 0
    for text in _training_texts(source, task, fields):
        for line in itertools.chain.from_iterable(map(_cut, without_surrogates(text).split("\n"))):
            if line.strip():
                yield line.rstrip() if indented else line.strip()
                characters += len(line)
        if characters > TRAINING_CHARACTERS:
            return


def _cut(line: str) -> Iterator[str]:
    """Parts of at most `_LINE_BYTES`, cut at blanks, or anywhere in scripts without; longer words in ASCII are data."""
    content, start = line.encode(), 0
    while len(content) - start > _LINE_BYTES:
        end = content.rfind(b" ", start, start + _LINE_BYTES + 1)
        if end >= 0:
            yield content[start:end].decode()
            start = end + 1
            continue
        end = start + _LINE_BYTES
        while content[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        if content[start:end].isascii():
            start = content.find(b" ", end) + 1
            if not start:
                return
        else:
            yield content[start:end].decode()
            start = end
    yield content[start:].decode()


def _training_texts(source: str | None, task: str, fields: Mapping[str, str] | None) -> Iterator[str]:
    """Documents of a folder in random order, and of tables every so many rows: of the whole source in either case."""
    from gqa.data import tables, tasks  # they need this module's Vocabulary

    opened = tasks.open_source(task, source, fields)
    step = 1
    if isinstance(opened, tables.Table):
        step = max(1, sum(file.stat().st_size for file in opened.files("train")) // TRAINING_CHARACTERS)
    yield from itertools.islice(tasks.texts_of(task, opened, "train", fields), 0, None, step)


def main() -> None:
    from gqa.data.tasks import parse_fields

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="embedded, embedded_large, a folder or file of text or tables, tfds:NAME")
    parser.add_argument("--task", default="causal_lm", help="what the source is read as (causal_lm: texts)")
    parser.add_argument(
        "--fields", type=parse_fields, metavar="ROLE=COLUMN,…", help="columns of tables: text=A, or inputs=A,targets=B"
    )
    parser.add_argument("--size", required=True, type=int, help="number of ids, sentinels included")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .model file to write")
    parser.add_argument("--type", default="unigram", choices=TYPES, help="as in the table (default unigram, as T5)")
    args = parse_arguments(parser)
    train(args.source, args.size, args.type, args.output, task=args.task, fields=args.fields)
    vocabulary = Vocabulary(args.output, foreign=True)
    sentinels = f", the last {NUM_SENTINELS} of them sentinels" if args.type != "llama" else ""
    print(f"wrote {args.output}: {vocabulary.size} ids{sentinels}")


if __name__ == "__main__":
    run(main)
