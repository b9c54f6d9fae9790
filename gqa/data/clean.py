r"""python -m gqa.data.clean --config=configs/cleaning/text.py --source=FOLDER --output=FILE.jsonl

Cleans documents or pairs: repairs their text, drops what no model should learn, copies and near-copies, and what is in
the evaluation sets. Which filters there are, with which limits, is in the config. FILE.jsonl has the columns of the
source, so that it stands wherever the source did; FILE.report.md and FILE.report.json say what each filter dropped,
with examples.

    python -m gqa.data.clean --config=configs/cleaning/instructions.py --source=qa.csv \
        --fields=inputs=question,targets=answer --keep=id --evaluation=test.jsonl,heldout.jsonl --output=clean.jsonl

--source is a folder or file of text, or of tables (JSONL, CSV, TSV, Parquet). A row that cannot be read is counted and
passed over, as long as there is no more than one in a thousand. The output is the same for any number of --workers, and
is there when it is complete.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gqa import command_line
from gqa.data import corpus, tables
from gqa.data.cleaning import TEXT, Cleaned, Cleaner, CleaningConfig, parse
from gqa.data.cleaning_report import Report
from gqa.data.duplicates import Duplicates, evaluation_sets, similarity_order
from gqa.data.tasks import parse_fields
from gqa.errors import InputError
from gqa.files import whole

KEPT = "kept"  # role of a column that passes through
_ROWS_PER_CALL = 64  # of a worker

Row = dict[str, str]


@dataclass(frozen=True)
class CleanSpec:
    """What is cleaned, and against what."""

    source: str
    fields: Mapping[str, str]  # role -> column; columns that pass through have roles `kept NAME`
    split: str | None  # of a folder whose files are split by name
    evaluation: tuple[str, ...]  # files and folders that no document may share an n-gram with

    def parts(self) -> list[Callable[[], Iterator[tables.Located]]]:
        """Readers of the source's files (of text: of all), each of its rows with where they stand."""
        if not self.is_table:
            return [self._texts]
        return [lambda path=path: tables.read_located(path, self.fields) for path in self.files]

    def count(self) -> int:
        """About how many rows there are, for progress."""
        return sum(map(tables.count_rows, self.files)) if self.is_table else corpus.count(self.source)

    @property
    def files(self) -> list[Path]:
        """The tables that are read."""
        table = tables.Table(self.source, self.fields)
        if self.split is None:
            return table.all_files
        if self.split not in table.splits:
            raise InputError(f"source {self.source!r} has no split {self.split!r}; expected {', '.join(table.splits)}")
        return table.files(self.split)

    @property
    def is_table(self) -> bool:
        """Whether the source has columns."""
        path = Path(self.source)
        return path.suffix in tables.SUFFIXES or bool(tables.table_files(path))

    def _texts(self) -> Iterator[tables.Located]:
        for name, path, text in corpus.texts(self.source):
            yield name, tables.BadRow(f"{path} is not UTF-8") if text is None else {"text": text}


def make_spec(
    config: CleaningConfig,
    source: str,
    fields: Mapping[str, str] | None = None,
    *,
    keep: Iterable[str] = (),
    split: str | None = None,
    evaluation: Iterable[str] = (),
) -> CleanSpec:
    """The spec of a cleaning; `InputError` for fields that are not the config's, and for a source that is not there."""
    fields = dict(fields or {role: role for role in config.roles})
    if set(fields) != set(config.roles):
        raise InputError(f"fields={fields}; expected the columns of {' and '.join(config.roles)}")
    # A role's column is in the output as it is, and as it was read it would take the place of the repaired text.
    kept = {f"{KEPT} {column}": column for column in keep if column not in fields.values()}
    spec = CleanSpec(source, fields | kept, split, tuple(map(str, evaluation)))
    if not Path(source).exists():
        next(corpus.texts(source), None)  # refuses what is neither a path nor embedded
    if not spec.is_table and config.roles != TEXT:
        raise InputError(f"source {source!r} is text; expected a table with {' and '.join(config.roles)}")
    if not spec.is_table and (keep or split):
        raise InputError(f"source {source!r} is text, without columns and splits; leave out keep and split")
    return spec


def clean(config: CleaningConfig, spec: CleanSpec, output: Path, num_workers: int) -> Report:
    """Writes the clean rows of a source to the JSONL file `output`, the reports beside it, and gives the report.

    Raises `InputError` for a source that cannot be read, with too many bad rows, or of which nothing is left.
    """
    check_output(spec, output)
    if num_workers < 1:
        raise InputError(f"workers={num_workers}; expected 1 or more")
    evaluation = evaluation_sets(spec.evaluation, config.contamination.ngram)
    contaminated = evaluation.ngrams
    Cleaner(config, contaminated)  # what is wrong with the config shows here, not in a worker
    report = Report(spec.source, config, spec.evaluation)
    report.evaluation_texts = evaluation.num_texts, evaluation.num_short
    bad = Counter()
    located = itertools.chain.from_iterable(part() for part in spec.parts())
    batches = _batches(tables.good_rows(located, bad), _ROWS_PER_CALL)
    duplicates = Duplicates(config.duplicates)
    lines: list[tuple[int, int]] = []  # where the lines of kept rows begin in the file, and how long they are
    orders: list[np.ndarray] = []
    with whole(output, shared=True) as temporary:
        with (
            temporary.open("wb") as file,
            tqdm(total=spec.count(), desc="clean", unit=" rows", delay=1, dynamic_ncols=True) as progress,
        ):
            for names, rows in _in_order(batches, (config, contaminated), num_workers):
                for name, cleaned in zip(names, rows, strict=True):
                    rejection = cleaned.rejection or duplicates.rejection(name, cleaned.signatures)
                    report.add(name, cleaned, rejection)
                    if rejection is None:
                        line = json_line(cleaned.row, spec.fields)
                        lines.append((file.tell() if config.order else 0, len(line)))
                        file.write(line)
                        if config.order:
                            orders.append(cleaned.signatures.order)
                progress.update(len(names))
        report.bad = bad[tables.BAD]
        if not lines:
            raise InputError(f"nothing is left of {report.read} rows of {spec.source}; dropped: {report.summary()}")
        if config.order:
            _reorder(temporary, lines, similarity_order(orders))
        report.write(output)
    return report


def check_output(spec: CleanSpec, output: Path) -> None:
    """Raises `InputError` for a file that cannot be the output."""
    if output.suffix != ".jsonl":
        raise InputError(f"output {output} is no .jsonl file; expected a name such as clean.jsonl")
    if not output.absolute().parent.is_dir():
        raise InputError(f"output {output}: there is no folder {output.parent}")
    if output.exists() and spec.is_table and any(output.samefile(file) for file in spec.files):
        raise InputError(f"output {output} is read as the source; name another file")


def json_line(row: Row, fields: Mapping[str, str]) -> bytes:
    """A row by the source's columns as a line of the output."""
    columns = {column: row[role] for role, column in fields.items()}
    return (json.dumps(columns, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _batches(rows: Iterator, size: int) -> Iterator[tuple[list[str], list[Row]]]:
    while batch := list(itertools.islice(rows, size)):
        names, texts = zip(*batch, strict=True)
        yield list(names), list(texts)


def _reorder(path: Path, lines: list[tuple[int, int]], order: list[int]) -> None:
    reordered = path.with_name(f"{path.name}.ordered")
    try:
        with path.open("rb") as source, reordered.open("wb") as file:
            for i in order:
                start, length = lines[i]
                source.seek(start)
                file.write(source.read(length))
        reordered.replace(path)
    finally:
        reordered.unlink(missing_ok=True)


def _in_order(
    batches: Iterator[tuple[list[str], list[Row]]], state: tuple, num_workers: int
) -> Iterator[tuple[list[str], list[Cleaned]]]:
    """Each batch's names and cleaned rows, in order whatever the number of processes."""
    if num_workers == 1:
        cleaner = Cleaner(*state)
        for names, rows in batches:
            yield names, [cleaner.clean(row) for row in rows]
        return
    # Spawned: a fork of a process with threads, such as one that has imported JAX, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, state)
    pending = deque()
    try:
        for names, rows in batches:
            pending.append((names, pool.submit(_clean_rows, rows)))
            if len(pending) > 2 * num_workers:
                names, future = pending.popleft()
                yield names, future.result()
        for names, future in pending:
            yield names, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_cleaner: Cleaner | None = None  # of a worker process


def _start_worker(config: CleaningConfig, contaminated: np.ndarray) -> None:
    global _cleaner
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _cleaner = Cleaner(config, contaminated)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent cannot say so


def _clean_rows(rows: list[Row]) -> list[Cleaned]:
    return [_cleaner.clean(row) for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is cleaned, how, and where it goes."""
    command_line.add_config_argument(parser)
    parser.add_argument("--source", required=True, help="folder or file of text or tables")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument(
        "--fields", type=parse_fields, metavar="ROLE=COLUMN,…", help="columns of tables: text=A, or inputs=A,targets=B"
    )
    parser.add_argument(
        "--keep", default="", metavar="COLUMN,…", help="further columns of texts, which pass through as they are"
    )
    parser.add_argument("--split", help="of a folder with files of several: train, heldout or test")
    parser.add_argument(
        "--evaluation", default="", metavar="FILE,…", help="evaluation sets: rows that share n-grams with them go"
    )


def from_arguments(args: argparse.Namespace, raw: Mapping) -> tuple[CleaningConfig, CleanSpec]:
    """The filters and the spec that these options say."""
    config = parse(raw)
    return config, make_spec(
        config,
        args.source,
        args.fields,
        keep=[column for column in args.keep.split(",") if column],
        split=args.split,
        evaluation=[path for path in args.evaluation.split(",") if path],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: cores)")
    args, raw = command_line.parse(parser)
    config, spec = from_arguments(args, raw)
    report = clean(config, spec, args.output, args.workers)
    print("\n".join(report.table()))
    print(f"wrote {args.output}: {report.kept} of {report.read} rows")


if __name__ == "__main__":
    command_line.run(main)
