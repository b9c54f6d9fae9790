"""python -m gqa.data.tasks --task=docstring --split=heldout --limit=500 --output=docstring.jsonl

Writes the examples of a task as rows that python -m gqa.evaluate --task_file reads: inputs, with the prefix, and the
right answers.

Named tasks: where the text comes from, what is asked of the model, in which lengths, and how it is scored.

| task | source | inputs, targets | score |
|---|---|---|---|
| `c4_span_corruption`, `c4_lm` | C4, English | T5's 512, 114; 512 | loss |
| `cnn_dailymail` | CNN/DailyMail | 512, 256 | ROUGE |
| `arxiv`, `pubmed`, `media_sum`, `multi_news` | Scientific papers, MediaSum, Multi-News | 2048, 512 | ROUGE |
| `wmt14_en_de` | WMT14, English to German | 512, 256 | BLEU |
| `trivia_qa` | TriviaQA with its evidence | 2048, 32 | F1, exact match |
| `docstring` | Python that every installation carries | 512, 64 | ROUGE |
| `long_docstring` | the same | 2048, 512 | ROUGE |
| `supervised` | a table of the user's own | the config's | the config's |
| `sft`, `preferences` | conversations of the user's own | the config's | loss |

Lengths and scores of the public ones are those of GQA §3.1; prefixes and splits are T5's (Raffel et al. 2020,
appendix D), and where T5 has none, as for the long inputs, the nearest of them.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gqa import files
from gqa.command_line import parse_arguments, run
from gqa.data import docstrings, public, tables
from gqa.data.conversations import Conversations
from gqa.data.corpus import Corpus
from gqa.data.examples import CONVERSATIONS
from gqa.data.examples import TASKS as OBJECTIVES
from gqa.errors import InputError, nearest

Row = Mapping[str, Any]
RowSource = docstrings.Docstrings | public.PublicDataset | tables.Table
Source = Corpus | Conversations | RowSource

SUMMARIZE = "summarize: "
METRICS = ("rouge", "bleu", "trivia_qa")
EMPTY = "empty"  # why an example is left out


@dataclass(frozen=True)
class Example:
    """What is asked, without the prefix, what the model is trained to answer, and all answers that are right."""

    inputs: str
    targets: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class NamedTask:
    """An entry of the table above."""

    objective: str  # one of gqa.data.examples.TASKS
    source: str | None  # None: the config says it
    inputs_length: int | None  # tokens, EOS included; None: the config says it
    targets_length: int | None
    prefix: str = ""  # before every input
    metric: str | None = None  # one of METRICS; None: loss alone
    read: Callable[[Row], Example] | None = None  # of a row of the source; None: its `inputs` and `targets`
    splits: Mapping[str, str] = dataclasses.field(  # of a public dataset
        default_factory=lambda: {"train": "train", "heldout": "validation", "test": "test"}
    )


def _column(row: Row, name: str, kind: type = str) -> Any:
    """What a column holds; `InputError` where a row, which a dataset of another form has, is without it."""
    if name not in row:
        raise InputError(f"there is no column {name!r} among {', '.join(row)}; nearest: {nearest(name, row)}")
    if not isinstance(row[name], kind):
        expected = "text" if kind is str else kind.__name__
        raise InputError(f"column {name!r} is a {type(row[name]).__name__}; expected a {expected}")
    return row[name]


def _pair(inputs: str, targets: str) -> Callable[[Row], Example]:
    def read(row: Row) -> Example:
        answer = _column(row, targets)
        return Example(_column(row, inputs), answer, (answer,))

    return read


def _media_sum(row: Row) -> Example:
    said = zip(_column(row, "speaker", list), _column(row, "utt", list), strict=False)
    summary = _column(row, "summary")
    return Example("\n".join(f"{speaker}: {words}" for speaker, words in said), summary, (summary,))


def _trivia_qa(row: Row) -> Example:
    """`question: … context: …` with all evidence, Wikipedia's before the web's; the answer's aliases are right too."""
    pages, results, answer = (_column(row, name, dict) for name in ("entity_pages", "search_results", "answer"))
    evidence = [*_column(pages, "wiki_context", list), *_column(results, "search_context", list)]
    value = _column(answer, "value")
    references = tuple(dict.fromkeys([value, *_column(answer, "aliases", list)]))
    return Example(f"question: {_column(row, 'question')} context: {' '.join(evidence)}", value, references)


def _summaries(source: str, lengths: tuple[int, int], read: Callable[[Row], Example], **more) -> NamedTask:
    return NamedTask("supervised", source, *lengths, SUMMARIZE, "rouge", read, **more)


_C4 = {"train": "train", "heldout": "validation"}
_SHORT, _LONG = (512, 256), (2048, 512)  # GQA §3.1

NAMED_TASKS = {
    "c4_span_corruption": NamedTask("span_corruption", "tfds:c4/en:3.1.0", 512, None, splits=_C4),
    "c4_lm": NamedTask("causal_lm", "tfds:c4/en:3.1.0", 512, None, splits=_C4),
    "cnn_dailymail": _summaries("tfds:cnn_dailymail:3.4.0", _SHORT, _pair("article", "highlights")),
    "arxiv": _summaries("tfds:scientific_papers/arxiv:1.1.1", _LONG, _pair("article", "abstract")),
    "pubmed": _summaries("tfds:scientific_papers/pubmed:1.1.1", _LONG, _pair("article", "abstract")),
    "media_sum": _summaries(
        "tfds:media_sum:1.0.0", _LONG, _media_sum, splits={"train": "train", "heldout": "val", "test": "test"}
    ),
    "multi_news": _summaries("tfds:multi_news:2.1.0", _LONG, _pair("document", "summary")),
    "wmt14_en_de": NamedTask(
        "supervised",
        "tfds:wmt14_translate/de-en:1.0.0",
        *_SHORT,
        "translate English to German: ",
        "bleu",
        _pair("en", "de"),
    ),
    "trivia_qa": NamedTask(
        "supervised",
        "tfds:trivia_qa/rc:1.1.0",
        2048,
        32,
        "",
        "trivia_qa",
        _trivia_qa,
        # The answers of its test split are not public.
        {"train": "train[:90%]", "heldout": "train[90%:]", "test": "validation"},
    ),
    "docstring": NamedTask("supervised", "embedded_large", 512, 64, SUMMARIZE, "rouge"),
    "long_docstring": NamedTask("supervised", "embedded_large", 2048, 512, SUMMARIZE, "rouge"),
    "supervised": NamedTask("supervised", None, None, None),
    **{name: NamedTask(name, None, None, None) for name in OBJECTIVES if name != "supervised"},
}


def named_task(name: str) -> NamedTask:
    """The entry of a task; `InputError` with the nearest for an unknown one."""
    if name not in NAMED_TASKS:
        raise InputError(
            f"task={name!r} is unknown; expected one of {', '.join(NAMED_TASKS)}; nearest: {nearest(name, NAMED_TASKS)}"
        )
    return NAMED_TASKS[name]


def open_source(name: str, source: str | None, fields: Mapping[str, str] | None) -> Source:
    """What the task `name` reads: its own source, or another `source`, of whose columns `fields` says which is what.

    Raises `InputError` for a source that is missing or not of the kind that the task reads.
    """
    task = named_task(name)
    source = source or task.source
    if source is None:
        raise InputError(f"task {name} needs a source: a path, embedded, embedded_large or tfds:NAME")
    if task.objective in CONVERSATIONS:
        if fields is not None:
            raise InputError(f"fields={dict(fields)} has no meaning for task {name}; expected none")
        return Conversations(source, task.objective)
    roles = ("inputs", "targets") if task.objective == "supervised" else ("text",)
    if fields is not None and set(fields) != set(roles):
        raise InputError(f"fields={dict(fields)}; expected the columns of {' and '.join(roles)}")
    if source.startswith(public.PREFIX):
        return public.PublicDataset(source, task.splits)
    if name in ("docstring", "long_docstring") and fields is None:
        return docstrings.Docstrings(source, modules=name == "long_docstring")
    if task.objective == "supervised" or fields is not None or source.endswith(tables.SUFFIXES):
        _refuse_missing(source)
        return tables.Table(source, fields or {role: role for role in roles})
    return Corpus(source)


def examples(
    name: str, split: str, *, source: str | None = None, fields: Mapping[str, str] | None = None
) -> Iterator[Example]:
    """The examples of one split of a supervised task: train, heldout, or test where there is one.

    Those with nothing on either side are left out. Raises `InputError` for a task that is not supervised, for a split
    that is not there and as `open_source` does.
    """
    task = named_task(name)
    if task.objective != "supervised":
        raise InputError(f"task {name} has no inputs and targets; expected a supervised one")
    opened = open_source(name, source, fields)
    if split not in opened.splits:
        raise InputError(f"task {name} has no split {split!r}; expected one of {', '.join(opened.splits)}")
    return read_examples(task, opened, split, fields)


def read_examples(
    task: NamedTask, source: RowSource, split: str, fields: Mapping[str, str] | None
) -> Iterator[Example]:
    """`examples` of an opened source; what is left out is counted in `source.skipped[split]`."""
    read = _pair("inputs", "targets")
    if isinstance(source, public.PublicDataset):
        read = _pair(fields["inputs"], fields["targets"]) if fields else task.read or read
    for row in source.rows(split):
        example = read(row)
        if example.inputs.strip() and example.targets.strip():
            yield example
        else:
            source.skipped[split][EMPTY] += 1


def read_texts(source: RowSource, split: str, fields: Mapping[str, str] | None) -> Iterator[str]:
    """The texts of an opened source of a task that is not supervised."""
    column = fields["text"] if fields and isinstance(source, public.PublicDataset) else "text"
    for row in source.rows(split):
        if (text := _column(row, column)).strip():
            yield text
        else:
            source.skipped[split][EMPTY] += 1


def texts_of(name: str, source: Source, split: str, fields: Mapping[str, str] | None) -> Iterator[str]:
    """The texts of a split of an opened source: documents in random order, pairs as two parts, what messages say."""
    task = named_task(name)
    if isinstance(source, Corpus):
        yield from source.shuffled(split)
    elif isinstance(source, Conversations):
        yield from source.texts(split)
    elif task.objective == "supervised":
        for example in read_examples(task, source, split, fields):
            yield f"{example.inputs}\n{example.targets}"
    else:
        yield from read_texts(source, split, fields)


def _refuse_missing(source: str) -> None:
    if not Path(source).exists():
        raise InputError(f"source {source!r} not found; expected a file or folder of {', '.join(tables.SUFFIXES)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    supervised = [name for name, task in NAMED_TASKS.items() if task.objective == "supervised"]
    parser.add_argument("--task", required=True, choices=supervised)
    parser.add_argument("--split", default="heldout", help="train, heldout (default), or test where there is one")
    parser.add_argument("--source", help="where to read (left out: the task's own)")
    parser.add_argument("--fields", type=parse_fields, metavar="inputs=A,targets=B", help="columns of tables")
    parser.add_argument("--prefix", help="text before every input (left out: the task's own)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples (left out: all)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the .jsonl file to write")
    args = parse_arguments(parser)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit={args.limit}; expected 1 or more")
    if args.output.is_dir():
        raise InputError(f"--output={args.output} is a folder; expected a file to write, such as {args.task}.jsonl")
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"--output={args.output}: there is no folder {args.output.parent}")
    prefix = named_task(args.task).prefix if args.prefix is None else args.prefix
    found = examples(args.task, args.split, source=args.source, fields=args.fields)
    count = 0
    with files.whole(args.output, shared=True) as unfinished:
        with unfinished.open("w", encoding="utf-8", errors="replace") as file:  # of halves of surrogate pairs
            for example in tqdm(itertools.islice(found, args.limit), desc=args.task, unit=" rows", delay=1):
                row = {"inputs": prefix + example.inputs, "answers": list(example.references)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise InputError(f"the {args.split} split of {args.source or args.task} has no examples")
    print(f"wrote {args.output}: {count} rows")


def parse_fields(text: str) -> dict[str, str]:
    """`inputs=A,targets=B` of a command line as a dictionary."""
    pairs = [part.split("=", 1) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; expected ROLE=COLUMN,ROLE=COLUMN")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names a role twice; expected each once")
    return fields


if __name__ == "__main__":
    run(main)
