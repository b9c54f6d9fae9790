import itertools
import shutil
import threading

import numpy as np
import pytest

from gqa.data.loader import heldout_batches, train_batches
from gqa.data.prepare import read_manifest, record_path
from gqa.errors import InputError

TASKS = ["span_corruption", "prefix_lm", "causal_lm"]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def differ(left, right):
    return any((left[key] != right[key]).any() for key in left)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(task, records):
    first = train_batches(records(task), 4, seed=7)
    batches = [first(step) for step in range(12)]  # several epochs
    again = train_batches(records(task), 4, seed=7)
    for step in (11, 3, 0):
        assert_equal(again(step), batches[step])
    assert differ(train_batches(records(task), 4, seed=8)(0), batches[0])
    assert differ(batches[0], batches[1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["train", "heldout"])
def test_processes_share_the_same_global_batch(task, kind, records):
    def open_batches(**process):
        if kind == "train":
            return train_batches(records(task), 6, seed=7, **process)
        return heldout_batches(records(task), 6, None, **process)

    whole = open_batches()
    for shares in ([[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]]):  # a TPU's hosts hold rows that are not neighbours
        parts = [open_batches(rows=rows) for rows in shares]
        assert {len(part) for part in parts} == {len(whole)}
        for step in range(min(len(whole), 4)):
            expected = whole(step)
            for part, rows in zip(parts, shares, strict=True):
                assert_equal(part(step), {key: value[rows] for key, value in expected.items()})


def test_arrays_of_a_batch(records):
    batch = train_batches(records("span_corruption"), 3, seed=0)(0)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "inputs": ((3, 64), "int32"),
        "inputs_segments": ((3, 64), "int32"),
        "targets": ((3, 14), "int32"),
        "targets_segments": ((3, 14), "int32"),
        "decoder_inputs": ((3, 14), "int32"),
        "loss_weights": ((3, 14), "float32"),
    }
    causal = train_batches(records("causal_lm"), 3, seed=0)(0)
    assert causal.keys() == {"targets", "targets_segments", "decoder_inputs", "loss_weights"}


def test_an_epoch_visits_every_record_once_and_epochs_differ_in_order(records):
    num_records = read_manifest(records("causal_lm")).num_records["train"]
    batches = train_batches(records("causal_lm"), 1, seed=7)
    epochs = [[batches(epoch * num_records + i)["targets"].tobytes() for i in range(num_records)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) == num_records


def test_noise_differs_between_epochs(records):
    num_records = read_manifest(records("prefix_lm")).num_records["train"]
    batches = train_batches(records("prefix_lm"), 1, seed=7)
    epochs = [{batches(epoch * num_records + i)["inputs"].tobytes() for i in range(num_records)} for epoch in (0, 1)]
    assert epochs[0] != epochs[1]


def test_heldout_is_padded_to_whole_batches(records):
    num_records = read_manifest(records("span_corruption")).num_records["heldout"]
    assert num_records >= 3
    batches = heldout_batches(records("span_corruption"), 2, 3)
    assert len(batches) == 2
    assert (batches(0)["loss_weights"].sum(axis=1) > 0).all()
    last = batches(1)
    assert last["loss_weights"][0].sum() > 0
    for key, value in last.items():
        assert value.shape == batches(0)[key].shape
        assert not value[1].any()
    everything = heldout_batches(records("span_corruption"), 2, None)
    assert len(everything) == -(-num_records // 2) == len(heldout_batches(records("span_corruption"), 2, 10**6))
    assert_equal(everything(0), batches(0))
    with pytest.raises(IndexError, match=r"step=2 is not in 0..1"):
        batches(2)


def test_prefetch_gives_the_batches_of_its_steps(records):
    for rows in (None, [1, 3]):
        batches = train_batches(records("span_corruption"), 4, seed=7, rows=rows)
        found = list(batches.prefetch(5, 9, depth=2))
        assert len(found) == 4
        for step, batch in enumerate(found, start=5):
            assert_equal(batch, batches(step))
    heldout = heldout_batches(records("span_corruption"), 2, 3)
    assert len(list(heldout.prefetch(0, len(heldout), depth=4))) == 2
    assert list(heldout.prefetch(1, 1, depth=4)) == []
    with pytest.raises(IndexError, match=r"steps 0..3 are not in 0..2"):
        heldout.prefetch(0, 3, depth=4)


def test_abandoned_prefetch_leaves_no_thread(records):
    before = set(threading.enumerate())
    iterator = train_batches(records("span_corruption"), 4, seed=7).prefetch(0, 10**6, depth=2)
    assert len(list(itertools.islice(iterator, 3))) == 3
    del iterator
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def damaged(records, tmp_path):
    """A folder with the right sizes and half of the bytes of each record file turned over."""
    folder = tmp_path / "records"
    shutil.copytree(records("span_corruption"), folder)
    path = record_path(folder, "train")
    content = bytearray(path.read_bytes())
    start = len(content) // 4
    content[start : 3 * start] = bytes(byte ^ 0xFF for byte in content[start : 3 * start])
    path.write_bytes(content)
    return folder


def test_damaged_records_are_refused(damaged):
    with pytest.raises(InputError, match=r"damaged|expected"):
        batches = train_batches(damaged, 4, seed=7)
        for step in range(100):
            batches(step)
    with pytest.raises(InputError, match=r"damaged|expected"):
        list(train_batches(damaged, 4, seed=7).prefetch(0, 100, depth=2))


def test_impossible_requests_are_refused(records, tmp_path):
    folder = records("causal_lm")
    with pytest.raises(ValueError, match=r"rows=\[4, 5\] are not in 0\.\.4"):
        train_batches(folder, 5, seed=0, rows=[4, 5])
    with pytest.raises(InputError, match="batch_size=0"):
        heldout_batches(folder, 0, None)
    with pytest.raises(InputError, match="num_examples=0"):
        heldout_batches(folder, 1, 0)
    with pytest.raises(InputError, match="seed=-1"):
        train_batches(folder, 1, seed=-1)
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        train_batches(tmp_path, 1, seed=0)
