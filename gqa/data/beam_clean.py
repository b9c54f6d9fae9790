r"""python -m gqa.data.beam_clean --config=FILE --source=FOLDER --output=FILE.jsonl -- --runner=DirectRunner

The cleaning of python -m gqa.data.clean, with its options, as an Apache Beam pipeline: what follows `--` is for Beam.
Output and report are the same, byte for byte: of copies the first in the order of the source is kept, whoever finds it.

Workers read, repair and filter a table's file or 1024 files of text each, and see the source and the folder of
--output. Copies meet by the digest of their text, near-copies in the bands of their signatures, where each is compared
with each; which near-copies stay follows from all pairs that are alike, in one place. Too many bad rows are refused
when all are counted. An order by similarity is for one machine.

pip install -e '.[beam,clean]'
"""

import argparse
import functools
import json
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gqa import command_line
from gqa.data import clean as cleaning
from gqa.data import corpus, tables
from gqa.data.beam import run_pipeline
from gqa.data.clean import CleanSpec, json_line
from gqa.data.cleaning import Cleaned, Cleaner, CleaningConfig, Rejection
from gqa.data.cleaning_report import Report
from gqa.data.duplicates import bands, evaluation_sets, similarity_of
from gqa.errors import InputError
from gqa.files import whole

_FILES_PER_PART = 1024
_ROWS_PER_FILE = 16_384  # of output, before it is joined

Place = tuple[int, int]  # number of the part, and of the row in it: the order of the source
Files = tuple[int, list[tuple[str, Path]]]  # number of a part, and its files by name


@dataclass(frozen=True)
class Task:
    """What every worker knows."""

    config: CleaningConfig
    spec: CleanSpec
    folder: Path  # of finished parts of the output


def clean(config: CleaningConfig, spec: CleanSpec, output: Path, options: Sequence[str]) -> Report:
    """As `gqa.data.clean.clean`, by a pipeline with Beam's `options`; errors too."""
    cleaning.check_output(spec, output)
    if config.order is not None:
        raise InputError(f"order={config.order!r} is for one machine (gqa.data.clean); expected None")
    evaluation = evaluation_sets(spec.evaluation, config.contamination.ngram)
    contaminated = evaluation.ngrams
    Cleaner(config, contaminated)  # what is wrong with the config shows here, not in a worker
    files = [(str(path), path) for path in spec.files] if spec.is_table else corpus.files(spec.source)
    size = 1 if spec.is_table else _FILES_PER_PART
    parts = [(i, files[start : start + size]) for i, start in enumerate(range(0, len(files), size))]
    with whole(output.absolute(), shared=True) as temporary:
        task = Task(config, spec, temporary.with_suffix(".parts"))
        task.folder.mkdir()
        try:
            run_pipeline(options, functools.partial(_pipeline, parts=parts, task=task, contaminated=contaminated))
            report = _join(task, temporary)
            report.evaluation_texts = evaluation.num_texts, evaluation.num_short
            report.write(output)
        finally:
            shutil.rmtree(task.folder, ignore_errors=True)
    return report


def _join(task: Task, temporary: Path) -> Report:
    report = Report(task.spec.source, task.config, task.spec.evaluation)
    num_read, first_bad = 0, None
    with temporary.open("wb") as file:
        for path in sorted(task.folder.glob("*.json")):
            counts = json.loads(path.read_text(encoding="utf-8"))
            report.add_counts(counts["report"])
            num_read, first_bad = num_read + counts["read"], first_bad or counts["first_bad"]
            with path.with_suffix(".jsonl").open("rb") as lines:
                shutil.copyfileobj(lines, file)
    if first_bad:
        tables.refuse_too_many(first_bad, report.bad, num_read)
    if not report.kept:
        raise InputError(f"nothing is left of {report.read} rows of {task.spec.source}; dropped: {report.summary()}")
    return report


def _pipeline(pipeline, parts: Sequence[Files], task: Task, contaminated: np.ndarray) -> None:
    import apache_beam as beam

    known = beam.pvalue.AsSingleton(pipeline | "evaluation sets" >> beam.Create([contaminated]))
    read = pipeline | "parts" >> beam.Create(parts) | "spread" >> beam.Reshuffle()
    cleaned = read | "clean" >> beam.FlatMap(_clean_part, task, known).with_outputs("bad", main="rows")
    kept = cleaned.rows | "kept so far" >> beam.Filter(lambda row: row[1][1].rejection is None)
    rejections = []
    if task.config.duplicates.exact:
        marked = (
            kept
            | "by digest" >> beam.Map(lambda row: (row[1][1].signatures.digest, (row[0], row[1])))
            | "same digest" >> beam.GroupByKey()
            | "first of a digest" >> beam.FlatMap(_exact).with_outputs("copies", main="first")
        )
        kept = marked.first
        rejections.append(marked.copies)
    if task.config.duplicates.near:
        edges = (
            kept
            | "bands" >> beam.FlatMap(_bands, task.config.duplicates)
            | "same band" >> beam.GroupByKey()
            | "pairs" >> beam.FlatMap(_pairs, task.config.duplicates.similarity)
            | "each once" >> beam.Distinct()
            | "all pairs" >> beam.combiners.ToList()
        )
        rejections.append(edges | "resolve" >> beam.FlatMap(_resolve))
    rejected = (rejections or [pipeline | "no copies" >> beam.Create([])]) | "copies" >> beam.Flatten(pipeline=pipeline)
    written = {"rows": cleaned.rows, "rejected": rejected} | "copies of rows" >> beam.CoGroupByKey()
    blocks = written | "by block" >> beam.Map(_by_block)
    by_block = {"rows": blocks, "bad": cleaned.bad} | "rows of a block" >> beam.CoGroupByKey()
    by_block | "write" >> beam.Map(_write, task)


_cleaner: tuple[bytes, Cleaner] | None = None  # of a worker process, and what it was made for


def _cleaner_of(config: CleaningConfig, contaminated: np.ndarray) -> Cleaner:
    """Made once a process, for it reads word lists and a model of languages."""
    global _cleaner
    key = pickle.dumps((config, contaminated))
    if _cleaner is None or _cleaner[0] != key:
        _cleaner = key, Cleaner(config, contaminated)
    return _cleaner[1]


def _clean_part(part: Files, task: Task, contaminated: np.ndarray) -> Iterator:
    """Rows by place, with their name; and what could not be read, for the part's first block."""
    import apache_beam as beam

    number, files = part
    cleaner = _cleaner_of(task.config, contaminated)
    num_read, num_bad, first_bad, place = 0, 0, None, 0
    for name, row in _located(files, task.spec):
        num_read += 1
        if isinstance(row, tables.BadRow):
            num_bad, first_bad = num_bad + 1, first_bad or str(row)
        else:
            yield (number, place), (name, cleaner.clean(row))
            place += 1
    yield beam.pvalue.TaggedOutput("bad", ((number, 0), (num_read, num_bad, first_bad)))


def _located(files: Sequence[tuple[str, Path]], spec: CleanSpec) -> Iterator[tables.Located]:
    if spec.is_table:
        for _, path in files:
            yield from tables.read_located(path, spec.fields)
        return
    for name, path, text in corpus.read_files(files, corpus.is_file(spec.source)):
        yield name, tables.BadRow(f"{path} is not UTF-8") if text is None else {"text": text}


def _exact(group: tuple[bytes, Iterable[tuple[Place, tuple[str, Cleaned]]]]) -> Iterator:
    """The first row of a digest, and of the others that they are copies of it."""
    import apache_beam as beam

    first, *copies = sorted(group[1], key=lambda row: row[0])
    yield first
    for place, _ in copies:
        yield beam.pvalue.TaggedOutput("copies", (place, ("exact duplicate", f"of {first[1][0]}")))


def _bands(row: tuple[Place, tuple[str, Cleaned]], duplicates) -> Iterator:
    place, (name, cleaned) = row
    near = cleaned.signatures.near
    if near is None:
        return
    for number, (start, end) in enumerate(_ranges(duplicates)):
        yield (number, near[start:end].tobytes()), (place, name, near)


@functools.cache
def _ranges(duplicates) -> list[tuple[int, int]]:
    return list(bands(duplicates).hashranges)


def _pairs(group: tuple, least: float) -> Iterator[tuple[Place, Place, str, float]]:
    """Those of a band that are alike: the later one, the earlier one with its name, and how much."""
    rows = sorted(group[1], key=lambda row: row[0])
    for later, (place, _, near) in enumerate(rows):
        for earlier, name, other in rows[:later]:
            similarity = similarity_of(near, other)
            if similarity >= least:
                yield place, earlier, name, similarity


def _resolve(pairs: Sequence[tuple[Place, Place, str, float]]) -> Iterator[tuple[Place, Rejection]]:
    """In the order of the source: what is like one that is kept is not kept, for the first of these."""
    dropped = set()
    for place, earlier, name, similarity in sorted(pairs):
        if place not in dropped and earlier not in dropped:
            dropped.add(place)
            yield place, ("near duplicate", f"{similarity:.2f} alike {name}")


def _by_block(found: tuple[Place, Mapping[str, Iterable]]) -> tuple:
    (part, place), row = found
    ((name, cleaned),) = row["rows"]
    return (part, place // _ROWS_PER_FILE), (place, name, cleaned, next(iter(row["rejected"]), None))


def _write(block: tuple[Place, Mapping[str, Iterable]], task: Task) -> None:
    (part, number), found = block
    report = Report(task.spec.source, task.config, task.spec.evaluation)
    num_read, report.bad, first_bad = next(iter(found["bad"]), (0, 0, None))
    lines = []
    for _, name, cleaned, copied in sorted(found["rows"], key=lambda row: row[0]):
        rejection = cleaned.rejection or copied
        report.add(name, cleaned, rejection)
        if rejection is None:
            lines.append(json_line(cleaned.row, task.spec.fields))
    path = task.folder / f"{part:08d}-{number:08d}"
    path.with_suffix(".jsonl").write_bytes(b"".join(lines))
    counts = {"read": num_read, "first_bad": first_bad, "report": report.counts()}
    path.with_suffix(".json").write_text(json.dumps(counts), encoding="utf-8")


def main() -> None:
    """The command line: that of `gqa.data.clean`, and Beam's behind `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cleaning.add_arguments(parser)
    parser.add_argument("beam", nargs="*", help="Beam's own options, behind --")
    arguments, raw = command_line.parse(parser)
    config, spec = cleaning.from_arguments(arguments, raw)
    report = clean(config, spec, arguments.output, arguments.beam)
    print("\n".join(report.table()))
    print(f"wrote {arguments.output}: {report.kept} of {report.read} rows")


if __name__ == "__main__":
    # Workers find functions by their module's name.
    from gqa.data.beam_clean import main as main_of_module

    command_line.run(main_of_module)
