"""Rows of the user's own tables: JSON lines, CSV, TSV or Parquet, a file or a folder of files.

`fields` says which column is what: `{"inputs": "article", "targets": "highlights"}` for pairs, `{"text": "body"}` for
text. A folder whose files begin with the word `train`, and with `heldout`, `validation`, `valid`, `val` or `dev`, is
split so, and files of a folder that begin with `test` are its test split; other files beside these are refused. Of
files that are not so split about 5 % of the rows, one at least, are held out, chosen by a hash of the inputs or the
text, so that what a model is asked is never on both sides.

A row that cannot be read (not JSON, not UTF-8, a column missing or of another type) is passed over and counted as long
as there is no more than one in `GOOD_ROWS_PER_BAD`; otherwise the first of them is an `InputError` with file and line.
"""

import contextlib
import copy
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gqa.data.corpus import HELDOUT_FRACTION
from gqa.errors import InputError, nearest

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
BAD = "bad row"  # why a row is left out
GOOD_ROWS_PER_BAD = 1000

# A word of its own, as in train-00.jsonl, val.csv and test2.tsv, or compound, as in testset.jsonl: values.jsonl and
# testimonials.jsonl are none.
_SPLIT_NAME = re.compile(
    r"((?P<train>train(ing)?)|(?P<heldout>heldout|validation|valid|val|dev)|(?P<test>test(ing)?))"
    r"s?(set|split|data)?(?![^\W\d_])",
    re.IGNORECASE,
)
_COUNTED_FROM = 100  # bad rows; so many are no accident, unless there are GOOD_ROWS_PER_BAD times as many good ones


class BadRow(InputError):
    """A row that cannot be read."""


Located = tuple[str, dict[str, str] | BadRow]  # where it stands, such as `FILE line 7`, and the row


class Table:
    """Rows of `path`, each a dictionary from the names of `fields` to texts, read again whenever they are asked for.

    `skipped[split]` counts what the last pass over a split left out, by reason. Raises `InputError` for a path that
    holds no table and, when rows are read, for one with too many bad rows.
    """

    def __init__(self, path: str | Path, fields: Mapping[str, str]):
        self.path, self.fields = Path(path), dict(fields)
        files = [self.path] if self.path.is_file() else table_files(self.path)
        if not files:
            raise InputError(f"source {str(path)!r} has no table; expected files of {', '.join(SUFFIXES)}")
        named: dict[str | None, list[Path]] = {"train": [], "heldout": [], "test": [], None: []}
        for file in files:
            named[_split_of(file)].append(file)
        unnamed = named.pop(None)
        self._by_hash = not (named["train"] and named["heldout"])  # of what is not the test split
        if self._by_hash:
            tests = named["test"] if self.path.is_dir() else []
            others = [file for file in files if file not in tests]
            self._files = {"train": others, "heldout": others, "test": tests}
        elif unnamed:
            others = ", ".join(file.name for file in unnamed)
            raise InputError(
                f"source {str(path)!r} is split by the names of its files, and {others} in no split; expected names "
                "that begin with train, validation or test"
            )
        else:
            self._files = named
        self.skipped: dict[str, Counter] = {split: Counter() for split in self._files}
        self._is_part, self.num_read, self.first_bad = False, 0, None
        self._threshold_of_all: float | None = None  # found when rows are first asked for

    def parts(self, split: str) -> list["Table"]:
        """A table of each file of a split, in order.

        Of bad rows it only says, after a pass, how many there are (`skipped`) and what is wrong with the first
        (`first_bad`); `num_read` is how many rows, of whatever split, were read.
        """
        self._threshold(split)  # found in all files, for the parts to take along
        parts = []
        for path in self._files[split]:
            part = copy.copy(self)
            part._files = {name: [path] for name in self._files}
            part.skipped = {name: Counter() for name in self.skipped}
            part._is_part = True
            parts.append(part)
        return parts

    @property
    def all_files(self) -> list[Path]:
        """Its files; `InputError` where their names split them: then one of the splits is asked for."""
        by_name = [split for split in self.splits if not (self._by_hash and split == "heldout")]
        if len(by_name) > 1:
            raise InputError(f"the files of {self.path} are split by name; name a split: {', '.join(by_name)}")
        return self._files[by_name[0]]

    def files(self, split: str) -> list[Path]:
        """The files that rows of a split are in."""
        return self._files[split]

    @property
    def splits(self) -> list[str]:
        """The splits that there are."""
        return [split for split, files in self._files.items() if files]

    def digest(self, split: str) -> str:
        """First 16 hex digits of the SHA-256 over all that decides the rows of a split."""
        total = hashlib.sha256(f"{split if self._by_hash else ''}\0{sorted(self.fields.items())}".encode())
        for path in self._files[split]:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()[:16]

    def rows(self, split: str) -> Iterator[dict[str, str]]:
        """The good rows of a split in the order of its files."""
        skipped = self.skipped[split] = Counter()
        threshold = self._threshold(split)
        located = (row for path in self._files[split] for row in read_located(path, self.fields))
        for _, row in self._readable(located, skipped) if self._is_part else good_rows(located, skipped):
            if threshold is None or (_fraction(row[self._key]) < threshold) == (split == "heldout"):
                yield row

    @property
    def _key(self) -> str:
        """The field that decides a row's split, in whatever order the fields are given."""
        return "inputs" if "inputs" in self.fields else next(iter(self.fields))

    def _threshold(self, split: str) -> float | None:
        """The fraction of the key's hash below which a row is held out; `None`: the names of the files decide."""
        if not self._by_hash or split == "test":
            return None
        if self._threshold_of_all is None:
            located = (row for path in self._files[split] for row in read_located(path, self.fields))
            fractions = set()
            for _, row in good_rows(located, Counter()):
                fractions.add(_fraction(row[self._key]))
                if min(fractions) < HELDOUT_FRACTION:
                    break
            # A few rows may have none under 5 %: then the lowest is held out, as of text, unless all are the same.
            least = min(fractions) if len(fractions) > 1 else 0.0
            self._threshold_of_all = max(HELDOUT_FRACTION, least + 16**-8)
        return self._threshold_of_all

    def _readable(self, rows: Iterable[Located], skipped: Counter) -> Iterator[tuple[str, dict[str, str]]]:
        self.num_read, self.first_bad = 0, None
        for where, row in rows:
            self.num_read += 1
            if isinstance(row, BadRow):
                skipped[BAD] += 1
                self.first_bad = self.first_bad or str(row)
            else:
                yield where, row


def _split_of(file: Path) -> str | None:
    """The split that a file's name says; `None`: it says none."""
    found = _SPLIT_NAME.match(file.name)
    return next(split for split, name in found.groupdict().items() if name) if found else None


def table_files(folder: Path) -> list[Path]:
    """The tables of a folder, by name; hidden files are of those who write there."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


def read_rows(path: Path, fields: Mapping[str, str]) -> Iterator[dict[str, str] | BadRow]:
    """Each row of a file, or what is wrong with it, with the file's name and the number of the line.

    Raises `InputError` for a file without one of the columns, as far as its form names columns.
    """
    for _, row in read_located(path, fields):
        yield row


def read_located(path: Path, fields: Mapping[str, str]) -> Iterator[Located]:
    """`read_rows` with where each stands: `FILE line 7`."""
    for where, row in read_columns(path, set(fields.values())):
        yield where, row if isinstance(row, BadRow) else _mapped(where, row, fields)


def read_columns(path: Path, columns: set[str] | None) -> Iterator[tuple[str, Mapping | BadRow]]:
    """Each row of a file as it stands, with all columns or, of a form that names columns, `columns`, and where.

    Raises `InputError` as `read_rows` does.
    """
    readers = {".jsonl": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise InputError(f"{path} is no table; expected a file of {', '.join(SUFFIXES)}")
    return readers[path.suffix](path, columns)


def good_rows(rows: Iterable[Located], skipped: Counter) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows that could be read; the others are counted in `skipped` as `BAD`.

    Raises `InputError`, with the first of them, where there is more than one in `GOOD_ROWS_PER_BAD`.
    """
    num_rows, first = 0, None
    for where, row in rows:
        num_rows += 1
        if isinstance(row, BadRow):
            skipped[BAD] += 1
            first = first or row
            if skipped[BAD] >= _COUNTED_FROM:
                refuse_too_many(str(first), skipped[BAD], num_rows)
        else:
            yield where, row
    if first is not None:
        refuse_too_many(str(first), skipped[BAD], num_rows)


def refuse_too_many(first: str, num_bad: int, num_rows: int) -> None:
    """Raises `InputError` with the first bad row where there is more than one in `GOOD_ROWS_PER_BAD`."""
    if num_bad * GOOD_ROWS_PER_BAD > num_rows:
        raise InputError(f"{first} ({num_bad} bad of {num_rows} rows; expected at most 1 in {GOOD_ROWS_PER_BAD})")


def count_rows(path: Path) -> int:
    """How many rows a file has, at most: a CSV row may take several lines. For progress."""
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return file.metadata.num_rows
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _mapped(where: str, row: Mapping, fields: Mapping[str, str]) -> dict[str, str] | BadRow:
    mapped = {}
    for name, column in fields.items():
        if column not in row:
            return BadRow(f"{where}: there is no {column!r}; nearest: {nearest(column, map(str, row))}")
        if not isinstance(row[column], str):
            return BadRow(f"{where}: {column!r} is a {type(row[column]).__name__}; expected a text")
        mapped[name] = row[column]
    return mapped


def _json_rows(path: Path, _columns: set[str] | None) -> Iterator[tuple[str, Mapping | BadRow]]:
    for where, line, bad in _lines(path):
        if bad is not None:
            yield where, bad
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
                yield where, BadRow(f"{where} is not JSON: {line.strip()[:60]!r}")
            else:
                is_object = isinstance(row, dict)
                yield where, row if is_object else BadRow(f"{where} is a {type(row).__name__}; expected an object")


def _csv_rows(path: Path, columns: set[str] | None) -> Iterator[tuple[str, Mapping | BadRow]]:
    bad: list[tuple[str, BadRow]] = []  # lines of the row that is being read
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for where, line, bad_line in _lines(path):
            number += 1
            if bad_line is not None:
                bad.append((where, bad_line))
            yield line

    csv.field_size_limit(2**31 - 1)  # the default refuses documents over 128 KiB
    reader = csv.reader(lines(), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(f"{path} line 1 is not {path.suffix[1:].upper()}: {error}") from error
    if bad:
        raise bad[0][1]
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise InputError(f"{path} has the column {twice!r} twice; expected each name once")
    _check_columns(path, header, columns or set())
    while True:
        start = number + 1
        where = f"{path} line {start}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A stray quotation mark takes in all lines up to the next one: each is a row that is lost.
            for line in range(start, number + 1):
                where = f"{path} line {line}"
                yield where, BadRow(f"{where} is not {path.suffix[1:].upper()}: {error}")
            bad.clear()
            continue
        if bad:
            yield bad[0]
            bad.clear()
        elif len(row) == len(header):
            yield where, dict(zip(header, row, strict=True))
        elif row:
            yield where, BadRow(f"{where} has {len(row)} columns; expected {len(header)}")


def _parquet_rows(path: Path, columns: set[str] | None) -> Iterator[tuple[str, Mapping]]:
    with _parquet(path) as file:
        _check_columns(path, file.schema_arrow.names, columns or set())
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns and sorted(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} is Parquet, which needs pyarrow: pip install 'gqa[data]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is no whole Parquet file: {str(error).splitlines()[0]}") from error


def _lines(path: Path) -> Iterator[tuple[str, str, BadRow | None]]:
    """Where each line stands, its text, with surrogates for bytes that are not UTF-8, and what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where, encoding = f"{path} line {number}", "utf-8-sig" if number == 1 else "utf-8"
            try:
                yield where, line.decode(encoding), None
            except UnicodeDecodeError as error:
                bad = BadRow(f"{where} is not UTF-8: byte {error.start} is 0x{line[error.start]:02x}")
                yield where, line.decode(encoding, "surrogateescape"), bad


def _check_columns(path: Path, found: Iterable[str], wanted: set[str]) -> None:
    found = list(found)
    if not found:
        raise InputError(f"{path} has no columns; expected {', '.join(sorted(wanted))}")
    for column in sorted(wanted - set(found)):
        raise InputError(f"{path} has no column {column!r} among {', '.join(found)}; nearest: {nearest(column, found)}")


def _fraction(text: str) -> float:
    # JSON may spell halves of surrogate pairs.
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16) / 16**8
