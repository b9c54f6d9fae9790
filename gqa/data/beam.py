r"""python -m gqa.data.beam --task=c4_lm --vocabulary=FILE --output=DIR -- --runner=DirectRunner

The preparation of python -m gqa.data.prepare, with its options, as an Apache Beam pipeline: what follows `--` is for
Beam. The output is the same, byte for byte.

Texts are numbered in the order in which one machine reads them, and those of one block of 16,384 are packed together
there as here: so it does not matter who packs it. A first pass counts the texts of every file, a second reads them
again and sends each to its block.

DIR is a folder that all workers see, and so is the source; the vocabulary is read from its path too. A pipeline that
was stopped, started again, makes the blocks that are missing. Tables are read a file a worker; a folder of text in
parts of 1024 files, which the launching machine has listed; a public dataset and conversations by one worker.

pip install -e '.[beam]'
"""

import argparse
import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from gqa.command_line import parse_arguments, run
from gqa.data import prepare as preparation
from gqa.data.corpus import SPLITS, Corpus
from gqa.data.examples import Task
from gqa.data.prepare import PrepareSpec, record_path
from gqa.data.tables import BAD, Table, refuse_too_many
from gqa.data.tasks import Source
from gqa.data.tokenise import BLOCK, Item, Totals, join_blocks, write_block
from gqa.data.tokenizer_json import TokenizerJson
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError

COUNTS = "counts.json"  # beside the blocks: texts and rows left out of each part
_FILES_PER_PART = 1024


@dataclasses.dataclass(frozen=True)
class Part:
    """What one worker reads of a split: all of `source`, or the documents `names` of a corpus."""

    split: str
    number: int
    source: Source
    names: tuple[str, ...] | None = None

    def items(self, spec: PrepareSpec) -> Iterator[Item]:
        """Its items in order; what is left out is counted in `source.skipped[split]`."""
        if self.names is not None:
            return (self.source.read(name).text for name in self.names)
        return spec.items(self.source, self.split, _vocabulary(spec.vocabulary, spec.task))


def parts_of(source: Source, split: str) -> list[Part]:
    """The parts of a split of an opened source, whose items one after the other are its items."""
    if isinstance(source, Corpus):
        names = source.shuffled_names(split)
        starts = range(0, len(names), _FILES_PER_PART)
        groups = [tuple(names[start : start + _FILES_PER_PART]) for start in starts]
        return [Part(split, i, source.only(group), group) for i, group in enumerate(groups)]
    sources = source.parts(split) if isinstance(source, Table) else [source]
    return [Part(split, i, part) for i, part in enumerate(sources)]


def writer(options: Sequence[str]) -> preparation.Writer:
    """A writer for `prepare` that runs a pipeline with Beam's `options`: `["--runner=DirectRunner"]`."""

    def write(folder: Path, task: Task, spec: PrepareSpec, source: Source, vocabulary: Vocabulary | TokenizerJson):
        folder = folder.absolute()
        parts = [part for split in SPLITS for part in parts_of(source, split)]
        run_pipeline(options, functools.partial(_pipeline, parts=parts, spec=spec, task=task, folder=folder))
        counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        (folder / COUNTS).unlink()
        totals, skipped = {}, {split: Counter() for split in SPLITS}
        for split in SPLITS:
            here = [count for count in counts if count["split"] == split]
            for count in here:
                skipped[split].update(count["skipped"])
            num_items = sum(count["items"] for count in here)
            first_bad = next((count["first_bad"] for count in here if count["first_bad"]), None)
            if first_bad:
                refuse_too_many(first_bad, skipped[split][BAD], sum(count["read"] for count in here))
            totals[split] = (
                join_blocks(record_path(folder, split), -(-num_items // BLOCK))
                if num_items
                else Totals.zeros(task.vocabulary_size)
            )
        return totals, None if isinstance(source, Corpus) else {split: dict(skipped[split]) for split in SPLITS}

    return write


def run_pipeline(options: Sequence[str], build: Callable) -> None:
    """Runs the pipeline that `build(pipeline)` makes, to its end; an `InputError` of a worker is raised here again."""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(f"Beam is not installed ({error}): pip install -e '.[beam]'") from error
    try:
        with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            build(pipeline)
    except Exception as error:  # runners wrap what a worker raises, each in its own way
        found = re.search(r"InputError: (.*?)(?: \[while running|\n|$)", str(error))
        if isinstance(error, InputError) or not found:
            raise
        raise InputError(found[1]) from error


def _pipeline(pipeline, parts: Sequence[Part], spec: PrepareSpec, task: Task, folder: Path) -> None:
    import apache_beam as beam

    # Reshuffled, or a runner would keep reading, which is slow, in one place.
    read = pipeline | "parts" >> beam.Create(parts) | "spread" >> beam.Reshuffle()
    counts = read | "count" >> beam.Map(_count, spec)
    listed = beam.pvalue.AsList(counts)
    (
        read
        | "number" >> beam.FlatMap(_numbered, listed, spec, BLOCK)
        | "by block" >> beam.GroupByKey()
        | "pack" >> beam.Map(_pack, spec, task, folder)
    )
    once = pipeline | "once" >> beam.Create([None])
    once | "write counts" >> beam.Map(lambda _, counts: _write_counts(counts, folder), listed)


def _count(part: Part, spec: PrepareSpec) -> dict:
    """How many items a part has, how many rows were left out, by reason, and the first that could not be read."""
    count = {"split": part.split, "part": part.number, "skipped": {}, "read": 0, "first_bad": None}
    if part.names is not None:
        return count | {"items": len(part.names)}
    count["items"] = sum(1 for _ in part.items(spec))
    count["skipped"] = dict(part.source.skipped[part.split])
    if isinstance(part.source, Table):
        count |= {"read": part.source.num_read, "first_bad": part.source.first_bad}
    return count


def _numbered(
    part: Part, counts: Sequence[dict], spec: PrepareSpec, block: int
) -> Iterator[tuple[tuple[str, int], tuple[int, Item]]]:
    """The items of a part with their place in the split, by block."""
    before = (count for count in counts if count["split"] == part.split and count["part"] < part.number)
    for place, item in enumerate(part.items(spec), start=sum(count["items"] for count in before)):
        yield (part.split, place // block), (place, item)


def _pack(block: tuple[tuple[str, int], Iterable], spec: PrepareSpec, task: Task, folder: Path) -> None:
    (split, number), items = block
    path = record_path(folder, split)
    ordered = sorted(items, key=lambda item: item[0])
    vocabulary = _vocabulary(spec.vocabulary, spec.task)
    write_block(path.with_name(f"{path.name}.{number:05d}"), (item for _, item in ordered), vocabulary, task)


def _write_counts(counts: Sequence[dict], folder: Path) -> None:
    ordered = sorted(counts, key=lambda count: (count["split"], count["part"]))
    (folder / COUNTS).write_text(json.dumps(ordered), encoding="utf-8")


@functools.cache
def _vocabulary(path: str, task: str) -> Vocabulary | TokenizerJson:
    """Read once a process."""
    return PrepareSpec(task, None, path, None, None).open_vocabulary()


def main() -> None:
    """The command line: that of `gqa.data.prepare`, and Beam's behind `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preparation.add_arguments(parser)
    parser.add_argument("beam", nargs="*", help="Beam's own options, behind --")
    arguments = parse_arguments(parser)
    preparation.report(preparation.spec_of(arguments), arguments.output, writer(arguments.beam))


if __name__ == "__main__":
    # Workers find functions by their module's name.
    from gqa.data.beam import main as main_of_module

    run(main_of_module)
