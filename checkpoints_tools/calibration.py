"""Calibration text of a conversion: its rows, the statistics they give, and held-out losses before and after.

Loaders and training are imported where text is given: they would be a third of the start of a conversion without.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax

from checkpoints_tools.rewriting import Source
from gqa import checkpoints, convert, models, sharding
from gqa.convert import statistics, walk
from gqa.convert.plan import plan_budget
from gqa.errors import InputError
from gqa.models.heads import KVHeads

TASKS = {"t5": "span_corruption", "llama": "causal_lm"}
ROWS, LENGTH = 64, 512
BATCH = 4  # rows that pass a layer together
HELDOUT_ROWS = 64
SCORED_BYTES = 2**32  # float32 parameters of a model up to which held-out losses are computed
CHOICES = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)


class Calibration:
    """What the text gives; without text nothing is measured."""

    def __init__(self, source: Source, description: dict | None, records: Path | None, rows: int, seed: int):
        self._source, self._records = source, records
        self.description = description
        self.batches: list[Mapping] | None = None
        self.statistics: statistics.Statistics | None = None
        if records is not None:
            from gqa.data import loader
            from gqa.data.prepare import read_manifest

            rows = min(rows, read_manifest(records).num_records["train"])
            size = next(size for size in range(BATCH, 0, -1) if rows % size == 0)
            batches = loader.train_batches(records, size, seed)
            self.batches = [batches(step) for step in range(rows // size)]  # each row once
            self.description = description | {"rows": rows}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options of a command that calibrates."""
        group = parser.add_argument_group("calibration")
        group.add_argument(
            "--calibrate",
            metavar="TEXT",
            help="text that the model is for: a file, a folder, a folder of prepared records, embedded (Python's "
            "standard library) or embedded_large",
        )
        group.add_argument("--calibration_rows", type=int, metavar="N", help=f"rows read (default: {ROWS})")
        group.add_argument(
            "--calibration_length",
            type=int,
            metavar="N",
            help=f"tokens of a row, of text that is not prepared (default: {LENGTH}, or a decoder's positions)",
        )
        group.add_argument(
            "--statistics", metavar="FILE", help="where the statistics of the text are kept: read if there, else made"
        )

    @classmethod
    def of(cls, args: argparse.Namespace, source: Source, sites: list[str], least_rows: int) -> "Calibration":
        """Reads the text and collects its statistics; raises `InputError` for text of fewer rows."""
        if args.calibrate is None:
            for name in ("statistics", "calibration_rows", "calibration_length"):
                if (given := getattr(args, name)) is not None:
                    raise InputError(f"--{name}={given} needs --calibrate=TEXT")
            return cls(source, None, None, 0, 0)
        rows = ROWS if args.calibration_rows is None else args.calibration_rows
        if rows < 1:
            raise InputError(f"--calibration_rows={rows}; expected at least 1")
        from gqa.data.examples import SMALLEST_ROW
        from gqa.data.prepare import read_manifest

        if args.calibration_length is not None and args.calibration_length < SMALLEST_ROW:
            raise InputError(f"--calibration_length={args.calibration_length}; expected at least {SMALLEST_ROW}")
        if args.statistics and not Path(args.statistics).absolute().parent.is_dir():
            raise InputError(f"--statistics={args.statistics}: its folder does not exist")
        records = _records(args, source)
        manifest = dataclasses.asdict(read_manifest(records))
        text = {name: manifest[name] for name in ("task", "inputs_length", "targets_length", "corpus_digests")}
        description = {"text": args.calibrate} | text
        if (found := min(rows, manifest["num_records"]["train"])) < least_rows:
            raise InputError(
                f"--calibrate={args.calibrate}: {found} row of text; {args.method} needs {least_rows} or more"
            )
        self = cls(source, description, records, rows, args.seed)
        shell, load_layer = walk.read_lazily(source.config, source.read)
        if args.statistics:  # a fingerprint reads the whole model
            identity = json.dumps([statistics.fingerprint(shell, load_layer), manifest, rows, sorted(sites), args.seed])
        if args.statistics and Path(args.statistics).exists():
            self.statistics = statistics.Statistics.load(args.statistics, identity)
        else:
            self.statistics = statistics.collect(shell, load_layer, self.batches, sites)
            if args.statistics:
                self.statistics.save(args.statistics, identity)
        if warning := self.statistics.few():
            print(f"warning: {warning}")
        return self

    def spend(self, heads: int, sites: list[str]) -> dict[str, KVHeads]:
        """`plan_budget` on this text."""
        shell, load_layer = walk.read_lazily(self._source.config, self._source.read)
        return plan_budget(shell, load_layer, heads, sites, self.statistics)

    def scores(self, source: str, output: Path, kv_heads: Mapping[str, KVHeads]) -> dict[str, float] | None:
        """Held-out losses of the teacher, of mean pooling and of the new model, where they fit in memory."""
        if self._records is None or 4 * models.num_parameters(self._source.abstract) > SCORED_BYTES:
            return None
        from gqa.data import loader
        from gqa.training.loop import heldout_metrics

        mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
        heldout = loader.heldout_batches(self._records, BATCH, HELDOUT_ROWS)

        def loss(model: models.Model) -> float:
            return heldout_metrics(model, heldout, mesh)["loss"]

        teacher = checkpoints.load(source, **CHOICES)
        losses = {"teacher": loss(teacher)}
        losses["mean pooling"] = loss(convert.convert(teacher, kv_heads, "mean", jax.random.key(0)))
        losses["this conversion"] = loss(checkpoints.load(output, **CHOICES))
        return losses


def _records(args: argparse.Namespace, source: Source) -> Path:
    from gqa.data.prepare import PrepareSpec, default_directory, prepare, read_manifest
    from gqa.data.tokenizer_json import FILE, open_vocabulary, tokenizer_file

    family = models.family_of(source.config)
    given = Path(args.calibrate)
    companions = source.contents.companions
    if (given / "manifest.json").is_file():
        records, manifest = given, read_manifest(given)
        if args.calibration_length is not None:
            raise InputError(
                f"--calibration_length={args.calibration_length} is for text; {given} holds rows of "
                f"{manifest.inputs_length or manifest.targets_length}: leave it out"
            )
        if (manifest.inputs_length > 0) != (family == "t5") or manifest.task == "preferences":
            raise InputError(
                f"--calibrate={given} holds {manifest.task}; expected rows for a {family} model, such as those of "
                f"{TASKS[family]}"
            )
        if any(file.suffix == ".model" or file.name == FILE for file in companions):
            vocabulary = tokenizer_file(source.directory, companions)
            if manifest.vocabulary_sha256 != open_vocabulary(vocabulary, foreign=True).sha256:
                raise InputError(
                    f"--calibrate={given} was prepared with another vocabulary; expected the model's, {vocabulary}"
                )
    else:
        vocabulary = tokenizer_file(source.directory, companions)
        length = args.calibration_length
        most = source.config.max_position if family == "llama" else None
        if most is not None and length is not None and length > most:
            raise InputError(f"--calibration_length={length}; the model has {most} positions; nearest: {most}")
        if length is None:
            length = LENGTH if most is None else min(LENGTH, most)
        spec = PrepareSpec(TASKS[family], args.calibrate, str(vocabulary), length, None)
        records = default_directory(spec)
        manifest = prepare(spec, records)
    if manifest.vocabulary_size > source.config.vocab_size:
        raise InputError(
            f"--calibrate={given}: its vocabulary has {manifest.vocabulary_size} pieces, the model's embedding "
            f"{source.config.vocab_size}; use the model's own vocabulary"
        )
    return records
