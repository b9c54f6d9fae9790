import json
import resource
import sys
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gqa.errors import InputError
from gqa.training.metrics import Attention, MatrixProduct, MetricsWriter, model_flops_per_step, read

# TensorBoard's switch to read events with its own file code, and not import TensorFlow where it is installed.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))


def train(workdir, resume_step, until):
    """A run that evaluates before its first step, then trains in strides of 10 steps."""
    writer = MetricsWriter(workdir, resume_step)
    if resume_step is None:
        writer.write(0, "heldout", {"loss": 9.5})
    for step in range((resume_step or 0) + 10, until + 1, 10):
        writer.write(step, "train", {"loss": 1 / step, "grad_norm": 0.1})
    writer.close()


def scalars(workdir, tag):
    accumulator = EventAccumulator(str(workdir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_lines_on_disk(tmp_path):
    train(tmp_path, None, 20)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 0, "split": "heldout", "loss": 9.5}\n'
        '{"step": 10, "split": "train", "loss": 0.1, "grad_norm": 0.1}\n'
        '{"step": 20, "split": "train", "loss": 0.05, "grad_norm": 0.1}\n'
    )
    assert read(tmp_path)[1] == {"step": 10, "split": "train", "loss": 0.1, "grad_norm": 0.1}


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, "train", {"loss": 2.0})
    assert read(tmp_path) == [{"step": 1, "split": "train", "loss": 2.0}]
    assert scalars(tmp_path, "train/loss") == [(1, 2.0)]
    writer.close()


@pytest.mark.parametrize("resume_step", [None, 20])
def test_a_resumed_history_equals_an_uninterrupted_one(tmp_path, resume_step):
    train(tmp_path / "whole", None, 50)
    train(tmp_path / "killed", None, 40)  # the last checkpoint is `resume_step`
    train(tmp_path / "killed", resume_step, 50)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    for tag in ("train/loss", "heldout/loss"):
        assert scalars(tmp_path / "killed", tag) == scalars(tmp_path / "whole", tag)
    assert not list((tmp_path / "killed").glob("*.tmp"))


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_line_cut_short_by_a_kill(tmp_path, cut):
    train(tmp_path, None, 20)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    steps = [line["step"] for line in read(tmp_path)]
    assert steps == ([0, 10, 20] if cut == 1 else [0, 10])  # cut == 1: only the newline is missing
    train(tmp_path, 10, 20)
    assert path.read_bytes() == whole


def test_a_character_cut_in_two(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 1}\n{"é'.encode()[:-1])
    assert read(tmp_path) == [{"step": 1}]


def test_damage_before_the_last_line_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"""metrics.jsonl line 2 is not JSON: '\{"ste'; delete the line"""):
        MetricsWriter(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"ste\n{"step": 3}\n'


def test_a_full_disk_loses_no_line(tmp_path, capsys):
    """Lines wait, however many they are, and are written when there is room."""
    train(tmp_path / "whole", None, 5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path / "full", None)
    writer.write(0, "heldout", {"loss": 9.5})
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
    try:
        for step in range(10, 5000, 10):
            writer.write(step, "train", {"loss": 1 / step, "grad_norm": 0.1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "full" / "metrics.jsonl").stat().st_size <= 150
    writer.write(5000, "train", {"loss": 1 / 5000, "grad_norm": 0.1})
    writer.close()
    whole, full = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "full"))
    assert full == whole
    assert scalars(tmp_path / "full", "train/loss") == scalars(tmp_path / "whole", "train/loss")
    assert capsys.readouterr().err == "warning: metrics wait in memory: File too large\n"


def test_a_history_from_elsewhere(tmp_path):
    """As of a checkpoint, when the working folder's own is lost."""
    train(tmp_path / "whole", None, 50)
    (tmp_path / "checkpoint").mkdir()
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "checkpoint" / "metrics.jsonl").write_text("".join(lines[:4]))
    writer = MetricsWriter(tmp_path / "new", 20, history=tmp_path / "checkpoint")
    assert writer.losses == {0: 9.5}
    writer.write(30, "heldout", {"loss": 8.5})
    assert writer.losses == {0: 9.5, 30: 8.5}
    writer.close()
    kept = [json.loads(line) for line in lines[:3]]
    assert read(tmp_path / "new") == [*kept, {"step": 30, "split": "heldout", "loss": 8.5}]


def test_no_history(tmp_path):
    assert read(tmp_path / "absent") == []


def test_flops_of_a_decoder():
    # T=4, B=3, L=2, D=8, H=2, K=1, d=4, F=16 (gated), V=10
    kernels = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10
    assert kernels == 1232
    # forward: 2 * 1232 * 12 = 29_568 and 4 * 2 layers * 2 * 4 * 12 queries * 4 keys = 3_072
    assert model_flops_per_step([MatrixProduct(1232, 12)], [Attention(2, 2, 4, 12, 4)]) == 97_920


def test_flops_of_an_encoder_decoder():
    # S=6, T=4, B=3; one layer each; D=8, H=K=2, d=4, F=16 (gated), V=10
    encoder, decoder_self, decoder_mlp = 4 * 64 + 384, 4 * 64, 384
    products = [
        MatrixProduct(encoder + 2 * 64, tokens=18),  # with the cross keys and values: 768
        MatrixProduct(decoder_self + 2 * 64 + decoder_mlp + 80, tokens=12),  # 848
    ]
    attentions = [Attention(1, 2, 4, 18, 6), Attention(1, 2, 4, 12, 4), Attention(1, 2, 4, 12, 6)]
    # forward: 27_648 + 20_352 and 3_456 + 1_536 + 2_304
    assert model_flops_per_step(products, attentions) == 3 * 55_296
