"""Several chunks of tokens in one row, each a segment that attends to itself alone.

A packed row of three segments of 3, 2 and 1 targets, in a row of 8:

    targets           5 6 1 7 1 1 0 0
    targets_segments  1 1 1 2 2 3 0 0      0 is padding
    decoder_inputs    0 5 6 0 7 0 0 0      targets shifted right within each segment; 0 (pad) begins, as in T5

A conversation begins with a token of its own, such as BOS, which is no target. Two of 4 and 3 tokens, the capitals
trained:

    tokens            a b C D, e f G
    targets           b C D f G 0 0 0
    loss_weights      0 1 1 0 1 0 0 0
    decoder_inputs    a b C e f 0 0 0

Of a pair of preferences, the chosen part is an odd segment and the rejected one the next: 1 and 2, 3 and 4, … The last
token of each part is an input too, with no target, for a reward model to read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from gqa.data.examples import PAIR_HEADER, SFT, TRAINED, Preferences, Task
from gqa.errors import InputError


def pack(
    chunks: Iterable[np.ndarray],
    room: Callable[[np.ndarray], tuple[int, int]],
    capacities: tuple[int, int],
    least_room: tuple[int, int],
    num_open_rows: int,
) -> Iterator[list[np.ndarray]]:
    """Rows of chunks whose `room(chunk)` adds up to no more than `capacities` in (inputs, targets).

    First fit: a chunk goes to the first open row with room, and to a new one otherwise, for which the oldest of
    `num_open_rows` is closed. A row without `least_room` is closed at once.
    """
    open_rows: list[list] = []  # [inputs left, targets left, chunks], oldest first
    for chunk in chunks:
        inputs, targets = room(chunk)
        row = next((row for row in open_rows if row[0] >= inputs and row[1] >= targets), None)
        if row is None:
            row = [*capacities, []]
            open_rows.append(row)
        row[0] -= inputs
        row[1] -= targets
        row[2].append(chunk)
        assert row[0] >= 0 and row[1] >= 0, (row[:2], len(chunk))
        if row[0] < least_room[0] or row[1] < least_room[1]:
            open_rows.remove(row)
            yield row[2]
        elif len(open_rows) > num_open_rows:
            yield open_rows.pop(0)[2]
    for row in open_rows:
        yield row[2]


def encode_record(chunks: Sequence[np.ndarray]) -> bytes:
    """Little-endian int32: the number of chunks, the length of each, the tokens of all."""
    header = np.array([len(chunks), *map(len, chunks)], "<i4")
    return b"".join(part.astype("<i4", copy=False).tobytes() for part in (header, *chunks))


def decode_record(record: bytes) -> list[np.ndarray]:
    """Inverse of `encode_record`; raises `InputError` for bytes that it did not write."""
    if len(record) >= 4 and len(record) % 4 == 0:
        values = np.frombuffer(record, "<i4")
        num_chunks = int(values[0])
        lengths, tokens = values[1 : 1 + num_chunks], values[1 + max(num_chunks, 0) :]
        if 0 < num_chunks == len(lengths) and lengths.min() > 0 and lengths.sum() == len(tokens):
            return np.split(tokens, np.cumsum(lengths)[:-1])
    raise InputError(f"a record of {len(record)} bytes is damaged; delete the folder of records and prepare it again")


def packed_row(chunks: Sequence[np.ndarray], task: Task, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One row of a batch: the examples that `task` makes of `chunks` with noise from `rng`.

    int32 `targets`, `targets_segments` and `decoder_inputs`, float32 `loss_weights` (1 on targets, 0 on padding), each
    [targets_length]; and, for a task with inputs, int32 `inputs` and `inputs_segments` [inputs_length]; for
    preferences, int32 `pairs` and `ratings` [max_pairs], each pair's number and rating, 0 behind the last pair.
    """
    if isinstance(task, SFT):
        return _conversations_row(chunks, task.targets_length)
    if isinstance(task, Preferences):
        return _pairs_row(chunks, task)
    pairs = [task.example(chunk, rng) for chunk in chunks]
    targets = [targets for _, targets in pairs]
    targets_segments = _segments(targets, task.targets_length)
    row = {
        "targets": _joined(targets, task.targets_length),
        "targets_segments": targets_segments,
        "decoder_inputs": _joined([_shift_right(part) for part in targets], task.targets_length),
        "loss_weights": (targets_segments > 0).astype(np.float32),
    }
    if task.inputs_length:
        inputs = [inputs for inputs, _ in pairs]
        row["inputs"] = _joined(inputs, task.inputs_length)
        row["inputs_segments"] = _segments(inputs, task.inputs_length)
    return row


def _conversations_row(chunks: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    tokens = [chunk % TRAINED for chunk in chunks]
    return {
        "targets": _joined([part[1:] for part in tokens], length),
        "targets_segments": _segments([part[1:] for part in tokens], length),
        "decoder_inputs": _joined([part[:-1] for part in tokens], length),
        "loss_weights": _joined([chunk[1:] >= TRAINED for chunk in chunks], length).astype(np.float32),
    }


def _pairs_row(chunks: Sequence[np.ndarray], task: Preferences) -> dict[str, np.ndarray]:
    parts = []
    for chunk in chunks:
        pair = np.split(chunk[PAIR_HEADER:], [chunk[PAIR_HEADER - 1]])
        parts += [np.append(part, 0) for part in pair]
    return _conversations_row(parts, task.targets_length) | {
        "pairs": _joined([[chunk[0]] for chunk in chunks], task.max_pairs),
        "ratings": _joined([[chunk[1]] for chunk in chunks], task.max_pairs),
    }


def _joined(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    row = np.zeros(length, np.int32)
    tokens = np.concatenate(parts)
    row[: len(tokens)] = tokens
    return row


def _segments(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    return _joined([np.full(len(part), i) for i, part in enumerate(parts, start=1)], length)


def _shift_right(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], tokens[:-1]])
