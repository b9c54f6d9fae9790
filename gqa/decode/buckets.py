"""Few shapes for many requests: prompts are padded to one of a few lengths, so that few programs compile."""

from collections.abc import Sequence

import numpy as np

SMALLEST = 16  # tokens; shorter prompts are padded to it


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, … (powers of two and the halves between) that holds `length` tokens."""
    size = SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def padded(rows: Sequence[Sequence[int]], batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[batch_size, length]` int32, padded on the right, and their lengths `[batch_size]`, 0 where no row is."""
    assert len(rows) <= batch_size and max(map(len, rows), default=0) <= length, (len(rows), batch_size, length)
    tokens = np.zeros((batch_size, length), np.int32)
    lengths = np.zeros(batch_size, np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        lengths[number] = len(row)
    return tokens, lengths


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Share of the positions read that are padding, when rows of these lengths are batched in order of length."""
    ordered = sorted(lengths)
    ends = [min(first + batch_size, len(ordered)) for first in range(0, len(ordered), batch_size)]
    read = sum(batch_size * bucket(ordered[end - 1]) for end in ends)
    return 1 - sum(ordered) / read if read else 0.0
