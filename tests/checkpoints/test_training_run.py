"""A run's store as a checkpoint: the parameters of its newest complete step, and one line for what is not there."""

import dataclasses
import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import checkpoints, models
from gqa.checkpoints import hf_config, training_run
from gqa.checkpoints.store import Store
from gqa.errors import InputError

CHOICES = dict(param_dtype="float32", dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
CONFIGS = {
    "t5": models.replace(models.size("t5_1_1_mini"), decoder_self_kv_heads=(2, 1), cross_kv_heads=2, tied_logits=True),
    "t5, a table per layer": models.replace(models.size("t5_1_1_mini"), relative_bias_per_layer=True),
    "llama": models.replace(models.size("llama_mini"), qkv_bias=True, decoder_self_kv_heads=2),
}


class State(NamedTuple):
    """As training's: the model beside what is none of it."""

    step: jax.Array
    model: Any
    optimizer: dict


@pytest.fixture
def run(tmp_path, random_model):
    """A function (config, steps, dtype) -> the folder of a run; the model of step n is n times the random one."""

    def make(config, steps=(5,), dtype=jnp.float32):
        workdir = tmp_path / "run"
        workdir.mkdir()
        model = random_model(config)
        with Store(workdir / "checkpoints", keep=9) as store:
            for step in steps:
                scaled = jax.tree.map(lambda leaf, step=step: (step * leaf).astype(dtype), model)
                store.save(step, State(jnp.int32(step), scaled, {"model": jnp.ones(3)}))
        (workdir / training_run.ARCHITECTURE).write_text(json.dumps(hf_config.write(config, "float32", None)))
        return workdir, model

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter(name, run):
    workdir, model = run(CONFIGS[name], (1,))
    found = checkpoints.load(workdir, **CHOICES)
    assert found.config == CONFIGS[name]
    assert jax.tree.structure(found) == jax.tree.structure(model)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_newest_complete_step_or_the_one_that_is_named(run):
    workdir, model = run(CONFIGS["llama"], (2, 10, 3), jnp.bfloat16)
    (workdir / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "12").mkdir()  # a name without arrays
    for folder, step in (("", 10), ("checkpoints", 10), ("checkpoints/3", 3), ("checkpoints/2", 2)):
        contents = checkpoints.read(workdir / folder, **CHOICES)
        tensor, _ = contents.tensors["decoder.1.mlp.down"]
        expected = (step * model.decoder[0].mlp.down[1]).astype(jnp.bfloat16)
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor.read(), expected)
        assert checkpoints.format_of(workdir / folder) == "training run"
        assert all(file.is_relative_to(workdir / "checkpoints" / str(step)) for file in contents.weight_files)


def test_the_vocabulary_of_a_finished_run_and_of_an_unfinished_one(run, tmp_path):
    workdir, _ = run(CONFIGS["llama"])
    assert checkpoints.read(workdir, **CHOICES).companions == []
    vocabulary = tmp_path / "pieces.model"
    (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(vocabulary)}}))
    assert checkpoints.read(workdir, **CHOICES).companions == []  # it is gone
    (tmp_path / "model.safetensors").write_bytes(b"no vocabulary")
    (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(tmp_path / "model.safetensors")}}))
    assert checkpoints.read(workdir, **CHOICES).companions == []
    (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(vocabulary)}}))
    vocabulary.write_bytes(b"pieces")
    assert checkpoints.read(workdir / "checkpoints", **CHOICES).companions == [vocabulary]
    files = [tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"]
    for file in files:
        file.write_text("{}")
    (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(files[0])}}))
    assert checkpoints.read(workdir, **CHOICES).companions == files
    (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(tmp_path)}}))
    assert checkpoints.read(workdir, **CHOICES).companions == [vocabulary, *files]
    (workdir / "model").mkdir()
    (workdir / "model" / "other.model").write_bytes(b"pieces")
    assert checkpoints.read(workdir / "checkpoints", **CHOICES).companions == [workdir / "model" / "other.model"]


def test_what_is_not_there(run):
    workdir, _ = run(CONFIGS["llama"])
    steps = workdir / "checkpoints"

    def error() -> str:
        with pytest.raises(InputError) as caught:
            checkpoints.read(workdir, **CHOICES)
        return str(caught.value)

    architecture = workdir / "architecture.json"
    other = dataclasses.replace(CONFIGS["llama"], num_layers=3)
    architecture.write_text(json.dumps(hf_config.write(other, "float32", None)))
    expected = ", ".join(
        f".model.decoder[0].{name}[2]" for name in ("mlp.down.value", "mlp.gate.value", "mlp.up.value")
    )
    assert error() == f"{steps / '5'} lacks 12 tensor(s) for its sizes: {expected}, …"
    other = dataclasses.replace(CONFIGS["llama"], d_ff=97)
    architecture.write_text(json.dumps(hf_config.write(other, "float32", None)))
    assert "down.value[0]" in error() and "expected [97, 64] by the model's sizes" in error()
    architecture.unlink()
    lacks = f"{workdir} has no architecture.json, which a run writes when it starts"
    assert error() == f"{lacks}; start the run once more"
    (workdir / "model").mkdir()
    assert error() == f"{lacks}; use {workdir / 'model'}"
    shutil.rmtree(steps / "5")
    assert error() == f"{steps} holds no complete step yet; wait for the run's first checkpoint"


def test_a_damaged_array_is_one_line(run):
    workdir, _ = run(CONFIGS["llama"])
    for file in (workdir / "checkpoints" / "5" / "default").rglob("d/*"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2 :] = b"\0" * (len(raw) - len(raw) // 2)
        file.write_bytes(raw)
    with pytest.raises(InputError, match=r"is damaged: its sha256|cannot be read"):
        checkpoints.load(workdir, **CHOICES)


def test_flipped_bits_are_found(run):
    workdir, _ = run(CONFIGS["llama"], (5, 6, 7))
    rng = np.random.default_rng(0)
    for step, other in (("7", "6"), ("6", "7")):
        file = max((workdir / "checkpoints" / step / "default").rglob("d/*"), key=lambda file: file.stat().st_size)
        raw = bytearray(file.read_bytes())
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        file.write_bytes(raw)
        with pytest.raises(InputError) as error:
            checkpoints.load(workdir / "checkpoints" / step, **CHOICES)
        line = str(error.value)
        assert line.startswith(f"{file} is damaged: its sha256 is ")
        assert line.endswith(f"; expected a whole step, such as {workdir / 'checkpoints' / other}")
    checkpoints.load(workdir / "checkpoints" / "5", **CHOICES)
