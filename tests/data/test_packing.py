import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.data.examples import make_task
from gqa.data.packing import decode_record, encode_record, pack, packed_row
from gqa.errors import InputError


def arrays(*rows):
    return [np.array(row, np.int32) for row in rows]


def lists(rows):
    return [[chunk.tolist() for chunk in row] for row in rows]


def test_first_fit_into_open_rows():
    chunks = arrays([1] * 5, [2] * 4, [3] * 3, [4] * 2, [5] * 6)
    rows = lists(pack(chunks, lambda chunk: (0, len(chunk)), (0, 8), (0, 2), num_open_rows=2))
    assert rows == [
        [[1] * 5, [3] * 3],  # full: closed first
        [[2] * 4, [4] * 2],
        [[5] * 6],
    ]


def test_the_oldest_row_closes_when_too_many_are_open():
    chunks = arrays([1] * 5, [2] * 5, [3] * 3)
    assert lists(pack(chunks, lambda chunk: (0, len(chunk)), (0, 8), (0, 2), num_open_rows=1)) == [
        [[1] * 5],
        [[2] * 5, [3] * 3],
    ]


@pytest.mark.parametrize("name", ["span_corruption", "prefix_lm", "causal_lm"])
@settings(deadline=None, derandomize=True, max_examples=50)
@given(lengths=st.lists(st.integers(4, 64), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_rows_hold_every_chunk_once_and_never_overflow(name, lengths, seed):
    task = make_task(name, 64, None, 4096)
    chunks = [np.full(min(n, task.max_tokens), 200 + i) for i, n in enumerate(lengths)]
    capacities = (task.inputs_length, task.targets_length)
    rows = list(pack(chunks, task.room, capacities, task.least_room, num_open_rows=3))
    assert sorted(chunk[0] for row in rows for chunk in row) == [200 + i for i in range(len(lengths))]
    for row in rows:
        # packed_row writes each side into an array of the row's length: it would raise on overflow
        arrays = packed_row(row, task, np.random.default_rng(seed))
        assert arrays["targets_segments"].max() == len(row)
        if name != "causal_lm":
            assert arrays["inputs_segments"].max() == len(row)


def test_causal_row():
    task = make_task("causal_lm", 8, None, 4096)
    row = packed_row(arrays([205, 206, 1], [207, 1]), task, np.random.default_rng(0))
    assert {key: value.tolist() for key, value in row.items()} == {
        "targets": [205, 206, 1, 207, 1, 0, 0, 0],
        "targets_segments": [1, 1, 1, 2, 2, 0, 0, 0],
        "decoder_inputs": [0, 205, 206, 0, 207, 0, 0, 0],
        "loss_weights": [1, 1, 1, 1, 1, 0, 0, 0],
    }
    assert {key: value.dtype.name for key, value in row.items()} == {
        "targets": "int32",
        "targets_segments": "int32",
        "decoder_inputs": "int32",
        "loss_weights": "float32",
    }


def test_span_corruption_row():
    task = make_task("span_corruption", 16, 8, 4096)
    # Chunks of 5 and 4 tokens have one noise token each, and it is the last.
    row = packed_row(arrays([201, 202, 203, 204, 205], [301, 302, 303, 304]), task, np.random.default_rng(0))
    assert {key: value.tolist() for key, value in row.items()} == {
        "inputs": [201, 202, 203, 204, 4095, 1, 301, 302, 303, 4095, 1, 0, 0, 0, 0, 0],
        "inputs_segments": [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0],
        "targets": [4095, 205, 1, 4095, 304, 1, 0, 0],
        "targets_segments": [1, 1, 1, 2, 2, 2, 0, 0],
        "decoder_inputs": [0, 4095, 205, 0, 4095, 304, 0, 0],
        "loss_weights": [1, 1, 1, 1, 1, 1, 0, 0],
    }


def test_prefix_row_splits_at_every_pivot():
    task = make_task("prefix_lm", 8, None, 4096)
    seen = set()
    for seed in range(50):
        row = packed_row(arrays([201, 202, 203, 204]), task, np.random.default_rng(seed))
        inputs, targets = (row[key][row[f"{key}_segments"] > 0].tolist() for key in ("inputs", "targets"))
        assert inputs[-1] == targets[-1] == 1
        assert inputs[:-1] + targets[:-1] == [201, 202, 203, 204]
        seen.add(len(inputs) - 1)
    assert seen == {1, 2, 3}


def test_record_is_data_only():
    record = encode_record(arrays([205, 206, 207], [208]))
    assert np.frombuffer(record, "<i4").tolist() == [2, 3, 1, 205, 206, 207, 208]
    assert lists([decode_record(record)]) == [[[205, 206, 207], [208]]]


@pytest.mark.parametrize(
    "values", [[], [0], [-1, 5], [2, 3, 1, 205], [3, 1], [1, 0], [2, 3, -1, 205, 206], [2**31 - 1]]
)
def test_damaged_record_is_refused(values):
    with pytest.raises(InputError, match="damaged"):
        decode_record(np.array(values, "<i4").tobytes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("span_coruption", 64, None), "expected one of span_corruption, prefix_lm, causal_lm, supervised"),
        (("span_corruption", 4, None), "inputs_length=4 is too short"),
        (("span_corruption", 64, 2), "targets_length=2 holds no example of span_corruption; expected 3 or more"),
        (("causal_lm", 64, 32), "targets_length=32 has no meaning for causal_lm"),
    ],
)
def test_impossible_rows_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_task(*arguments, 4096)


def test_a_chunk_never_needs_more_sentinels_than_there_are():
    task = make_task("span_corruption", 4096, None, 32100)
    row = packed_row([np.full(task.max_tokens, 5)], task, np.random.default_rng(0))
    assert row["targets"][row["targets"] > 31999].min() == 32000
