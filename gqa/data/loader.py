"""Batches of packed rows as a pure function of (seed, step), read by index with Grain.

Nothing is kept between batches: a run that starts again at any step sees the batches that it would have seen, and a
batch is the same whatever the number of processes, each of which reads its own rows.
"""

from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gqa.data.examples import Task
from gqa.data.packing import decode_record, packed_row
from gqa.data.prepare import Manifest, read_manifest, record_path
from gqa.errors import InputError

Batch = dict[str, np.ndarray]

_HELDOUT_SEED = 0  # the held-out noise is the same in every run, so that losses compare
_ENDLESS = 2**50  # rows; repeat(None) gives Grain 2**63 of them, which overflow its count of batches


class Batches:
    """`batches(step)` is the batch of a step: arrays as `packing.packed_row` makes them, [B, length] each.

    `len(batches)` is the number of batches (held-out ones) or endless; `manifest` says what the records are.
    """

    def __init__(
        self, rows: grain.MapDataset, manifest: Manifest, batch_size: int, process_index: int, process_count: int
    ):
        self.manifest = manifest
        self._num_steps = len(rows) // batch_size
        # Batches of one process's rows: those of a step lie side by side, one for each process.
        self._dataset = rows.batch(batch_size // process_count)
        self._process_index = process_index
        self._process_count = process_count

    def __len__(self) -> int:
        return self._num_steps

    def __call__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(f"step={step} is not in 0..{len(self) - 1}")
        return self._dataset[step * self._process_count + self._process_index]

    def prefetch(self, start_step: int, stop_step: int, depth: int) -> Iterator[Batch]:
        """The batches of `start_step`..`stop_step - 1`, with up to `depth` made ahead by a background thread."""
        if not 0 <= start_step <= stop_step <= len(self):
            raise IndexError(f"steps {start_step}..{stop_step} are not in 0..{len(self)}")
        count = self._process_count
        mine = self._dataset[start_step * count + self._process_index : stop_step * count : count]
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=depth)
        return iter(mine.to_iter_dataset(options))


def train_batches(
    folder: str | Path, batch_size: int, seed: int, *, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Endless batches of the train records of `folder`, `batch_size` rows over all processes.

    Each epoch visits every record once in an order of its own; noise is drawn from (seed, position). The parts of a
    mixture have epochs of their own. Raises `InputError` for a batch size that the processes do not divide and for a
    folder that `read_manifest` refuses.
    """
    _check_batch(batch_size, process_index, process_count)
    manifest, rows = _open(folder, "train", seed, endless=True)
    return Batches(rows, manifest, batch_size, process_index, process_count)


def heldout_batches(
    folder: str | Path, batch_size: int, num_examples: int | None, *, process_index: int = 0, process_count: int = 1
) -> Batches:
    """Batches of the first `num_examples` held-out records (None, or more than there are: all), with fixed noise.

    Of a mixture there are as many as its rates allow until one part is read to its end. The last batch is filled with
    rows of padding, whose `loss_weights` are 0. Raises as `train_batches` does.
    """
    _check_batch(batch_size, process_index, process_count)
    if num_examples is not None and num_examples < 1:
        raise InputError(f"num_examples={num_examples}; expected 1 or more")
    manifest, rows = _open(folder, "heldout", _HELDOUT_SEED, num_examples)
    return Batches(_padded(rows, batch_size), manifest, batch_size, process_index, process_count)


def ordered_batches(folder: str | Path, split: str, batch_size: int) -> Batches:
    """Batches of all records of a split in the order in which they lie, for one process.

    The last is filled with padding, as are held-out ones.
    """
    manifest, rows = _open(folder, split, _HELDOUT_SEED)
    return Batches(_padded(rows, batch_size), manifest, batch_size, 0, 1)


def _padded(rows: grain.MapDataset, batch_size: int) -> grain.MapDataset:
    num_padding = -len(rows) % batch_size
    if not num_padding:
        return rows
    padding = {key: np.zeros_like(value) for key, value in rows[0].items()}
    return grain.MapDataset.concatenate([rows, grain.MapDataset.source([padding] * num_padding)])


def _open(
    folder: str | Path, split: str, seed: int, num_rows: int | None = None, *, endless: bool = False
) -> tuple[Manifest, grain.MapDataset]:
    """The manifest and the first `num_rows` rows of a split (None: all), or its epochs, each shuffled, without end."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed}; expected 0..{2**32 - 1}")
    manifest = read_manifest(folder)
    if manifest.parts is not None:
        # Seeds of their own, so that parts of one length are not read in one order.
        opened = [_open(part, split, (seed + i) % 2**32, endless=endless)[1] for i, part in enumerate(manifest.parts)]
        # Grain's own rounding would make 199 of 200: hundredths of the smallest rate, which it leaves as they are.
        rates = list(manifest.parts.values())
        mixed = grain.MapDataset.mix(opened, [round(100 * rate / min(rates)) for rate in rates])
        return manifest, mixed[:num_rows]
    source = _Records(record_path(folder, split))
    if len(source) != manifest.num_records[split]:
        raise InputError(
            f"{source.path} has {len(source)} records; expected {manifest.num_records[split]}: "
            "delete the folder and prepare it again"
        )
    dataset = grain.MapDataset.source(source).seed(seed)
    if endless:
        dataset = dataset.shuffle().repeat(_ENDLESS // len(dataset))
    else:
        dataset = dataset[:num_rows]
    return manifest, dataset.random_map(_Row(manifest.make_task()))


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        nearest = max(round(batch_size / process_count), 1) * process_count
        raise InputError(f"batch_size={batch_size} does not divide over {process_count} processes; nearest: {nearest}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in 0..{process_count - 1}")


class _Records:
    """Random access to the records of a file; a record that does not read is an `InputError`."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}); delete the folder and prepare it again") from error

    def __len__(self) -> int:
        return self._reader.num_records()

    def __getitem__(self, index: int) -> bytes:
        # A range of one, not a list of one as in grain.sources.ArrayRecordDataSource: a list costs time linear in the
        # number of records of the file, measured here 350 us against 2 us for 140,000.
        try:
            return self._reader.read(index, index + 1)[0]
        except (RuntimeError, ValueError, OSError, IndexError) as error:
            raise InputError(
                f"record {index} of {self.path} is damaged ({error}); delete the folder and prepare it again"
            ) from error


class _Row(grain.transforms.RandomMap):
    def __init__(self, task: Task):
        self._task = task

    def random_map(self, element: bytes, rng: np.random.Generator) -> Batch:
        return packed_row(decode_record(element), self._task, rng)
