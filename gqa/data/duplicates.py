"""Documents held against each other: copies, near-copies, evaluation sets, neighbours.

Near-copies are documents whose sets of word n-grams are alike (Jaccard similarity), found with MinHash and
locality-sensitive hashing (package datasketch). The first of them in the order of the source is kept, and what is held
against are those that are kept: so the result is the same whatever found the candidates.
"""

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gqa.data import corpus, tables
from gqa.data.ngrams import hashes, ngrams, plain_words
from gqa.errors import InputError

_SCHEME = "affine32"  # of datasketch: signatures are 32-bit numbers
_ORDER_PERMUTATIONS = 128
_ORDER_WORD_LENGTH = 4  # characters; shorter words say little about what a document is about
_NEIGHBOURS = 32  # of a document, among which the next one is looked for


@dataclass(frozen=True)
class DuplicateFilter:
    """Which documents are the same."""

    exact: bool  # those of the same text but for case and blanks
    near: bool  # and those that are alike
    similarity: float  # Jaccard similarity from which they are
    ngram: int  # words whose sets are compared
    permutations: int  # of MinHash: the estimate's deviation is about 1 / (2 sqrt(permutations))

    def __post_init__(self):
        if not 0 < self.similarity < 1:
            raise InputError(f"duplicates.similarity={self.similarity}; expected above 0 and below 1")
        if self.ngram < 1 or self.permutations < 16:
            raise InputError(
                f"duplicates.ngram={self.ngram}, permutations={self.permutations}; expected at least 1 and 16"
            )


@dataclass(frozen=True)
class ContaminationFilter:
    """How much of an evaluation set a document may hold."""

    ngram: int  # words in a row that are more than chance (GPT-3 took 13)
    max_share: float  # of a document's words that may stand in such n-grams; 0: none

    def __post_init__(self):
        if self.ngram < 1 or not 0 <= self.max_share < 1:
            raise InputError(
                f"contamination.ngram={self.ngram}, max_share={self.max_share}; expected at least 1, and 0 up to 1"
            )


@dataclass(frozen=True)
class Signatures:
    """What rows are compared by."""

    digest: bytes | None  # of the text: operators, punctuation and emoji count
    near: np.ndarray | None  # uint32 [permutations], MinHash of the n-grams; None: there are no words
    order: np.ndarray | None  # uint32 [permutations], MinHash of the longer words

    @classmethod
    def of(cls, text: str, duplicates: DuplicateFilter, order: bool) -> "Signatures":
        """Those of a text, as far as they are called for."""
        words = plain_words(text)
        plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
        digest = hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()[:16]
        near = None
        word_hashes = hashes(words)
        if duplicates.near and words:
            # A text of fewer words is one n-gram.
            found = ngrams(word_hashes, min(duplicates.ngram, len(words)))
            near = _minhash(found, duplicates.permutations)
        longer = [word for word in words if len(word) >= _ORDER_WORD_LENGTH] if order else []
        return cls(
            digest if duplicates.exact else None, near, _minhash(hashes(longer), _ORDER_PERMUTATIONS) if order else None
        )


class Duplicates:
    """The documents kept so far; `rejection` says whether the next is one of them again."""

    def __init__(self, duplicates: DuplicateFilter):
        self._similarity = duplicates.similarity
        self._exact: dict[bytes, str] = {}
        self._names: list[str] = []
        self._signatures: list[np.ndarray] = []
        self._bands = bands(duplicates) if duplicates.near else None

    def rejection(self, name: str, signatures: Signatures) -> tuple[str, str] | None:
        """The filter and the earlier document that a document is a copy of; `None`, and it counts as kept."""
        if signatures.digest is not None:
            if signatures.digest in self._exact:
                return "exact duplicate", f"of {self._exact[signatures.digest]}"
            self._exact[signatures.digest] = name
        if signatures.near is None:
            return None
        minhash = _as_minhash(signatures.near)
        candidates = sorted(self._bands.query(minhash))
        for candidate in candidates:
            similarity = similarity_of(signatures.near, self._signatures[candidate])
            if similarity >= self._similarity:
                return "near duplicate", f"{similarity:.2f} alike {self._names[candidate]}"
        self._bands.insert(len(self._names), minhash, check_duplication=False)
        self._names.append(name)
        self._signatures.append(signatures.near)
        return None


def bands(duplicates: DuplicateFilter):
    """datasketch's index for a threshold; its `hashranges` say which parts of two signatures make them candidates."""
    try:
        return _datasketch().MinHashLSH(threshold=duplicates.similarity, num_perm=duplicates.permutations)
    except ValueError as error:
        raise InputError(
            f"duplicates.similarity={duplicates.similarity} is too high for {duplicates.permutations} permutations; "
            "expected about 0.9 or less, or near=False"
        ) from error


def similarity_of(first: np.ndarray, second: np.ndarray) -> float:
    """The estimated Jaccard similarity of two signatures."""
    return float(np.mean(first == second))


class EvaluationSets(NamedTuple):
    """What documents are held against."""

    ngrams: np.ndarray  # uint64, sorted, each once
    num_texts: int  # with a word in them
    num_short: int  # of fewer than n words, which have no n-gram: they are not compared


def evaluation_sets(paths: Iterable[str | Path], n: int) -> EvaluationSets:
    """The n-grams of all texts in evaluation sets.

    A path is a text source, a table or a `.json` file, of which every text counts, inside of lists and objects too. A
    text of fewer than n words has none: a short answer is no evidence. Raises `InputError` for a path that is none of
    these, and for files without a text of n words.
    """
    found, num_texts, num_short = [np.zeros(0, np.uint64)], 0, 0
    for path in paths:
        here = [np.zeros(0, np.uint64)]
        for words in map(plain_words, _evaluation_texts(Path(path))):
            num_texts += bool(words)
            num_short += 0 < len(words) < n
            here.append(np.unique(ngrams(hashes(words), n)))
        found.append(np.unique(np.concatenate(here)))
        if not len(found[-1]):
            raise InputError(
                f"evaluation set {path} has no text of {n} words; expected one, or a smaller contamination.ngram"
            )
    return EvaluationSets(np.unique(np.concatenate(found)), num_texts, num_short)


def shared_words(words: Sequence[str], known: np.ndarray, n: int) -> float:
    """The share of words that stand in an n-gram of `known` (sorted)."""
    found = ngrams(hashes(words), n)
    if not len(found):
        return 0.0
    places = np.minimum(np.searchsorted(known, found), len(known) - 1)
    covered = np.zeros(len(words), bool)
    hits = np.flatnonzero(known[places] == found)
    for offset in range(n):
        covered[hits + offset] = True
    return float(covered.mean())


def similarity_order(signatures: Sequence[np.ndarray]) -> list[int]:
    """An order in which neighbours are alike (Shi et al. 2023, in-context pretraining): a walk over all documents.

    From each it goes to the most similar one, of some that locality-sensitive hashing finds, where it has not been
    yet; else to the first where it has not been.
    """
    forest = _datasketch().MinHashLSHForest(num_perm=_ORDER_PERMUTATIONS)
    for i, signature in enumerate(signatures):
        forest.add(i, _as_minhash(signature))
    forest.index()
    left = set(range(len(signatures)))
    order = []
    here = first = 0  # none before `first` is left
    while left:
        left.remove(here)
        order.append(here)
        near = [i for i in forest.query(_as_minhash(signatures[here]), _NEIGHBOURS) if i in left]
        if near:
            here = min(near, key=lambda i: (-similarity_of(signatures[here], signatures[i]), i))
        elif left:
            while first not in left:
                first += 1
            here = first
    return order


def _evaluation_texts(path: Path) -> Iterator[str]:
    if path.suffix == ".json" and path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"evaluation set {path} is no JSON ({error}); expected an array of texts or objects; nearest: .jsonl "
                "for an object a line"
            ) from error
        yield from _texts_in(content)
        return
    files = [path] if path.suffix in tables.SUFFIXES and path.is_file() else tables.table_files(path)
    if not files:
        yield from (text for _, _, text in corpus.texts(str(path)) if text is not None)
        return
    for file in files:
        for _, row in tables.read_columns(file, None):
            if isinstance(row, tables.BadRow):
                raise row
            yield from _texts_in(row)


def _texts_in(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _minhash(found: np.ndarray, permutations: int) -> np.ndarray:
    """uint32 [permutations] of a set of 64-bit numbers."""
    empty = _empty_minhash(permutations)
    minhash = _datasketch().MinHash(
        hashfunc=int, hashvalues=empty.hashvalues, permutations=empty.permutations, scheme=_SCHEME
    )
    minhash.update_batch((np.unique(found) >> np.uint64(32)).tolist())
    return minhash.hashvalues


@functools.cache
def _empty_minhash(permutations: int):
    return _datasketch().MinHash(num_perm=permutations, scheme=_SCHEME)  # drawing permutations takes longer than a text


def _as_minhash(signature: np.ndarray):
    permutations = _empty_minhash(len(signature)).permutations
    return _datasketch().MinHash(hashvalues=signature, permutations=permutations, scheme=_SCHEME)


@functools.cache
def _datasketch():
    try:
        import datasketch
    except ImportError as error:
        raise InputError(f"near-duplicates need the package datasketch ({error}): pip install -e '.[clean]'") from error
    return datasketch
