r"""python -m gqa.data.prepare --task=span_corruption --source=embedded --vocabulary=FILE --inputs_length=512

Tokenises a text source, the inputs and targets of a task, or conversations (a JSONL file), and packs them into rows,
written as array records: train.array_record, heldout.array_record, token_histogram.json (how often each token is a
target) and manifest.json, which says what they were made from. They go to --output=DIR, or to a cache where gqa.train
finds them. The same input gives the same bytes, whatever the machine; a folder that already holds just this is left as
it is, and a preparation that was stopped goes on from its last block of 16,384 texts.

    python -m gqa.data.prepare --task=docstring --vocabulary=FILE
    python -m gqa.data.prepare --task=supervised --source=qa.csv --fields=inputs=question,targets=answer \
        --prefix="question: " --inputs_length=256 --targets_length=32 --vocabulary=FILE
    python -m gqa.data.prepare --task=sft --source=chats.jsonl --template=llama2 --inputs_length=2048 --vocabulary=FILE
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gqa.command_line import parse_arguments, run
from gqa.data.conversations import Conversations
from gqa.data.corpus import SPLITS, Corpus
from gqa.data.examples import CONVERSATIONS, DECODER_TASKS, Supervised, Task, make_task
from gqa.data.public import PREFIX as PUBLIC
from gqa.data.span_corruption import MEAN_NOISE_SPAN_LENGTH, NOISE_DENSITY
from gqa.data.tasks import NAMED_TASKS, Source, named_task, open_source, parse_fields, read_examples, read_texts
from gqa.data.templates import TEMPLATES, Template
from gqa.data.tokenise import BLOCK, BLOCK_FORMAT, SIDES, Item, Totals, finished_texts, remove_blocks, write_split
from gqa.data.tokenizer_json import TokenizerJson, open_vocabulary
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError

FORMAT = 1  # raised when records or their order change, so that no older folder passes for a new one
CONVERSATIONS_FORMAT = 2  # of those alone
MANIFEST, HISTOGRAM = "manifest.json", "token_histogram.json"
_ASKED = ("fields", "prefix", "template", "parts")  # of a manifest: None says that nothing of the kind was asked
_IDENTITY = "identity.json"  # of what a folder that is not complete will hold


@dataclass(frozen=True)
class PrepareSpec:
    """What to prepare: everything that decides the records."""

    task: str  # one of gqa.data.tasks.NAMED_TASKS
    source: str | None  # embedded, embedded_large, a path to text, tables or conversations, tfds:NAME; None: the task's
    vocabulary: str  # SentencePiece .model file, tokenizer.json, or the folder of a checkpoint with one
    inputs_length: int | None  # tokens in a row's inputs; for causal_lm, in its targets; None: the task's own
    targets_length: int | None  # tokens in a row's targets; None: the task's own, or what the inputs call for
    fields: Mapping[str, Any] | None = None  # of tables: column of the inputs and of the targets, or of the text
    prefix: str | None = None  # before every input of a supervised task; None: the task's own
    template: str | None = None  # of conversations: one of gqa.data.templates.TEMPLATES

    @property
    def objective(self) -> str:
        """What becomes of a text or pair: one of gqa.data.examples.TASKS."""
        return named_task(self.task).objective

    def make_task(self, vocabulary_size: int) -> Task:
        """The objective for rows of these lengths."""
        task = named_task(self.task)
        inputs_length = task.inputs_length if self.inputs_length is None else self.inputs_length
        if inputs_length is None:
            raise InputError(f"task {self.task} needs an inputs_length, such as 512")
        targets_length = task.targets_length if self.targets_length is None else self.targets_length
        return make_task(self.objective, inputs_length, targets_length, vocabulary_size)

    def open_vocabulary(self) -> Vocabulary | TokenizerJson:
        """The vocabulary; a decoder's may have any special ids, T5's tasks need T5's and its sentinels."""
        return open_vocabulary(self.vocabulary, foreign=self.objective in DECODER_TASKS)

    def open_template(self, vocabulary: Vocabulary) -> Template | None:
        """How conversations are put; `None` where the task has none."""
        if self.objective not in CONVERSATIONS:
            if self.template is not None:
                raise InputError(f"template={self.template!r} has no meaning for task {self.task}; expected none")
            return None
        if self.template is None:
            raise InputError(f"task {self.task} needs a template; expected one of {', '.join(TEMPLATES)}")
        return Template(self.template, vocabulary)

    def open_source(self) -> Source:
        """What the texts, pairs or conversations are read from."""
        if self.prefix is not None and self.objective != "supervised":
            raise InputError(f"prefix={self.prefix!r} has no meaning for task {self.task}; expected none")
        return open_source(self.task, self.source, self.fields)

    def items(self, source: Source, split: str, vocabulary: Vocabulary) -> Iterator[Item]:
        """The texts of a split, its pairs with the prefix, or its conversations as chunks."""
        task = named_task(self.task)
        if isinstance(source, Corpus):
            yield from source.shuffled(split)
        elif isinstance(source, Conversations):
            template = self.open_template(vocabulary)
            yield from source.chunks(split, template, self.make_task(template.num_ids).max_tokens)
        elif self.objective == "supervised":
            prefix = task.prefix if self.prefix is None else self.prefix
            for example in read_examples(task, source, split, self.fields):
                yield prefix + example.inputs, example.targets
        else:
            yield from read_texts(source, split, self.fields)


@dataclass(frozen=True)
class Manifest:
    """What a folder of records is made from, and what is in it."""

    format: int
    task: str
    inputs_length: int  # 0 for causal_lm
    targets_length: int
    noise_density: float
    mean_noise_span_length: float
    source: str  # its name alone: the digests say what it held
    corpus_digests: dict[str, str]  # by split
    vocabulary_sha256: str
    vocabulary_size: int  # sentinels included
    num_documents: dict[str, int] | None = None  # by split, as are the next two
    num_tokens: dict[str, int] | None = None  # of text, each once, without sentinels
    num_records: dict[str, int] | None = None  # packed rows
    record_bytes: dict[str, int] | None = None  # size of the file
    record_sha256: dict[str, str] | None = None  # of the file
    unigram_cross_entropy: float | None = None  # nats per held-out target, predicted from train frequencies
    lengths: dict[str, dict[str, dict[str, int]]] | None = None  # by split and side: most tokens -> texts or pairs
    num_trimmed: dict[str, dict[str, int]] | None = None  # by split and side: inputs and targets longer than a row
    num_skipped: dict[str, dict[str, int]] | None = None  # by split and reason: rows that were left out
    fields: dict[str, str] | None = None  # of tables
    prefix: str | None = None  # of a supervised task
    template: str | None = None  # of conversations
    parts: dict[str, float] | None = None  # of a mixture, which has no records of its own: folder -> rate

    def make_task(self) -> Task:
        """The task that turns this folder's records into examples."""
        return make_task(
            named_task(self.task).objective,
            self.inputs_length or self.targets_length,
            self.targets_length,
            self.vocabulary_size,
        )


def record_path(folder: str | Path, split: str) -> Path:
    """File of the records of one split."""
    return Path(folder) / f"{split}.array_record"


def default_directory(spec: PrepareSpec) -> Path:
    """Where the records of `spec` are kept between runs: a folder named after all that decides them."""
    inputs = _inputs(spec, spec.open_source(), spec.open_vocabulary())
    key = hashlib.sha256(json.dumps(dataclasses.asdict(inputs), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "records" / key


def cache_folder() -> Path:
    """What is kept between runs: `$GQA_CACHE`, or `~/.cache/gqa` where that is unset."""
    return Path(os.environ.get("GQA_CACHE") or Path.home() / ".cache" / "gqa")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a complete folder of records.

    Raises `InputError` where it is missing or damaged, of another format, or where a file is missing or cut short.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} has no manifest.json; expected a folder that python -m gqa.data.prepare wrote")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete the folder and prepare it again") from error
    if manifest.format != (expected := _format(manifest.template)):
        raise InputError(
            f"{path} has format {manifest.format}; expected {expected}: delete the folder and prepare it again"
        )
    for name in ("corpus_digests", "num_documents", "num_tokens", "num_records", "record_bytes"):
        found = getattr(manifest, name)
        wanted = () if name == "record_bytes" and manifest.parts is not None else SPLITS
        if not isinstance(found, dict) or set(found) != set(wanted):
            raise InputError(
                f"{path} is damaged ({name} is {found}; expected {' and '.join(wanted) or 'none'}); "
                "delete the folder and prepare it again"
            )
    for split, size in manifest.record_bytes.items():
        records = record_path(folder, split)
        found = records.stat().st_size if records.is_file() else 0
        if found != size:
            raise InputError(f"{records} has {found} bytes; expected {size}: delete the folder and prepare it again")
    return manifest


def _format(template: str | None) -> int:
    return FORMAT if template is None else CONVERSATIONS_FORMAT


def prepare(spec: PrepareSpec, output: str | Path, write: "Writer | None" = None) -> Manifest:
    """Writes the records of `spec` to the folder `output`, or finds them there; gives their manifest.

    `write` makes the records of the splits, `None`: this process does. The folder appears complete or not at all.
    Raises `InputError` for a spec that makes no records and for an `output` that holds something else.
    """
    output = Path(output)
    if not output.name and not any(output.iterdir()):  # an empty folder gives way to the complete one
        raise InputError(f"output={str(output)!r} is where the command runs; expected a folder in it, such as records")
    source, vocabulary = spec.open_source(), spec.open_vocabulary()
    inputs = _inputs(spec, source, vocabulary)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _reuse(output, inputs)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(output, inputs) as partial:
        totals, skipped = (write or _write)(partial, inputs.make_task(), spec, source, vocabulary)
        manifest = _finish(partial, inputs, totals, skipped)
        remove_blocks(partial)
        (partial / _IDENTITY).unlink()
        try:
            partial.rename(output)
        except OSError:
            if not output.exists():
                raise
            return _reuse(output, inputs)  # another process, preparing the same, was first
    return manifest


@contextlib.contextmanager
def _partial_folder(output: Path, inputs: Manifest) -> Iterator[Path]:
    """A folder beside `output` to write in: what a preparation of the same left there, else an empty one.

    It is gone afterwards, unless a failure left finished blocks in it.
    """
    partial = output.with_name(f".{output.name}.partial")
    identity = json.dumps(dataclasses.asdict(inputs) | {"blocks": BLOCK_FORMAT})
    with contextlib.ExitStack() as stack:
        partial.mkdir(exist_ok=True)
        if not stack.enter_context(_locked(partial)):  # another process is at it: each for itself, the first wins
            partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            partial.chmod(0o755)  # mkdtemp's folder is private
        found = partial / _IDENTITY
        if not found.is_file() or found.read_text(encoding="utf-8") != identity:
            for path in partial.iterdir():
                path.unlink()
            found.write_text(identity, encoding="utf-8")
        try:
            yield partial
        except BaseException:
            if finished_texts(partial) < BLOCK:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether `folder` is this process's own for as long as the context lasts."""
    descriptor, mine = os.open(folder, os.O_RDONLY), False
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have ended in between, and renamed or removed it.
            mine = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        yield mine
    finally:
        os.close(descriptor)


def _inputs(spec: PrepareSpec, source: Source, vocabulary: Vocabulary) -> Manifest:
    """The manifest as far as it is known before anything is written."""
    template = spec.open_template(vocabulary)
    size = vocabulary.size if template is None else template.num_ids
    task, named = spec.make_task(size), named_task(spec.task)
    source_name = spec.source or named.source
    return Manifest(
        format=_format(spec.template),
        task=spec.task,
        inputs_length=task.inputs_length,
        targets_length=task.targets_length,
        noise_density=NOISE_DENSITY,
        mean_noise_span_length=MEAN_NOISE_SPAN_LENGTH,
        source=source_name.removeprefix(PUBLIC) if source_name.startswith(PUBLIC) else Path(source_name).name,
        corpus_digests={split: source.digest(split) for split in SPLITS},
        vocabulary_sha256=vocabulary.sha256,
        vocabulary_size=size,
        fields=None if spec.fields is None else dict(spec.fields),
        prefix=(named.prefix if spec.prefix is None else spec.prefix) if isinstance(task, Supervised) else None,
        template=spec.template,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a folder."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _reuse(output: Path, inputs: Manifest) -> Manifest:
    manifest = read_manifest(output)
    for name, wanted in dataclasses.asdict(inputs).items():
        found = getattr(manifest, name)
        if (wanted is not None or name in _ASKED) and found != wanted:
            raise InputError(f"{output} holds records of {name}={found}; expected {wanted}: choose another output")
    return manifest


# (folder, task, spec, source, vocabulary) -> by split, what is in its records and how many rows were left out, or None.
Writer = Callable[
    [Path, Task, PrepareSpec, Source, Vocabulary | TokenizerJson],
    tuple[dict[str, Totals], dict[str, dict[str, int]] | None],
]


def _write(folder: Path, task: Task, spec: PrepareSpec, source: Source, vocabulary: Vocabulary | TokenizerJson):
    """A `Writer`."""
    totals: dict[str, Totals] = {}
    for split in SPLITS:
        num_items = len(source.names(split)) if isinstance(source, Corpus | Conversations) else None
        items = functools.partial(spec.items, source, split, vocabulary)
        totals[split] = write_split(record_path(folder, split), items, num_items, vocabulary, task)
    return totals, None if isinstance(source, Corpus) else {split: dict(source.skipped[split]) for split in SPLITS}


def _finish(
    folder: Path, inputs: Manifest, totals: Mapping[str, Totals], skipped: Mapping[str, dict[str, int]] | None
) -> Manifest:
    task = inputs.make_task()
    for split in SPLITS:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted((skipped or {}).get(split, {}).items()))
        if not totals[split].records:
            few = f"is too short for one example of {inputs.task}" if totals[split].documents else "has nothing in it"
            raise InputError(
                f"the {split} split of {inputs.source} {few}" + (f"; left out: {left_out}" if left_out else "")
            )
        if left_out:
            tqdm.write(f"{inputs.source}, {split}: left out {left_out}", file=sys.stderr)
    histogram = {split: [round(count, 2) for count in totals[split].targets.tolist()] for split in SPLITS}
    (folder / HISTOGRAM).write_text(json.dumps(histogram) + "\n", encoding="utf-8")
    supervised = isinstance(task, Supervised)
    manifest = dataclasses.replace(
        inputs,
        num_documents={split: totals[split].documents for split in SPLITS},
        num_tokens={split: totals[split].tokens for split in SPLITS},
        num_records={split: totals[split].records for split in SPLITS},
        record_bytes={split: record_path(folder, split).stat().st_size for split in SPLITS},
        record_sha256={split: _sha256(record_path(folder, split)) for split in SPLITS},
        unigram_cross_entropy=round(_cross_entropy(totals["heldout"].targets, totals["train"].targets), 6),
        lengths={split: totals[split].length_histogram(supervised) for split in SPLITS},
        num_trimmed=_trimmed(totals) if supervised else None,
        num_skipped=None if skipped is None else dict(skipped),
    )
    write_manifest(folder, manifest)
    return manifest


def _trimmed(totals: Mapping[str, Totals]) -> dict[str, dict[str, int]]:
    return {split: dict(zip(SIDES, totals[split].trimmed.tolist(), strict=True)) for split in SPLITS}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cross_entropy(heldout_counts: np.ndarray, train_counts: np.ndarray) -> float:
    """Nats per held-out target of a model that knows the train frequencies alone, with one added to each count."""
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(heldout_counts @ log_probabilities) / heldout_counts.sum())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what is prepared, and where it goes."""
    parser.add_argument("--task", required=True, choices=list(NAMED_TASKS))
    parser.add_argument(
        "--source",
        help="embedded, embedded_large, a folder or file of text or tables, a JSONL file of conversations, tfds:NAME "
        "(left out: the task's)",
    )
    parser.add_argument(
        "--vocabulary",
        required=True,
        metavar="FILE",
        help="SentencePiece .model file, a tokenizer.json, or the folder of a checkpoint with one of them",
    )
    parser.add_argument("--inputs_length", type=int, metavar="N", help="tokens in a row (left out: the task's)")
    parser.add_argument(
        "--targets_length",
        type=int,
        metavar="M",
        help="tokens in a row's targets (left out: the task's, or what the inputs call for)",
    )
    parser.add_argument(
        "--fields", type=parse_fields, metavar="ROLE=COLUMN,…", help="columns of tables: inputs=A,targets=B, or text=A"
    )
    parser.add_argument("--prefix", help="text before every input of a supervised task (left out: the task's)")
    parser.add_argument("--template", choices=TEMPLATES, help="how conversations are put (sft and preferences)")
    parser.add_argument("--output", metavar="DIR", help="folder to write (left out: one in $GQA_CACHE or ~/.cache/gqa)")


def spec_of(args: argparse.Namespace) -> PrepareSpec:
    """The spec that these options say."""
    return PrepareSpec(**{field.name: getattr(args, field.name) for field in dataclasses.fields(PrepareSpec)})


def report(spec: PrepareSpec, output: str | None, write: Writer | None = None) -> None:
    """Prepares and prints what was made, and where."""
    folder = Path(output) if output else default_directory(spec)
    print(json.dumps(dataclasses.asdict(prepare(spec, folder, write)), indent=2))
    print(f"records in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parse_arguments(parser)
    report(spec_of(args), args.output)


if __name__ == "__main__":
    run(main)
