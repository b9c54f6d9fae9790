"""Configurations: every shipped one parses, and each impossible one is refused with the nearest that is possible."""

import math
import re
from pathlib import Path

import pytest

from gqa import models
from gqa.command_line import load_config
from gqa.data.conversations import RATINGS
from gqa.data.prepare import read_manifest
from gqa.errors import InputError
from gqa.training import config as run_config

ROOT = Path(__file__).parents[2]
# Those in folders below belong to other commands.
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
DPO = dict(beta=0.1, loss="sigmoid", label_smoothing=0.0, length_normalised=False, reference="cached")
DISTILLATION = dict(teacher="folder", text_weight=1.0, kl_weight=1.0, attention_weight=0.0, top_k=None, cache=None)


def error_of(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path):
    raw, named = load_config(path), []  # on the command line
    if raw.model.size is None and raw.model.checkpoint is None:
        named.append("--config.model.checkpoint=somewhere")
    if raw.data.vocabulary is None:
        named.append("--config.data.vocabulary=assets/vocabulary/python_4096.model")
    raw = load_config(path, named)
    config = run_config.parse(raw)
    config.check_devices(1)
    assert config.steps >= 1
    if config.data.vocabulary.startswith("assets/"):  # others come with their checkpoint
        assert (ROOT / config.data.vocabulary).is_file()
    if config.model.size is not None:
        architecture = config.model.architecture()
        assert architecture.dtype == config.model.dtype
        assert models.num_parameters(models.abstract(architecture)) > 0


@pytest.mark.parametrize("name", ["uptrain_t5_xxl_gqa8", "uptrain_llama_2_7b_gqa8"])
def test_the_configs_to_copy_need_no_neighbours(name, tmp_path):
    path = tmp_path / "mine.py"
    text = (ROOT / "configs" / f"{name}.py").read_text()
    path.write_text(re.sub(r"\bsize=.*,", "size=None,", re.sub(r"changes=.*,", "changes=dict(),", text)))
    config = run_config.parse(load_config(path, ["--config.model.checkpoint=somewhere"]))
    assert config.model.size is None
    assert config.steps == round(0.05 * config.uptrain.original_steps)


def test_configs_are_found():
    assert "teacher_t5" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"train.stpes": 5},
            "config.train: unknown 'stpes'; expected one of steps, batch_size, accumulation, seed, z_loss, log_every, "
            "eval_every, eval_examples, save_every, keep, keep_minutes, mirror, skip_above, roll_back_after, "
            "peak_tflops; nearest: steps",
        ),
        ({"train.batch_size": "8"}, "config.train.batch_size='8' is a str; expected int"),
        ({"train.batch_size": True}, "config.train.batch_size=True is a bool; expected int"),
        ({"train.batch_size": 8.0}, "config.train.batch_size=8.0 is a float; expected int"),
        ({"train.steps": "x"}, "config.train.steps='x' is a str; expected int or None"),
        ({"train": 3}, None),
        ({"train.steps": 0}, "train.steps=0; expected at least 1"),
        ({"train.keep": 0}, "train.keep=0; expected at least 1"),
        ({"train.skip_above": 1}, "train.skip_above=1.0; expected more than 1, such as 5, or None"),
        ({"train.roll_back_after": 0}, "train.roll_back_after=0; expected more than 0, such as 20, or None"),
        ({"train.keep_minutes": -3}, "train.keep_minutes=-3.0; expected more than 0, such as 60, or None"),
        ({"train.peak_tflops": float("inf")}, "train.peak_tflops=inf; expected more than 0, such as 989, or None"),
        ({"train.z_loss": -1}, "train.z_loss=-1.0; expected a finite number of at least 0 (T5: 1e-4)"),
        ({"train.z_loss": math.inf}, "train.z_loss=inf; expected a finite number of at least 0 (T5: 1e-4)"),
        ({"train.z_loss": math.nan}, "train.z_loss=nan; expected a finite number of at least 0 (T5: 1e-4)"),
        ({"model.dropout_rate": 1.0}, "model.dropout_rate=1.0; expected a number in [0, 1), such as 0.1"),
        ({"model.dropout_rate": -0.1}, "model.dropout_rate=-0.1; expected a number in [0, 1), such as 0.1"),
        ({"model.dropout_rate": math.nan}, "model.dropout_rate=nan; expected a number in [0, 1), such as 0.1"),
        (
            {"optimizer.learning_rate": math.inf},
            "optimizer.learning_rate=inf; expected a finite number above 0; nearest: 1e-6 or 1.0",
        ),
        ({"train.accumulation": 3}, "train.accumulation=3 does not divide train.batch_size=8; nearest: 2"),
        ({"train.accumulation": 16}, "train.accumulation=16 does not divide train.batch_size=8; nearest: 8"),
        (
            {"model.size": None},
            "model.size (from scratch) or model.checkpoint (go on from a folder): set one of them",
        ),
        (
            {"model.size": None, "model.checkpoint": "folder"},
            "model.changes belongs to model.size; a checkpoint has the architecture it has",
        ),
        (
            {"model.dtype": "float16"},
            "model.dtype: unknown 'float16'; expected one of float32, bfloat16; nearest: bfloat16",
        ),
        ({"model.remat": "dot"}, "model.remat: unknown 'dot'; expected one of none, full, dots; nearest: dots"),
        ({"train.steps": None}, "train.steps or uptrain (original_steps and alpha): set exactly one of them"),
        (
            {"uptrain": {"original_steps": 10, "alpha": 0.5}},
            "train.steps or uptrain (original_steps and alpha): set exactly one of them",
        ),
        (
            {"uptrain": {"original_steps": 10, "alpha": 0.0}},
            "uptrain.alpha=0.0; expected a share in (0, 1], such as 0.05",
        ),
        (
            {"uptrain": {"original_steps": 0, "alpha": 0.5}},
            "uptrain.original_steps=0; expected at least 1 (T5.1.1: 1000000)",
        ),
        (
            {"train.steps": None, "uptrain": {"original_steps": 2**31 - 100, "alpha": 0.5}},
            "the run ends at step 3221225322 of its schedule; expected at most 2147483647: check "
            "uptrain.original_steps",
        ),
        ({"uptrain": {"alpha": 0.5}}, "config.uptrain.original_steps is missing"),
        ({"dpo": DPO | {"beta": float("nan")}}, "dpo.beta=nan; expected a number above 0, such as 0.1"),
        ({"dpo": DPO | {"beta": float("inf")}}, "dpo.beta=inf; expected a number above 0, such as 0.1"),
        (
            {"reward": {"margins": (0.0, 1.0, 2.0, float("nan"))}},
            f"reward.margins=(0.0, 1.0, 2.0, nan); expected 4 numbers of at least 0, for {', '.join(RATINGS)}",
        ),
        (
            {"distillation": DISTILLATION | {"kl_weight": float("nan")}},
            "distillation.kl_weight=nan; expected at least 0",
        ),
        (
            {"optimizer.name": "adam"},
            "optimizer.name='adam'; expected one of adafactor, adamw; nearest: adamw",
        ),
    ],
)
def test_impossible_configs(tiny_config, overrides, message):
    found = error_of(run_config.parse, tiny_config("t5", overrides))
    assert found == message or (message is None and found.startswith("config.train=3; expected a section with steps, "))


def test_a_missing_section_is_named(tiny_config):
    raw = tiny_config("t5")
    del raw["mesh"]
    assert error_of(run_config.parse, raw) == "config.mesh is missing"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("t5", {"cross_kv_heads": 3}, "cross_kv_heads=3 does not divide num_heads=8; nearest: 2, 4"),
        ("llama", {"decoder_self_kv_heads": 16}, "decoder_self_kv_heads=16 does not divide num_heads=8; nearest: 8"),
        (
            "llama",
            {"decoder_self_kv_heads": (8, 4, 2)},
            "decoder_self_kv_heads names 3 layers, the model has 2; give one number or 2",
        ),
        ("t5", {"d_model": 0}, "d_model=0; expected at least 1; nearest: 1"),
        ("t5", {"num_heads": -8}, "num_heads=-8; expected at least 1; nearest: 1"),
        ("t5", {"num_encoder_layers": 0}, "num_encoder_layers=0; expected at least 1; nearest: 1"),
        ("llama", {"d_ff": -4}, "d_ff=-4; expected at least 1; nearest: 1"),
        ("llama", {"head_dim": 0}, "head_dim=0; expected at least 1; nearest: 1"),
        ("llama", {"d_model": "64"}, "model.changes.d_model='64' is a str; expected int"),
        ("llama", {"rope_theta": None}, "model.changes.rope_theta=None is a NoneType; expected float"),
    ],
)
def test_impossible_architectures(tiny_config, family, changes, message):
    raw = tiny_config(family)
    raw["model"]["changes"] |= changes
    assert error_of(run_config.parse(raw).model.architecture) == message


def test_an_unknown_change_names_the_nearest(tiny_run):
    found = error_of(tiny_run("llama", {"model.changes": {"d_fff": 64}}).model.architecture)
    assert found.startswith("model.changes: unknown 'd_fff'; expected one of vocab_size, d_model, ")
    assert found.endswith("; nearest: d_ff")


def test_an_unknown_size_names_what_there_is(tiny_run):
    found = error_of(tiny_run("llama", {"model.size": "llama_5"}).model.architecture)
    assert found.startswith("no model size 'llama_5'; expected one of t5_1_1_mini, t5_1_1_small, ")


def test_changes_and_choices_reach_the_architecture(tiny_run):
    changes = {"num_layers": 3, "decoder_self_kv_heads": (8, 4, 1), "num_heads": 8}
    config = tiny_run("llama", {"model.changes": changes, "model.dropout_rate": 0.1, "model.remat": "full"})
    architecture = config.model.architecture()
    assert architecture.kv_heads("decoder_self") == (8, 4, 1)
    assert (architecture.dropout_rate, architecture.remat, architecture.scan_layers) == (0.1, "full", True)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "mesh", "message"),
    [
        (8, 1, (-1, 1, 1), None),
        (16, 2, (2, 4, 1), None),
        (
            12,
            1,
            (-1, 1, 1),
            "train.batch_size=12 in 1 micro-batch(es) is not divisible by data*fsdp=8 devices; nearest: 16",
        ),
        (
            8,
            2,
            (4, 2, 1),
            "train.batch_size=8 in 2 micro-batch(es) is not divisible by data*fsdp=8 devices; nearest: 16",
        ),
        (
            6,
            1,
            (1, 4, 2),
            "train.batch_size=6 in 1 micro-batch(es) is not divisible by data*fsdp=4 devices; nearest: 8",
        ),
        (
            6,
            1,
            (2, -1, 1, 2),
            "train.batch_size=6 in 1 micro-batch(es) is not divisible by slice*data*fsdp=8 devices; nearest: 8",
        ),
        (
            8,
            1,
            (3, 1, 1),
            "mesh data=3 x fsdp=1 x tensor=1 needs 3 device(s), found 8; nearest: data=8 x fsdp=1 x tensor=1",
        ),
    ],
)
def test_batches_and_devices(tiny_run, batch_size, accumulation, mesh, message):
    sizes = dict(zip(("data", "fsdp", "tensor", "slice"), mesh, strict=False))
    overrides = {"train.batch_size": batch_size, "train.accumulation": accumulation, "mesh": sizes}
    config = tiny_run("t5", overrides)
    if message is None:
        config.check_devices(8)
    else:
        assert error_of(config.check_devices, 8) == message


def test_steps_of_uptraining(tiny_run):
    """GQA §3.1: alpha = 0.05 of T5's pre-training; the schedule goes on from where it ended."""
    config = tiny_run("t5", {"train.steps": None, "uptrain": {"original_steps": 1_000_000, "alpha": 0.05}})
    assert (config.steps, config.schedule_offset) == (50_000, 1_000_000)
    config = tiny_run("t5", {"train.steps": None, "uptrain": {"original_steps": 10, "alpha": 0.01}})
    assert (config.steps, config.schedule_offset) == (1, 10)
    assert (tiny_run("t5").steps, tiny_run("t5").schedule_offset) == (20, 0)


def test_a_run_as_json(tiny_run):
    overrides = {"model.changes": {"decoder_self_kv_heads": (8, 1)}, "optimizer.learning_rate": 1}
    flat = run_config.flatten(run_config.to_json(tiny_run("llama", overrides)))
    assert flat["model.changes.decoder_self_kv_heads"] == [8, 1]
    assert flat["optimizer.learning_rate"] == 1.0 and flat["train.steps"] == 20 and flat["uptrain"] is None


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_records_of_the_config_are_accepted(tiny_run, tiny_records, family):
    task = {"t5": "span_corruption", "llama": "causal_lm"}[family]
    assert tiny_run(family).prepared_records() == tiny_records(task)


def test_records_of_another_config_are_refused(tiny_run, tiny_records, tiny_vocabulary, tmp_path):
    records = tiny_records("causal_lm")
    found = error_of(tiny_run("llama", {"data.inputs_length": 64}).prepared_records)
    assert found == (
        f"records {records} are of CausalLM(inputs_length=0, targets_length=32, vocabulary_size=147); "
        "the config's data says CausalLM(inputs_length=0, targets_length=64, vocabulary_size=147)"
    )
    other = tmp_path / "other.model"
    # An unknown field of the file's format at its end: the same pieces, another file.
    other.write_bytes(tiny_vocabulary.read_bytes() + b"\xf8\x3f\x01")
    found = error_of(tiny_run("llama", {"data.vocabulary": str(other)}).prepared_records)
    assert found == f"records {records} were prepared with another vocabulary than {other}"


def test_records_that_a_model_cannot_read_are_refused(tiny_run, tiny_records):
    t5, llama = (tiny_run(family).model.architecture() for family in ("t5", "llama"))
    spans, causal = (read_manifest(tiny_records(task)) for task in ("span_corruption", "causal_lm"))
    run_config.check_task(spans, t5)
    run_config.check_task(causal, llama)
    assert error_of(run_config.check_task, causal, t5) == (
        "data.task='causal_lm' is not for a t5 model; expected one of span_corruption, prefix_lm, supervised"
    )
    assert error_of(run_config.check_task, spans, llama) == (
        "data.task='span_corruption' is not for a llama model; expected one of causal_lm, sft, preferences"
    )
    run_config.check_vocabulary(causal, models.replace(llama, vocab_size=147))
    assert error_of(run_config.check_vocabulary, causal, models.replace(llama, vocab_size=146)) == (
        "the records' vocabulary has 147 pieces, the model's embedding 146; use the model's own vocabulary"
    )


def test_heads_that_a_mesh_cannot_cut_are_refused(tiny_run):
    t5 = tiny_run("t5").model.architecture()  # of 8 heads
    for tensor in (1, 2, 8):
        run_config.check_heads(t5, tensor)
    for tensor, nearest in ((3, 2), (16, 8)):
        expected = f"mesh.tensor={tensor} does not divide num_heads=8; nearest: {nearest}"
        assert error_of(run_config.check_heads, t5, tensor) == expected


def test_records_of_another_vocabulary_than_the_checkpoints_are_refused(
    tiny_run, tiny_records, tiny_vocabulary, tmp_path
):
    llama, manifest = tiny_run("llama").model.architecture(), read_manifest(tiny_records("causal_lm"))
    other, weights = tmp_path / "other.model", tmp_path / "model.safetensors"
    other.write_bytes(tiny_vocabulary.read_bytes() + b"\xf8\x3f\x01")
    for companions in ((), (weights,), (tiny_vocabulary,), (other, tiny_vocabulary)):
        run_config.check_vocabulary(manifest, llama, companions)
    assert error_of(run_config.check_vocabulary, manifest, llama, (weights, other)) == (
        f"the records were prepared with another vocabulary than the checkpoint's; set data.vocabulary={other}"
    )


def test_a_mixture_stands_where_records_do(tiny_run, tiny_records, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path))
    folder = str(tiny_records("causal_lm"))
    config = tiny_run("llama", {"records": None, "mixture": {"parts": {folder: 2}}})
    manifest = read_manifest(config.prepared_records())
    assert manifest.parts == {folder: 1.0}
    run_config.check_task(manifest, config.model.architecture())
    found = error_of(run_config.parse, tiny_config("llama", {"mixture": {"parts": {folder: 2}}}))
    assert found.startswith("mixture or records: set at most one of them")
    found = error_of(run_config.parse, tiny_config("llama", {"mixture": {"parts": {}, "temprature": 2}}))
    assert (
        found
        == "config.mixture: unknown 'temprature'; expected one of parts, temperature, maximum; nearest: temperature"
    )
