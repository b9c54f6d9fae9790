"""Metrics of a run on disk, and the arithmetic work of a training step."""

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gqa.distributed import is_primary
from gqa.errors import InputError

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAITING_BYTES = 1 << 24  # lines that wait while the disk is full


class MetricsWriter:
    """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

    A line is `{"step": 100, "split": "train", "loss": 2.5, …}`, `step` being the number of steps taken. A run that
    resumes from the checkpoint of step s (`resume_step=s`) first drops what was written after it, so that the history
    reads as that of an uninterrupted run; `resume_step=None`, a run from its beginning, drops everything. `history` is
    a folder whose metrics.jsonl is gone on from instead, such as that checkpoint's.

    A full disk stops nothing: lines wait in memory until there is room. `losses` is the held-out loss by step.

    Of several processes the first writes; the others keep `losses` alone. Raises InputError where metrics.jsonl is
    damaged.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None, history: Path | None = None):
        workdir = Path(workdir)
        lines = [] if resume_step is None else read(history or workdir)
        kept = [line for line in lines if line["step"] <= resume_step]
        self.losses = {line["step"]: line["loss"] for line in kept if line.get("split") == "heldout"}
        self._writes = is_primary()
        if not self._writes:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / JSONL
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._lines = path.open("ab", buffering=_WAITING_BYTES)
        self._full = False
        self._events = _EventFile(workdir / TENSORBOARD, first_step=0 if resume_step is None else resume_step + 1)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one step; they are on disk, safe from a kill of the process, when this returns."""
        values = {name: float(value) for name, value in metrics.items()}
        if split == "heldout":
            self.losses[step] = values["loss"]
        if not self._writes:
            return
        self._lines.write((json.dumps({"step": step, "split": split, **values}) + "\n").encode())
        self._events.write_scalars(step, {f"{split}/{name}": value for name, value in values.items()})
        try:
            # What a failed flush could not write stays in the buffer, and is written by a later one.
            self._lines.flush()
            self._events.flush()
            self._full = False
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not self._full:
                tqdm.write(f"warning: metrics wait in memory: {error.strerror}", file=sys.stderr)
            self._full = True

    def close(self) -> None:
        """Closes the files; raises `OSError` when there is still no room for what waits."""
        if self._writes:
            self._events.close()
            self._lines.close()


def read(workdir: str | os.PathLike) -> list[dict]:
    """The lines of `workdir/metrics.jsonl`, oldest first; none where there is no such file.

    A last line that a kill cut short is left out. Raises InputError where any other line is damaged.
    """
    path = Path(workdir) / JSONL
    if not path.exists():
        return []
    # A cut can fall inside a character of several bytes.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    result = []
    for number, line in enumerate(lines, start=1):
        try:
            result.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON: {line[:60]!r}; delete the line") from error
    return result


class _EventFile:
    """A TensorBoard event file, written without TensorFlow.

    TensorBoard's own `EventFileWriter` imports TensorFlow wherever it is installed.
    """

    def __init__(self, directory: Path, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("xb", buffering=_WAITING_BYTES)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # Tells TensorBoard to forget what earlier files hold from this step on.
        self._write(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self.flush()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))

    def _write(self, **fields) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._records.close()


class MatrixProduct(NamedTuple):
    """Tokens that pass through matrices of so many parameters."""

    parameters: int  # of the kernels; not embeddings that are looked up, nor norm scales
    tokens: int  # per step


class Attention(NamedTuple):
    """Scores and weighted values of the attentions of one site; grouping heads does not change this work."""

    layers: int
    num_heads: int  # query heads
    head_dim: int
    queries: int  # query positions per step, over all rows
    keys: int  # key positions that each query sees; the row's length, also under a causal mask (PaLM appendix B)


def model_flops_per_step(
    products: Iterable[MatrixProduct], attentions: Iterable[Attention], frozen: bool = False
) -> int:
    """FLOPs that the model asks of one training step, forward and backward, without rematerialisation.

    PaLM appendix B, the convention of model FLOPs utilisation: a multiply-add is 2, the backward pass is twice the
    forward. With B rows, a decoder has `MatrixProduct(its kernels and output matrix, B*T)` and
    `Attention(L, H, d, B*T, T)`. An encoder-decoder (S inputs, T targets) has `MatrixProduct(encoder kernels + cross
    key and value kernels, B*S)`, `MatrixProduct(other decoder kernels and output matrix, B*T)`, and the attentions
    of the encoder (B*S, S), the decoder (B*T, T) and across (B*T, S).

    `frozen`: kernels get no gradient, as beside adapters, whose own products are not counted.
    """
    of_products = sum(2 * product.parameters * product.tokens for product in products)
    of_scores = sum(4 * site.layers * site.num_heads * site.head_dim * site.queries * site.keys for site in attentions)
    return (2 if frozen else 3) * of_products + 3 * of_scores
