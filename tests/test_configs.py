"""Every file under configs/ is what its command can run; architectures are built of shapes, without an array."""

import dataclasses
import re
import typing
from functools import lru_cache
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments.sweep import Sweep
from gqa import models
from gqa.command_line import load_config
from gqa.errors import InputError
from gqa.planning.decode import DecodeConfig
from gqa.planning.programs import batch_shapes
from gqa.posttraining.config import PPORunConfig
from gqa.training import config as run_config

ROOT = Path(__file__).parent.parent
PAPER = sorted((ROOT / "configs" / "paper").glob("*.py"))
TIMING = sorted((ROOT / "configs" / "timing").glob("*.py"))


def error_of(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


@lru_cache
def num_parameters(architecture: models.ModelConfig) -> int:
    return models.num_parameters(models.abstract(architecture))


def test_every_folder_is_known():
    """The configs beside these folders, and posttraining's, are tested in tests/training, cleaning's in tests/data."""
    folders = {path.parent.name for path in (ROOT / "configs").rglob("*.py")}
    assert folders == {
        "cleaning",
        "configs",
        "paper",
        "plan",
        "posttraining",
        "recall",
        "sweeps",
        "throughput",
        "timing",
    }


# Billions of parameters: T5.1.1's public sizes less the keys and values of 48 sites of the decoder.
BILLIONS = {"large_mha": 0.783, "large_gqa8": 0.733, "large_mqa": 0.689}
BILLIONS |= {"xxl_mha": 11.135, "xxl_gqa8": 9.726, "xxl_mqa": 9.550}
HEADS = {"large_mha": 16, "xxl_mha": 64}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_full_size_runs(path):
    config = run_config.parse(load_config(path))
    config.check_devices(64)  # a v4:4x4x4 slice
    assert not re.search(r"[A-Z]+_[A-Z]+", path.read_text())  # nothing is left to be filled in
    kind, model = path.stem.split("_", 1)
    size, name = model.split("_")
    architecture = config.model.architecture()
    K = HEADS.get(model, {"gqa8": 8, "mqa": 1}.get(name))
    assert set(architecture.kv_heads("decoder_self") + architecture.kv_heads("cross")) == {K}
    assert set(architecture.kv_heads("encoder_self")) == {architecture.num_heads}
    assert num_parameters(architecture) / 1e9 == pytest.approx(BILLIONS[model], abs=6e-4)
    assert config.data.vocabulary == f"t5_1_1_{size}/spiece.model"
    if kind == "uptrain":  # GQA §2.1, §3.1
        assert (config.steps, config.train.batch_size, config.schedule_offset) == (50_000, 2048, 1_000_000)
        lengths = config.data.make_task(32_000)
        assert (lengths.inputs_length, lengths.targets_length, config.model.dropout_rate) == (512, 114, 0.0)
    else:
        assert (config.optimizer.learning_rate, config.train.batch_size, config.model.dropout_rate) == (1e-3, 128, 0.1)
        long = run_config.parse(load_config(path, ["--config.data.task=arxiv"]))
        planned = batch_shapes(long, architecture)  # of the task's own lengths
        assert (planned["inputs"].shape, planned["targets"].shape) == ((128, 2048), (128, 512))


def optional_keys(kind: type, config: ConfigDict) -> dict[str, tuple]:
    """Dotted keys that a file with the sections of `config` may leave out -> their types; mappings and sections not."""
    found = {}
    for field in dataclasses.fields(kind):
        types = typing.get_args(hint := typing.get_type_hints(kind)[field.name]) or (hint,)
        section = next((each for each in types if dataclasses.is_dataclass(each)), None)
        if section is not None and isinstance(config.get(field.name), ConfigDict):
            inner = optional_keys(section, config[field.name])
            found |= {f"{field.name}.{name}": value for name, value in inner.items()}
        elif field.default is not dataclasses.MISSING and {int, float, bool, str} & set(types):
            found[field.name] = types
    return found


RUNS = [*(ROOT / "configs").glob("*.py"), *PAPER, *(ROOT / "configs" / "recall").glob("*.py")]
RUNS += [ROOT / "configs" / "posttraining" / f"{name}.py" for name in ("sft", "sft_qlora", "dpo", "reward", "ppo")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_what_a_run_leaves_out_can_be_named(path):
    kind = PPORunConfig if path.stem == "ppo" else run_config.RunConfig
    required = ["--config.prompts=a"] if kind is PPORunConfig else ["--config.data.source=a"]
    values = {int: ("3", 3), float: ("0.5", 0.5), bool: ("true", True), str: ("a", "a")}
    keys = optional_keys(kind, load_config(path, required))
    assert {"mesh.slice", "mesh.sequence", "optimizer.clip_norm"} <= keys.keys()
    types = {key: next(each for each in values if each in options) for key, options in keys.items()}
    config = load_config(path, [*required, *(f"--config.{key}={values[types[key]][0]}" for key in keys)])
    for key in keys:
        section, name = key.split(".")
        assert config[section][name] == values[types[key]][1]
    wrong = error_of(load_config, path, ["--config.mesh.slcie=2"])
    assert wrong == "unknown key config.mesh.slcie; nearest: config.mesh.slice"


def test_what_is_left_out_has_its_default():
    path, overrides = ROOT / "configs" / "finetune_t5.py", ["--config.model.checkpoint=a", "--config.data.vocabulary=a"]
    default = run_config.parse(load_config(path, overrides))
    given = run_config.parse(load_config(path, [*overrides, "--config.mesh.slice=1", "--config.train.mirror=None"]))
    assert given == default
    found = error_of(load_config, path, ["--config.mesh.slice=x"])
    assert found == "config.mesh.slice=x has the wrong type; expected int such as 1"


def test_timed_models():
    for path in TIMING:
        config = load_config(path)
        assert len(config.weights) == len(config.cache)
        architecture = models.replace(models.size(config.size), **config.changes, dtype=config.dtype)
        sites = models.FAMILIES[models.family_of(architecture)].converted_sites
        for K in config.kv_heads:
            grouped = models.replace(architecture, **{f"{site}_kv_heads": K for site in sites})
            assert set(grouped.kv_heads(sites[0])) == {K}
        # Multi-head attention is among what is timed: all times are read against it.
        assert max(config.kv_heads) == architecture.num_heads


def test_models_of_throughput():
    for path in (ROOT / "configs" / "throughput").glob("*.py"):
        config = load_config(path)
        architecture = models.replace(models.size(config.size), **config.changes)
        assert max(config.kv_heads) == architecture.num_heads and min(config.kv_heads) == 1
        assert config.context + config.new_tokens <= architecture.max_position


def swept_teacher(name: str) -> models.ModelConfig:
    """The shipped one as its uptraining finds it; the smaller one as it is to be trained."""
    if name == "t5_small":
        return run_config.parse(load_config(ROOT / "configs" / "teacher_t5_small.py")).model.architecture()
    uptrain = ROOT / "configs" / "uptrain_t5_teacher.py"
    return run_config.parse(load_config(uptrain, ["--config.model.checkpoint=assets/teacher"])).model.architecture()


@pytest.mark.parametrize("name", ["t5", "t5_small"])
def test_the_timed_teachers_are_the_swept_ones(name):
    timed = load_config(ROOT / "configs" / "timing" / f"teacher_{name}.py")
    architecture = models.replace(models.size(timed.size), **timed.changes)
    swept = swept_teacher(name)
    for size in ("vocab_size", "d_model", "num_heads", "head_dim", "d_ff", "num_encoder_layers", "num_decoder_layers"):
        assert getattr(architecture, size) == getattr(swept, size)
    sweep = load_config(ROOT / "configs" / "sweeps" / "sizes.py")
    assert max(timed.kv_heads) == sweep.teachers[name].kv_heads == swept.num_heads


def test_the_smaller_teacher_is_half_as_wide():
    small, whole = swept_teacher("t5_small"), swept_teacher("t5")
    for size in ("d_model", "head_dim", "d_ff"):
        assert 2 * getattr(small, size) == getattr(whole, size)
    assert small.num_heads == whole.num_heads


SWEEPS = {
    "alpha": 69,
    "docstring": 15,
    "groups": 34,
    "long_docstring": 9,
    "methods": 44,
    "recall": 125,
    "scratch": 9,
    "sizes": 18,
}


@pytest.mark.parametrize(("name", "runs"), SWEEPS.items())
def test_sweeps_have_the_runs_that_they_say(name, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "configs" / "sweeps" / f"{name}.py"
    config = load_config(path)
    for teacher in {"recall": ["recall"], "sizes": ["t5_small"]}.get(name, ()):  # trained by the user
        config.teachers[teacher].checkpoint = "assets/teacher"
    assert len(Sweep(config, tmp_path).runs) == runs
    assert f"{runs} runs" in path.read_text()


def test_recall():
    teacher, uptrain = (
        run_config.parse(load_config(ROOT / "configs" / "recall" / f"{name}.py", overrides))
        for name, overrides in (("teacher", []), ("uptrain", ["--config.model.checkpoint=assets/teacher"]))
    )
    assert teacher.model.architecture().kv_heads("cross") == (8, 8)
    assert (uptrain.steps, uptrain.schedule_offset) == (50, teacher.steps)


def test_decoding_plans():
    for path in (ROOT / "configs" / "plan").glob("*.py"):
        config = DecodeConfig.of(load_config(path).to_dict())
        assert [config.architecture(K).kv_heads("cross")[0] for K in config.kv_heads] == list(config.kv_heads)
