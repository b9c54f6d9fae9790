"""python -m gqa.data.prepare --task=span_corruption --source=embedded --vocabulary=FILE --inputs_length=512

Tokenises a text source and packs it into rows, written as array records: train.array_record, heldout.array_record and
manifest.json, which says what they were made from. They go to --output=DIR, or to a cache where gqa.train finds them.
For --task=sft and --task=preferences the source is a JSONL file of conversations, and --template says how they are put.
The same input gives the same bytes, whatever the machine; a folder that already holds just this is left as it is.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from gqa.command_line import parse_arguments, run
from gqa.data.conversations import Conversations
from gqa.data.corpus import SPLITS, Corpus
from gqa.data.examples import CONVERSATIONS, DECODER_TASKS, TASKS, Task, make_task
from gqa.data.packing import encode_record, pack
from gqa.data.span_corruption import MEAN_NOISE_SPAN_LENGTH, NOISE_DENSITY
from gqa.data.templates import TEMPLATES, Template
from gqa.data.vocabulary import Vocabulary
from gqa.errors import InputError

FORMAT = 1  # raised when records or their order change, so that no older folder passes for a new one

_DOCUMENTS_PER_CALL = 256  # tokenised together
_NUM_OPEN_ROWS = 32


@dataclass(frozen=True)
class PrepareSpec:
    """What to prepare: everything that decides the records."""

    task: str  # one of gqa.data.examples.TASKS
    source: str  # embedded, embedded_large, or a path to a folder or file of text; of conversations, a JSONL file
    vocabulary: str  # SentencePiece .model file
    inputs_length: int  # tokens in a row's inputs; for causal_lm, in its targets
    targets_length: int | None  # tokens in a row's targets; None: what the inputs call for
    template: str | None = None  # of conversations: one of gqa.data.templates.TEMPLATES

    def open_vocabulary(self) -> Vocabulary:
        """The vocabulary; a decoder's may have any special ids, T5's tasks need T5's and its sentinels."""
        return Vocabulary(self.vocabulary, foreign=self.task in DECODER_TASKS)

    def open_source(self, vocabulary: Vocabulary) -> Corpus | Conversations:
        """What `source` holds; raises `InputError` where it or the template does not suit the task."""
        if self.task not in CONVERSATIONS:
            if self.template is not None:
                raise InputError(f"template={self.template!r} has no meaning for task {self.task}; expected none")
            return Corpus(self.source)
        if self.template is None:
            raise InputError(f"task {self.task} needs a template; expected one of {', '.join(TEMPLATES)}")
        return Conversations(self.source, self.task, Template(self.template, vocabulary))


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
    unigram_cross_entropy: float | None = None  # nats per held-out target, predicted from train frequencies
    template: str | None = None  # of conversations
    num_skipped: dict[str, dict[str, int]] | None = None  # of conversations: lines left out, by split and reason

    def make_task(self) -> Task:
        """The task that turns this folder's records into examples."""
        return make_task(
            self.task, self.inputs_length or self.targets_length, self.targets_length, self.vocabulary_size
        )


def record_path(folder: str | Path, split: str) -> Path:
    """File of the records of one split."""
    return Path(folder) / f"{split}.array_record"


def default_directory(spec: PrepareSpec) -> Path:
    """Where the records of `spec` are kept between runs: a folder named after all that decides them.

    It lies in `$GQA_CACHE`, or `~/.cache/gqa` where that is unset.
    """
    vocabulary = spec.open_vocabulary()
    inputs = _inputs(spec, spec.open_source(vocabulary), vocabulary)
    key = hashlib.sha256(json.dumps(dataclasses.asdict(inputs), sort_keys=True).encode()).hexdigest()[:16]
    cache = os.environ.get("GQA_CACHE") or Path.home() / ".cache" / "gqa"
    return Path(cache) / "records" / key


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a complete folder of records.

    Raises `InputError` where it is missing or damaged, of another format, or where a file is missing or cut short.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder} has no manifest.json; expected a folder that python -m gqa.data.prepare wrote")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete the folder and prepare it again") from error
    if manifest.format != FORMAT:
        raise InputError(
            f"{path} has format {manifest.format}; expected {FORMAT}: delete the folder and prepare it again"
        )
    for split, size in manifest.record_bytes.items():
        records = record_path(folder, split)
        found = records.stat().st_size if records.is_file() else 0
        if found != size:
            raise InputError(f"{records} has {found} bytes; expected {size}: delete the folder and prepare it again")
    return manifest


def prepare(spec: PrepareSpec, output: str | Path) -> Manifest:
    """Writes the records of `spec` to the folder `output`, or finds them there; gives their manifest.

    The folder appears complete or not at all. Raises `InputError` for a spec that makes no records and for an `output`
    that holds something else.
    """
    output = Path(output)
    vocabulary = spec.open_vocabulary()
    corpus = spec.open_source(vocabulary)
    inputs = _inputs(spec, corpus, vocabulary)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _reuse(output, inputs)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        manifest = _write(temporary, inputs, corpus, vocabulary)
        temporary.chmod(0o755)  # mkdtemp's folder is private
        try:
            temporary.rename(output)
        except OSError:
            if not output.exists():
                raise
            return _reuse(output, inputs)  # another process, preparing the same, was first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _inputs(spec: PrepareSpec, corpus: Corpus | Conversations, vocabulary: Vocabulary) -> Manifest:
    """The manifest as far as it is known before anything is written."""
    size = corpus.template.num_ids if isinstance(corpus, Conversations) else vocabulary.size
    task = make_task(spec.task, spec.inputs_length, spec.targets_length, size)
    return Manifest(
        format=FORMAT,
        task=spec.task,
        inputs_length=task.inputs_length,
        targets_length=task.targets_length,
        noise_density=NOISE_DENSITY,
        mean_noise_span_length=MEAN_NOISE_SPAN_LENGTH,
        source=Path(spec.source).name,
        corpus_digests={split: corpus.digest(split) for split in SPLITS},
        vocabulary_sha256=hashlib.sha256(vocabulary.path.read_bytes()).hexdigest(),
        vocabulary_size=size,
        template=spec.template,
    )


def _reuse(output: Path, inputs: Manifest) -> Manifest:
    manifest = read_manifest(output)
    for name, wanted in dataclasses.asdict(inputs).items():
        found = getattr(manifest, name)
        if wanted is not None and found != wanted:
            raise InputError(f"{output} holds records of {name}={found}; expected {wanted}: choose another output")
    return manifest


def _write(folder: Path, inputs: Manifest, corpus: Corpus | Conversations, vocabulary: Vocabulary) -> Manifest:
    task = inputs.make_task()
    num_tokens, num_records, record_bytes, target_counts = {}, {}, {}, {}
    for split in SPLITS:
        counts = np.zeros(inputs.vocabulary_size)
        tokens = num_rows = 0
        # One record a group: a read by index then decodes that record alone.
        writer = ArrayRecordWriter(str(record_path(folder, split)), "group_size:1")
        if isinstance(corpus, Conversations):
            chunks = corpus.chunks(split, task.max_tokens, counts)
        else:
            chunks = _chunks(corpus, split, vocabulary, task, counts)
        capacities = (task.inputs_length, task.targets_length)
        for row in pack(chunks, task.lengths, capacities, task.min_tokens, _NUM_OPEN_ROWS):
            writer.write(encode_record(row))
            num_rows += 1
            tokens += sum(map(len, row))
        writer.close()
        left_out = corpus.left_out(split) if isinstance(corpus, Conversations) else ""
        if not num_rows:
            why = f"; left out: {left_out}" if left_out else ""
            raise InputError(f"the {split} split of {inputs.source} is too short for one example of {inputs.task}{why}")
        if left_out:
            tqdm.write(f"{inputs.source}, {split}: left out {left_out}", file=sys.stderr)
        num_tokens[split], num_records[split], target_counts[split] = tokens, num_rows, counts
        record_bytes[split] = record_path(folder, split).stat().st_size
    manifest = dataclasses.replace(
        inputs,
        num_documents={split: len(corpus.names(split)) for split in SPLITS},
        num_tokens=num_tokens,
        num_records=num_records,
        record_bytes=record_bytes,
        unigram_cross_entropy=round(_cross_entropy(target_counts["heldout"], target_counts["train"]), 6),
        num_skipped={s: dict(n) for s, n in corpus.skipped.items()} if isinstance(corpus, Conversations) else None,
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _chunks(
    corpus: Corpus, split: str, vocabulary: Vocabulary, task: Task, target_counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Chunks of the documents of a split in a fixed random order; adds each token's expected number of targets."""
    names = corpus.names(split)
    random.Random(0).shuffle(names)
    progress = tqdm(total=len(names), desc=f"prepare {split}", unit=" documents", disable=len(names) < 1000)
    num_threads = os.cpu_count() or 1
    end = [vocabulary.eos_id] if task.ends_documents and vocabulary.eos_id >= 0 else []
    for start in range(0, len(names), _DOCUMENTS_PER_CALL):
        texts = [corpus.read(name).text for name in names[start : start + _DOCUMENTS_PER_CALL]]
        for ids in vocabulary.encode_all(texts, num_threads):
            tokens = np.array([*ids, *end], np.int32)
            chunks = [tokens[i : i + task.max_tokens] for i in range(0, len(tokens), task.max_tokens)]
            for chunk in chunks:
                if len(chunk) >= task.min_tokens:
                    _count_targets(chunk, task, target_counts)
                    yield chunk
        progress.update(len(texts))
    progress.close()


def _count_targets(chunk: np.ndarray, task: Task, counts: np.ndarray) -> None:
    share, num_sentinels, num_eos = task.expected_targets(len(chunk))
    np.add.at(counts, chunk, share)
    counts[Vocabulary.eos_id] += num_eos
    counts[len(counts) - num_sentinels :] += 1


def _cross_entropy(heldout_counts: np.ndarray, train_counts: np.ndarray) -> float:
    """Nats per held-out target of a model that knows the train frequencies alone, with one added to each count."""
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(heldout_counts @ log_probabilities) / heldout_counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--source", required=True, help="embedded, embedded_large, or a folder or file of text")
    parser.add_argument("--vocabulary", required=True, metavar="FILE", help="SentencePiece .model file")
    parser.add_argument("--inputs_length", required=True, type=int, metavar="N", help="tokens in a row")
    parser.add_argument(
        "--targets_length", type=int, metavar="M", help="tokens in a row's targets (left out: what the inputs call for)"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="how conversations are put (sft and preferences)")
    parser.add_argument("--output", metavar="DIR", help="folder to write (left out: one in $GQA_CACHE or ~/.cache/gqa)")
    args = parse_arguments(parser)
    spec = PrepareSpec(args.task, args.source, args.vocabulary, args.inputs_length, args.targets_length, args.template)
    output = Path(args.output) if args.output else default_directory(spec)
    manifest = prepare(spec, output)
    print(json.dumps(dataclasses.asdict(manifest), indent=2))
    print(f"records in {output}")


if __name__ == "__main__":
    run(main)
