"""n-grams of words as 64-bit numbers, the same on every machine."""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing
_WORD = re.compile(r"\w+")


def plain_words(text: str) -> list[str]:
    """Lower-case words without what stands between them: what texts are compared by, however accents are encoded."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def hashes(words: Sequence[str]) -> np.ndarray:
    """uint64 [number of words]."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def ngrams(word_hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [number of words - n + 1], a number for every n-gram of words in order; none of fewer words."""
    length = len(word_hashes) - n + 1
    if length <= 0:
        return np.zeros(0, np.uint64)
    mixed = np.zeros(length, np.uint64)
    for i in range(n):
        mixed = (mixed ^ word_hashes[i : i + length]) * _FACTOR
        mixed ^= mixed >> np.uint64(29)
    return mixed


@functools.lru_cache(1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
