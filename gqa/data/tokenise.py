"""Texts, pairs and conversations to packed records of a split, block by block: an interrupted preparation goes on."""

import dataclasses
import itertools
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gqa.data.examples import CONVERSATIONS, TRAINED, Supervised, Task
from gqa.data.packing import encode_record, pack
from gqa.data.record_file import RecordWriter, framed, read_framed
from gqa.data.tokenizer_json import TokenizerJson
from gqa.data.vocabulary import Vocabulary

Item = str | tuple[str, str] | np.ndarray  # a text; of `supervised`, inputs and targets; of conversations, their chunk
SIDES = ("inputs", "targets")

BLOCK = 16_384  # items packed together; a shorter split is one block
BLOCK_FORMAT = 2  # of a block's file, which another version's preparation may have left
_TEXTS_PER_CALL = 64  # tokenised together
_NUM_OPEN_ROWS = 32
_LENGTHS = 32  # powers of two that lengths are counted by
ATTEMPT = ".attempt"  # suffix of files that are being written
_FINISHED = "*.array_record.*.npz"  # totals of the blocks that are complete
_COUNTED_TOGETHER = 1 << 20  # tokens


@dataclass
class Totals:
    """What is in some records; those of blocks add up."""

    documents: int  # texts, pairs or conversations
    tokens: int  # of text, each once, without sentinels
    records: int  # packed rows
    targets: np.ndarray  # [V], how often each id is expected among the targets
    lengths: np.ndarray  # [2, _LENGTHS], how many have up to 2**i tokens, of inputs (or texts) and of targets
    trimmed: np.ndarray  # [2], how many inputs and targets were longer than a row

    @classmethod
    def zeros(cls, vocabulary_size: int) -> "Totals":
        """Of nothing."""
        counts = [np.zeros(shape, np.int64) for shape in ((2, _LENGTHS), (2,))]
        return cls(0, 0, 0, np.zeros(vocabulary_size), *counts)

    def add(self, other: "Totals") -> None:
        """Adds those of other records."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def save(self, path: Path) -> None:
        """Writes them as a file that is there when it is complete."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{ATTEMPT}")
        with temporary.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Totals":
        """Those of a saved file."""
        with np.load(path) as arrays:
            return cls(
                *(arrays[f.name] if arrays[f.name].ndim else int(arrays[f.name]) for f in dataclasses.fields(cls))
            )

    def length_histogram(self, supervised: bool) -> dict[str, dict[str, int]]:
        """Side -> most tokens, a power of two -> how many have so many but more than half."""
        sides = dict(zip(SIDES if supervised else ("texts",), self.lengths, strict=False))
        return {side: {str(1 << i): int(n) for i, n in enumerate(counts) if n} for side, counts in sides.items()}


def write_split(
    path: Path,
    items: Callable[[], Iterator[Item]],
    num_items: int | None,
    vocabulary: Vocabulary | TokenizerJson,
    task: Task,
) -> Totals:
    """Writes the records of a split to the file `path` and gives what is in them.

    Blocks that a call before has finished lie beside it, as `PATH.NUMBER` and `PATH.NUMBER.npz`, and are not made
    again: their items are read and passed over.
    """
    totals = Totals.zeros(task.vocabulary_size)
    description = f"prepare {path.name.split('.')[0]}"
    remaining = items()
    with (
        RecordWriter(path) as writer,
        tqdm(total=num_items, desc=description, unit=" texts", delay=1, dynamic_ncols=True) as progress,
    ):
        for number in itertools.count():
            block, done = path.with_name(f"{path.name}.{number:05d}"), path.with_name(f"{path.name}.{number:05d}.npz")
            mine = _Counted(itertools.islice(remaining, BLOCK), progress)
            if done.exists():
                deque(mine, maxlen=0)
                for record in read_framed(block):
                    writer.write(record)
            else:
                made = _write_block(block, mine, vocabulary, task, writer)
                made.save(done)
            totals.add(Totals.load(done))
            if mine.count < BLOCK:
                return totals


def write_block(path: Path, items: Iterator[Item], vocabulary: Vocabulary | TokenizerJson, task: Task) -> None:
    """Makes a block alone, where it is not there yet: `PATH` and, when that is complete, `PATH.npz`.

    Several may be at it at a time: what they write is the same.
    """
    done = path.with_name(f"{path.name}.npz")
    if done.exists():
        return
    mine = path.with_name(f".{path.name}.{uuid.uuid4().hex}{ATTEMPT}")
    totals = Totals.zeros(task.vocabulary_size)
    with mine.open("wb") as block:
        for record in packed_records(items, vocabulary, task, totals):
            block.write(framed(record))
    mine.replace(path)
    totals.save(done)


def join_blocks(path: Path, num_blocks: int) -> Totals:
    """Writes the records of a split from its blocks, and gives what is in them."""
    blocks = [path.with_name(f"{path.name}.{number:05d}") for number in range(num_blocks)]
    totals = [Totals.load(block.with_name(f"{block.name}.npz")) for block in blocks]
    with RecordWriter(path) as writer:
        for block in tqdm(blocks, desc=f"join {path.name.split('.')[0]}", unit=" blocks", delay=1):
            for record in read_framed(block):
                writer.write(record)
    for other in totals[1:]:
        totals[0].add(other)
    return totals[0]


def finished_texts(folder: Path) -> int:
    """How many items are in the finished blocks of an interrupted preparation."""
    return sum(Totals.load(path).documents for path in folder.glob(_FINISHED))


def remove_blocks(folder: Path) -> None:
    """Removes the blocks that `write_split` has made records of."""
    for path in folder.glob(_FINISHED):
        path.with_suffix("").unlink()
        path.unlink()
    for path in folder.glob(f".*{ATTEMPT}"):  # of a process that was killed
        path.unlink()


class _Counted:
    def __init__(self, items: Iterator[Item], progress: tqdm):
        self._items, self._progress, self.count = items, progress, 0

    def __iter__(self):
        return self

    def __next__(self) -> Item:
        item = next(self._items)
        self.count += 1
        self._progress.update()
        return item


def _write_block(
    path: Path, items: Iterator[Item], vocabulary: Vocabulary | TokenizerJson, task: Task, writer: RecordWriter
) -> Totals:
    """Writes a block's records to `writer`, and to a file of their own for a preparation that goes on from there."""
    totals = Totals.zeros(task.vocabulary_size)
    with path.open("wb") as block:
        for record in packed_records(items, vocabulary, task, totals):
            block.write(framed(record))
            writer.write(record)
    return totals


def packed_records(
    items: Iterator[Item], vocabulary: Vocabulary | TokenizerJson, task: Task, totals: Totals
) -> Iterator[bytes]:
    """The records of one block's items; what is in them is added to `totals`, complete at their end."""
    items = _counted(items, totals)
    if isinstance(task, tuple(CONVERSATIONS.values())):
        chunks = _conversations(items, task, totals)
    else:
        chunks = (_pairs if isinstance(task, Supervised) else _pieces)(items, vocabulary, task, totals)
    capacities = (task.inputs_length, task.targets_length)
    for row in pack(chunks, task.room, capacities, task.least_room, _NUM_OPEN_ROWS):
        totals.records += 1
        totals.tokens += sum(map(task.num_tokens, row))
        yield encode_record(row)


def _counted(items: Iterator[Item], totals: Totals) -> Iterator[Item]:
    for item in items:
        totals.documents += 1
        yield item


def _pieces(
    items: Iterator[str], vocabulary: Vocabulary | TokenizerJson, task: Task, totals: Totals
) -> Iterator[np.ndarray]:
    """Texts cut into pieces of at most the task's `max_tokens`."""
    end = np.array([vocabulary.eos_id] if task.ends_documents and vocabulary.eos_id >= 0 else [], np.int32)
    targets = _TargetCounts(totals.targets)
    for ids in _encoded(items, vocabulary, lambda texts: texts):
        _count_length(totals, 0, len(ids))
        tokens = np.concatenate([ids, end]) if len(end) else ids
        for start in range(0, len(tokens), task.max_tokens):
            piece = tokens[start : start + task.max_tokens]
            if len(piece) >= task.min_tokens:
                share, num_sentinels, num_eos = task.expected_targets(len(piece))
                targets.add(piece, share)
                totals.targets[Vocabulary.eos_id] += num_eos
                totals.targets[task.vocabulary_size - num_sentinels :] += 1
                yield piece
    targets.flush()


def _pairs(
    items: Iterator[tuple[str, str]], vocabulary: Vocabulary | TokenizerJson, task: Supervised, totals: Totals
) -> Iterator[np.ndarray]:
    """Pairs, what does not fit a row cut off."""
    targets_counts = _TargetCounts(totals.targets)
    encoded = _encoded(items, vocabulary, lambda pairs: [text for pair in pairs for text in pair])
    for inputs, targets in zip(encoded, encoded, strict=True):
        for side, (ids, length) in enumerate(((inputs, task.inputs_length), (targets, task.targets_length))):
            _count_length(totals, side, len(ids) + 1)
            totals.trimmed[side] += len(ids) + 1 > length
        chunk = task.chunk(inputs, targets)
        targets_counts.add(task.example(chunk)[1], 1.0)
        yield chunk
    targets_counts.flush()


def _conversations(items: Iterator[np.ndarray], task: Task, totals: Totals) -> Iterator[np.ndarray]:
    """Conversations as they come, cut to a row already."""
    targets = _TargetCounts(totals.targets)
    for chunk in items:
        _count_length(totals, 0, task.num_tokens(chunk))
        targets.add(chunk[chunk >= TRAINED] % TRAINED, 1.0)
        yield chunk
    targets.flush()


def _encoded(
    items: Iterator[Item],
    vocabulary: Vocabulary | TokenizerJson,
    texts_of: Callable[[Sequence[Item]], Sequence[str]],
) -> Iterator[np.ndarray]:
    """The ids of all texts; some are tokenised while those before are packed."""
    num_threads = os.cpu_count() or 1
    pending = deque()
    with ThreadPoolExecutor(num_threads) as executor:
        while batch := list(itertools.islice(items, _TEXTS_PER_CALL)):
            pending.append(executor.submit(vocabulary.encode_all, texts_of(batch), num_threads=1))
            if len(pending) > 2 * num_threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


class _TargetCounts:
    """Adds weights to the counts of tokens in the order in which they come: `np.add.at`'s sums, in less time."""

    def __init__(self, counts: np.ndarray):
        self._counts = counts
        self._tokens: list[np.ndarray] = []
        self._weights: list[float] = []
        self._size = 0

    def add(self, tokens: np.ndarray, weight: float) -> None:
        """Adds `weight` to each token's count, once for each time that it is there."""
        self._tokens.append(tokens)
        self._weights.append(weight)
        self._size += len(tokens)
        if self._size > _COUNTED_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Adds what has been kept back."""
        # The counts so far come first: sums of floats depend on their order.
        places = np.concatenate([np.arange(len(self._counts)), *self._tokens])
        weights = np.repeat(self._weights, list(map(len, self._tokens)))
        self._counts[:] = np.bincount(places, np.concatenate([self._counts, weights]))
        self._tokens, self._weights, self._size = [], [], 0


def _count_length(totals: Totals, side: int, length: int) -> None:
    totals.lengths[side, max(length - 1, 0).bit_length()] += 1
