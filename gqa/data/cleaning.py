"""What a document has to be to be kept: repaired, then held against one filter after the other.

A row is a text (`{"text": …}`) or a pair (`{"inputs": …, "targets": …}`). Each of its texts has filters of its own, a
pair has some more. `Cleaner.clean` says of one row what becomes of it; what needs several rows, such as duplicates, is
`gqa.data.duplicates`'. Numbers come from a config: `configs/cleaning/`.

The filters of texts are those of MassiveText (Rae et al. 2021, appendix A.1.1 and table A1), lists of phrases and a
guess of the language; those of pairs the compression ratio and the similarity of both sides.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gqa.command_line import build
from gqa.data.duplicates import ContaminationFilter, DuplicateFilter, Signatures, shared_words
from gqa.data.ngrams import hashes, ngrams, plain_words
from gqa.errors import InputError

TEXT, PAIR = ("text",), ("inputs", "targets")
ORDERS = ("similarity",)

# A document of these has at least `min_stop_words` kinds of them (Rae et al. 2021, A.1.1).
STOP_WORDS = frozenset("the be to of and that have with".split())

_TOP_FROM, _DUPLICATE_FROM = 2, 5  # n of the first of the n-grams' limits
_LANGUAGE_CHARACTERS = 2000  # that the language is guessed from
_BULLETS = ("•", "‣", "●", "◦", "▪", "- ", "* ")
_LINE_ENDS = ("\r\n", "\r", "\u2028", "\u2029", "\x85")
_SUSPECT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f&]")  # in ASCII: control characters, entities
_ELLIPSES = ("...", "…")

Rejection = tuple[str, str]  # name of the filter, and what it found


@dataclass(frozen=True)
class TextFilters:
    """What a text may be; a limit of None and an empty list are no filter. Shares are of 1."""

    repair: bool  # mojibake, control characters, line ends, Unicode NFC; no blanks at the ends of lines
    collapse_spaces: bool  # several blanks are one, three empty lines one: not for source code
    min_characters: int | None
    max_characters: int | None
    min_words: int | None  # words are what blanks separate
    max_words: int | None
    min_mean_word_length: float | None
    max_mean_word_length: float | None
    max_symbols_per_word: float | None  # of `#`, and of ellipses
    max_bullet_lines: float | None  # share of lines
    max_ellipsis_lines: float | None  # share of lines that end with one
    min_alphabetic_words: float | None  # share of words with a letter in them
    min_stop_words: int | None  # kinds of STOP_WORDS
    max_duplicate_lines: float | None  # share of lines, and of the characters of lines, that stood before
    max_duplicate_line_characters: float | None
    max_duplicate_paragraphs: float | None
    max_duplicate_paragraph_characters: float | None
    max_top_ngrams: tuple[float, ...]  # share of characters in the most frequent n-gram of words, n = 2, 3, …
    max_duplicate_ngrams: tuple[float, ...]  # share in n-grams that stood before, n = 5, 6, …
    blocked: tuple[str, ...]  # words and phrases
    blocked_files: tuple[str, ...]  # text files of more of them, one a line
    max_blocked: int  # how many may be there
    languages: tuple[str, ...]  # ISO 639-1 codes, of which one is guessed
    min_language_probability: float

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(v, int | float) and not v >= 0 for v in values):  # NaN neither
                raise InputError(f"cleaning: {field.name}={value}; expected 0 or more")


@dataclass(frozen=True)
class PairFilters:
    """What both sides of a pair may be to each other; None is no filter."""

    min_compression: float | None  # words of the inputs for each of the targets
    max_compression: float | None
    min_similarity: float | None  # Jaccard similarity of their sets of words
    max_similarity: float | None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value >= 0:
                raise InputError(f"cleaning: {field.name}={value}; expected 0 or more")


@dataclass(frozen=True)
class CleaningConfig:
    """What a cleaning keeps: filters of a text, or of the two of a pair."""

    duplicates: DuplicateFilter
    contamination: ContaminationFilter
    text: TextFilters | None = None
    inputs: TextFilters | None = None
    targets: TextFilters | None = None
    pair: PairFilters | None = None
    order: str | None = None  # similarity: documents that are alike follow on each other; None: the source's order

    def __post_init__(self):
        given = [name for name in (*TEXT, *PAIR, "pair") if getattr(self, name) is not None]
        if given not in (["text"], ["inputs", "targets"], ["inputs", "targets", "pair"]):
            raise InputError(
                f"cleaning has filters of {', '.join(given) or 'nothing'}; expected text, or inputs and targets"
            )
        if self.order is not None and self.order not in ORDERS:
            raise InputError(f"cleaning: order={self.order!r}; expected {' or '.join(ORDERS)}, or None")

    @property
    def roles(self) -> tuple[str, ...]:
        """The texts of a row."""
        return TEXT if self.text is not None else PAIR


def parse(config: Mapping) -> CleaningConfig:
    """The validated filters of a config file's dictionary; an unknown or missing key raises `InputError`."""
    return build(CleaningConfig, config.to_dict() if hasattr(config, "to_dict") else config, "config")


@dataclass(frozen=True)
class Cleaned:
    """What became of a row."""

    row: dict[str, str]  # repaired; as it was where it is rejected
    repaired: bool  # a repair has changed it
    rejection: Rejection | None = None
    signatures: Signatures | None = None  # of a row that is kept so far, for what compares rows


class Cleaner:
    """Cleans rows one by one. `contaminated`: hashes of the evaluation sets' n-grams, sorted."""

    def __init__(self, config: CleaningConfig, contaminated: np.ndarray):
        """Raises `InputError` for a file of phrases that is not there and for unknown languages."""
        self._config, self._contaminated = config, contaminated
        self._texts = {role: _TextCleaner(getattr(config, role)) for role in config.roles}

    def clean(self, row: Mapping[str, str]) -> Cleaned:
        """What becomes of a row; texts beside its roles' pass through."""
        found = {role: self._texts[role].repair(row[role]) for role in self._config.roles}
        repaired = any(found[role] != row[role] for role in found)
        clean = {**row, **found}
        rejection = next(self._rejections(found), None)
        if rejection is not None:
            return Cleaned(dict(row), repaired, rejection)
        signatures = Signatures.of("\n".join(found.values()), self._config.duplicates, bool(self._config.order))
        return Cleaned(clean, repaired, None, signatures)

    def _rejections(self, texts: Mapping[str, str]) -> Iterator[Rejection]:
        for role, text in texts.items():
            if not text.strip():
                yield "empty", f"no {role}"
            rejection = self._texts[role].rejection(text)
            if rejection is not None:
                name, why = rejection
                yield name if role in TEXT else f"{role}: {name}", why
        if self._config.pair is not None:
            yield from _pair_rejections(*texts.values(), self._config.pair)
        if len(self._contaminated):
            words = plain_words("\n".join(texts.values()))
            share = shared_words(words, self._contaminated, self._config.contamination.ngram)
            if share > self._config.contamination.max_share:
                yield "contamination", f"{share:.0%} of the words are in an evaluation set"


class _TextCleaner:
    def __init__(self, filters: TextFilters):
        self._filters = filters
        phrases = [" ".join(plain_words(phrase)) for phrase in (*filters.blocked, *_lines(filters.blocked_files))]
        self._blocked = frozenset(phrase for phrase in phrases if phrase)
        self._blocked_phrases = sorted(phrase for phrase in self._blocked if " " in phrase)
        self._language = _language_of(filters.languages) if filters.languages else None

    def repair(self, text: str) -> str:
        if self._filters.repair:
            text = _repaired(text)
        if self._filters.collapse_spaces:
            text = re.sub(r"[^\S\n]{2,}|[^\S\n ]", " ", text)
            text = re.sub(r" ?\n ?", "\n", text)
            text = re.sub(r"\n{3,}", "\n\n", text).strip()
        return text

    def rejection(self, text: str) -> Rejection | None:
        words = text.split()
        filters = self._filters
        checks = (
            ("length", lambda: _length(text, words, filters)),
            ("words", lambda: _words(words, filters)),
            ("symbols", lambda: _symbols(text, words, filters)),
            ("repetition", lambda: _repeated_lines(text, filters) or _repeated_ngrams(words, filters)),
            ("blocked words", lambda: self._blocked_words(text)),
            ("language", lambda: self._other_language(text)),
        )
        return next(((name, why) for name, check in checks if (why := check()) is not None), None)

    def _blocked_words(self, text: str) -> str | None:
        if not self._blocked:
            return None
        words = plain_words(text)
        found = [word for word in words if word in self._blocked]
        joined = f" {' '.join(words)} "
        for phrase in self._blocked_phrases:
            found += [phrase] * joined.count(f" {phrase} ")
        if len(found) <= self._filters.max_blocked:
            return None
        return f"{len(found)} blocked, such as {found[0]!r}"

    def _other_language(self, text: str) -> str | None:
        if self._language is None:
            return None
        language, probability = self._language(text[:_LANGUAGE_CHARACTERS])
        if language not in self._filters.languages:
            return f"{language} ({probability:.2f}); expected {' or '.join(self._filters.languages)}"
        if probability < self._filters.min_language_probability:
            return f"{language} with {probability:.2f}; expected {self._filters.min_language_probability} or more"
        return None


def _repaired(text: str) -> str:
    fix, html = _ftfy()
    for end in _LINE_ENDS:
        text = text.replace(end, "\n")
    # As ftfy has it: text with tags in it is HTML, and its entities are meant.
    fix = fix if "<" in text else html
    # Most lines are plain ASCII, in which there is nothing to repair: looked through 20 times as fast as by ftfy.
    lines = (line if line.isascii() and not _SUSPECT.search(line) else fix(line) for line in text.split("\n"))
    return "\n".join(line.rstrip() for line in lines).strip("\n")


@functools.cache
def _ftfy() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Its repair of a line, and the same with HTML's entities."""
    try:
        import ftfy
    except ImportError as error:
        raise InputError(f"repair needs the package ftfy ({error}): pip install -e '.[clean]'") from error
    # Typographic quotes are what the author wrote; MassiveText and C4 keep them too.
    config = ftfy.TextFixerConfig(uncurl_quotes=False, explain=False, unescape_html=False)
    with_entities = config._replace(unescape_html=True)
    return tuple(functools.partial(ftfy.fix_text_segment, config=kind) for kind in (config, with_entities))


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise InputError(f"languages need the package py3langid ({error}): pip install -e '.[clean]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # its own, in the package


def _language_of(languages: tuple[str, ...]) -> Callable[[str], tuple[str, float]]:
    identifier = _identifier()
    known = sorted(identifier.labels)
    for language in languages:
        if language not in known:
            raise InputError(f"cleaning: language {language!r} is not known; expected some of {', '.join(known)}")
    return identifier.classify


def _lines(files: tuple[str, ...]) -> Iterator[str]:
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"cleaning: blocked_files has {file!r}, which is not there; expected a text file")
        yield from Path(file).read_text(encoding="utf-8", errors="replace").splitlines()


def _outside(value: float, least: float | None, most: float | None, what: str) -> str | None:
    if (least is None or value >= least) and (most is None or value <= most):
        return None
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    limits = f"{least} or more" if most is None else f"at most {most}" if least is None else f"{least} to {most}"
    return f"{shown} {what}; expected {limits}"


def _length(text: str, words: list[str], filters: TextFilters) -> str | None:
    return _outside(len(text), filters.min_characters, filters.max_characters, "characters") or _outside(
        len(words), filters.min_words, filters.max_words, "words"
    )


def _words(words: list[str], filters: TextFilters) -> str | None:
    num_words = max(len(words), 1)
    mean = sum(map(len, words)) / num_words
    found = _outside(mean, filters.min_mean_word_length, filters.max_mean_word_length, "characters a word")
    if found is None and filters.min_alphabetic_words is not None:
        share = sum(any(map(str.isalpha, word)) for word in words) / num_words
        found = _outside(share, filters.min_alphabetic_words, None, "of the words with a letter")
    if found is None and filters.min_stop_words is not None:
        kinds = len(STOP_WORDS.intersection(word.lower() for word in words))
        found = _outside(kinds, filters.min_stop_words, None, "kinds of stop words")
    return found


def _symbols(text: str, words: list[str], filters: TextFilters) -> str | None:
    num_words, most = max(len(words), 1), filters.max_symbols_per_word
    found = _outside(text.count("#") / num_words, None, most, "# a word")
    found = found or _outside(sum(map(text.count, _ELLIPSES)) / num_words, None, most, "ellipses a word")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    bullets = sum(line.startswith(_BULLETS) for line in lines) / max(len(lines), 1)
    found = found or _outside(bullets, None, filters.max_bullet_lines, "of the lines with a bullet")
    ellipses = sum(line.endswith(_ELLIPSES) for line in lines) / max(len(lines), 1)
    return found or _outside(ellipses, None, filters.max_ellipsis_lines, "of the lines end with an ellipsis")


def _repeated_lines(text: str, filters: TextFilters) -> str | None:
    for parts, what, most, most_characters in (
        (text.split("\n"), "lines", filters.max_duplicate_lines, filters.max_duplicate_line_characters),
        (
            re.split(r"\n\s*\n", text),
            "paragraphs",
            filters.max_duplicate_paragraphs,
            filters.max_duplicate_paragraph_characters,
        ),
    ):
        if most is None and most_characters is None:
            continue
        parts = [part.strip() for part in parts if part.strip()]
        seen, again = set(), []
        for part in parts:
            if part in seen:
                again.append(part)
            seen.add(part)
        found = _outside(len(again) / max(len(parts), 1), None, most, f"of the {what} stood before")
        characters = sum(map(len, again)) / max(sum(map(len, parts)), 1)
        found = found or _outside(
            characters, None, most_characters, f"of the characters are in {what} that stood before"
        )
        if found:
            return found
    return None


def _repeated_ngrams(words: list[str], filters: TextFilters) -> str | None:
    if not words or not (filters.max_top_ngrams or filters.max_duplicate_ngrams):
        return None
    word_hashes = hashes(words)
    ends = np.cumsum([0, *map(len, words)])  # characters before each word
    for n, most in enumerate(filters.max_top_ngrams, start=_TOP_FROM):
        _, first, counts = np.unique(ngrams(word_hashes, n), return_index=True, return_counts=True)
        repeated = counts > 1
        if not repeated.any():
            break  # longer ones are not either
        lengths = ends[first + n] - ends[first]
        top = counts == counts.max()
        share = int((counts * lengths)[top].max()) / int(ends[-1])
        found = _outside(share, None, most, f"of the characters are in the most frequent {n}-gram")
        if found:
            return found
    for n, most in enumerate(filters.max_duplicate_ngrams, start=_DUPLICATE_FROM):
        found_ngrams = ngrams(word_hashes, n)
        _, first, inverse = np.unique(found_ngrams, return_index=True, return_inverse=True)
        again = np.flatnonzero(first[inverse] != np.arange(len(found_ngrams)))
        if not len(again):
            break
        covered = np.zeros(len(words), bool)  # overlapping ones count once
        for offset in range(n):
            covered[again + offset] = True
        share = int(np.diff(ends)[covered].sum()) / int(ends[-1])
        found = _outside(share, None, most, f"of the characters are in {n}-grams that stood before")
        if found:
            return found
    return None


def _pair_rejections(inputs: str, targets: str, filters: PairFilters) -> Iterator[Rejection]:
    ratio = len(inputs.split()) / max(len(targets.split()), 1)
    found = _outside(ratio, filters.min_compression, filters.max_compression, "words of inputs for each of targets")
    if found:
        yield "compression ratio", found
    if filters.min_similarity is None and filters.max_similarity is None:
        return
    first, second = set(plain_words(inputs)), set(plain_words(targets))
    similarity = len(first & second) / max(len(first | second), 1)
    found = _outside(similarity, filters.min_similarity, filters.max_similarity, "of the words are in both")
    if found:
        yield "similarity", found
