import dataclasses
import itertools
import shutil
import sys

import numpy as np
import pytest

from gqa.command_line import run
from gqa.data import mixtures
from gqa.data.loader import heldout_batches, train_batches
from gqa.data.mixtures import MixtureConfig, prepare_mixture, rates_by_size, write_mixture
from gqa.data.prepare import PrepareSpec, prepare, read_manifest
from gqa.errors import InputError

TOKENS = "xyz"


@pytest.fixture(scope="module")
def parts(tiny_vocabulary, tmp_path_factory):
    """Three folders of 5, 7 and 11 rows of their own letter."""
    folder = tmp_path_factory.mktemp("parts")
    paths = []
    for letter, count in zip(TOKENS, (5, 7, 11), strict=True):
        source = folder / f"{letter}_text"
        source.mkdir()
        (source / "train.jsonl").write_text("".join(f'{{"text": "{letter * 7}"}}\n' for _ in range(count)))
        (source / "dev.jsonl").write_text("".join(f'{{"text": "{letter * 7}"}}\n' for _ in range(4)))
        spec = PrepareSpec("causal_lm", str(source), str(tiny_vocabulary), 8, None, {"text": "text"})
        prepare(spec, folder / letter)
        paths.append(folder / letter)
    return paths


@pytest.fixture
def letters(tiny_vocabulary):
    """Letters of the rows of a batch."""
    vocabulary = PrepareSpec("causal_lm", None, str(tiny_vocabulary), 8, None).open_vocabulary()
    return lambda batch: [vocabulary.decode(row[:1].tolist()) for row in batch["targets"]]


def test_rows_come_at_their_rates(parts, letters, tmp_path):
    write_mixture(dict(zip(parts, (1.5, 0.5, 1), strict=True)), tmp_path / "mixture")
    assert list(read_manifest(tmp_path / "mixture").parts.values()) == [0.5, 1 / 6, 1 / 3]
    batches = train_batches(tmp_path / "mixture", 6, seed=3)
    rows = [letters(batches(step)) for step in range(12)]
    for step in range(12):  # 3, 1 and 2 of every 6 rows, from the first batch on
        counts = [sum(row.count(letter) for row in rows[: step + 1]) for letter in TOKENS]
        assert counts == [3 * (step + 1), step + 1, 2 * (step + 1)]
    heldout = heldout_batches(tmp_path / "mixture", 4, None)
    found = list(itertools.chain(*(letters(heldout(step)) for step in range(2))))
    assert [found.count(letter) for letter in TOKENS] == [4, 2, 2]  # until the four rows of the first are read


def test_a_batch_of_a_mixture_is_a_function_of_seed_and_step(parts, tmp_path):
    write_mixture(dict(zip(parts, (1, 2, 3), strict=True)), tmp_path / "mixture")
    whole = train_batches(tmp_path / "mixture", 6, seed=3)
    steps = [whole(step) for step in range(8)]
    again = list(train_batches(tmp_path / "mixture", 6, seed=3).prefetch(5, 8, depth=2))
    for found, expected in zip(again, steps[5:], strict=True):
        np.testing.assert_array_equal(found["targets"], expected["targets"])
    for count in (2, 3):
        parts = np.array_split(np.arange(6), count)
        processes = [train_batches(tmp_path / "mixture", 6, seed=3, rows=rows) for rows in parts]
        for step in (0, 7):
            found = np.concatenate([process(step)["targets"] for process in processes])
            np.testing.assert_array_equal(found, steps[step]["targets"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs_length": 16}, r"part .*part was prepared anew since \(targets_length is 16; expected 8\); mix again"),
        ({"source": "z_text"}, r"a part of .*part, .* was prepared anew since \(corpus_digests is .*; mix again"),
    ],
)
def test_a_part_that_was_prepared_anew_is_refused(parts, tiny_vocabulary, tmp_path, changes, message):
    spec = PrepareSpec("causal_lm", "x_text", str(tiny_vocabulary), 8, None, {"text": "text"})
    for part, named in (("part", spec), ("anew", dataclasses.replace(spec, **changes))):
        prepare(dataclasses.replace(named, source=str(parts[0].parent / named.source)), tmp_path / part)
    write_mixture({tmp_path / "part": 1, parts[1]: 1}, tmp_path / "mixture")
    train_batches(tmp_path / "mixture", 2, seed=0)
    shutil.rmtree(tmp_path / "part")
    (tmp_path / "anew").rename(tmp_path / "part")
    for batches in (
        lambda: train_batches(tmp_path / "mixture", 2, seed=0),
        lambda: heldout_batches(tmp_path / "mixture", 2, None),
    ):
        with pytest.raises(InputError, match=f"mixture: {message}"):
            batches()


def test_rates_by_size():
    assert rates_by_size([100, 300], 1, None) == [0.25, 0.75]
    assert rates_by_size([100, 900], 2, None) == [0.25, 0.75]
    assert rates_by_size([100, 900], 1, 300) == [0.25, 0.75]


def test_the_parts_of_a_run_are_tasks_and_folders(parts, tiny_vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path))
    source = str(parts[2].parent / "z_text")
    spec = PrepareSpec("causal_lm", source, str(tiny_vocabulary), 8, None, {"text": "text"})
    config = MixtureConfig({"causal_lm": None, str(parts[0]): None}, temperature=1.0, maximum=10)
    folder = prepare_mixture(config, spec)
    manifest = read_manifest(folder)
    assert [round(rate, 6) for rate in manifest.parts.values()] == [round(10 / 15, 6), round(5 / 15, 6)]
    assert manifest.num_records["train"] == 16
    assert prepare_mixture(config, spec) == folder
    with pytest.raises(InputError, match="'causal_ml' is neither a task nor a folder of records; nearest: causal_lm"):
        prepare_mixture(MixtureConfig({"causal_ml": 1.0}), spec)


def test_two_that_mix_the_same_at_once_find_one_mixture(parts, tiny_vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path))
    config = MixtureConfig({str(parts[0]): 1.0, str(parts[1]): 1.0})
    spec = PrepareSpec("causal_lm", None, str(tiny_vocabulary), 8, None)
    write_manifest, others = mixtures.write_manifest, []

    def write(folder, manifest):
        if not others:
            others.append("while this one writes, another one does from beginning to end")
            others.append(prepare_mixture(config, spec))
        write_manifest(folder, manifest)

    monkeypatch.setattr(mixtures, "write_manifest", write)
    folder = prepare_mixture(config, spec)
    assert folder == others[1] and read_manifest(folder).parts == dict.fromkeys(map(str, parts[:2]), 0.5)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_command_writes_a_mixture(parts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "mixture"
    arguments = [f"--parts={parts[0]}=1,{parts[1]}=3", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", ["mixtures.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        run(mixtures.main)
    assert exit.value.code == 0, capsys.readouterr().err
    assert read_manifest(output).parts == {str(parts[0]): 0.25, str(parts[1]): 0.75}
    monkeypatch.setattr(
        sys, "argv", ["mixtures.py", f"--parts={parts[0]}=1,{parts[0]}/=3", f"--output={tmp_path / 'twice'}"]
    )
    with pytest.raises(InputError, match=r"--parts names '.*/' twice; expected each folder once"):
        mixtures.main()
    with pytest.raises(InputError, match="exists already"):
        write_mixture({parts[0]: 1}, output)
    with pytest.raises(InputError, match="is a mixture itself"):
        write_mixture({output: 1}, tmp_path / "other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (({},), "mixture.parts is empty"),
        (({"a": -1, "b": 1},), "'a' has the rate -1; expected 0 or more"),
        (({"a": float("nan")},), "'a' has the rate nan; expected 0 or more"),
        (({"a": 0, "b": 0.0},), "all rates are 0; expected one above 0"),
        (({"a": "2"},), "'a' has the rate '2'; expected a number"),
        (({"a": None},), "'a' has the rate None; expected a number"),
        (({"a": 1}, 2.0), "'a' has the rate 1; expected None with a temperature"),
        (({"a": None}, 0.0), "mixture.temperature=0.0; expected above 0"),
        (({"a": 1}, None, 10), "mixture.maximum=10; expected 1 or more, with a temperature"),
    ],
)
def test_impossible_mixtures_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        MixtureConfig(*values)


def test_conversations_share_a_batch_with_text_and_preferences_do_not(parts, tiny_vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "chats.jsonl").write_text("".join(f'{{"instruction": "{i}", "output": "b"}}\n' for i in range(20)))
    pairs = (f'{{"prompt": "{i}", "chosen": "b", "rejected": "c"}}\n' for i in range(20))
    (tmp_path / "pairs.jsonl").write_text("".join(pairs))
    like = dict(vocabulary=str(tiny_vocabulary), inputs_length=128, targets_length=None)
    text = PrepareSpec("causal_lm", str(parts[0].parent / "x_text"), fields={"text": "text"}, **like)
    prepare(text, tmp_path / "text")
    chats = PrepareSpec("sft", str(tmp_path / "chats.jsonl"), template="human_bot", **like)
    folder = prepare_mixture(MixtureConfig({"sft": 1.0, str(tmp_path / "text"): 1.0}), chats)
    batch = train_batches(folder, 2, seed=0)(0)
    untrained = (batch["targets_segments"] > 0) & (batch["loss_weights"] == 0)
    assert sorted(untrained.any(axis=1)) == [False, True]  # the loss of a conversation is on its responses alone
    prepare(
        dataclasses.replace(chats, task="preferences", source=str(tmp_path / "pairs.jsonl")), tmp_path / "preferences"
    )
    with pytest.raises(InputError, match="preferences holds preferences, which are not mixed"):
        write_mixture({tmp_path / "preferences": 1}, tmp_path / "mixture")


def test_records_that_cannot_share_a_batch_are_refused(parts, tiny_vocabulary, tmp_path):
    spec = PrepareSpec("causal_lm", str(parts[0].parent / "x_text"), str(tiny_vocabulary), 16, None, {"text": "text"})
    prepare(spec, tmp_path / "longer")
    with pytest.raises(InputError, match=r"longer has targets_length=16, .* 8; expected the same"):
        write_mixture({parts[0]: 1, tmp_path / "longer": 1}, tmp_path / "mixture")
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        write_mixture({parts[0]: 1, tmp_path: 1}, tmp_path / "mixture")
    assert not (tmp_path / "mixture").exists()
    assert dataclasses.replace(spec, inputs_length=8).make_task(180).targets_length == 8
