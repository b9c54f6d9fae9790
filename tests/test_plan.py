"""`python -m gqa.plan`: a whole plan on eight forced devices, an estimate, and what is refused."""

import json
import os
import sys

import pytest

from gqa import command_line, plan
from gqa.errors import InputError
from gqa.planning import decode, report
from gqa.planning.chips import parse_topology

MESH = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
DECODING = dict(
    size="t5_1_1_mini",
    changes={},
    kv_heads=(4, 1),
    dtype="bfloat16",
    cache_dtype=None,
    batch_size_per_device=2,
    inputs_length=16,
    new_tokens=4,
    mesh=dict(data=1, fsdp=1, tensor=-1),
)


@pytest.fixture(scope="module")
def plan_of_eight(config_file, run_python, tmp_path_factory):
    """The plan of a tiny T5 on eight devices as JSON, and its table."""
    output = tmp_path_factory.mktemp("plan") / "plan.json"
    config = config_file("t5", MESH)
    process = run_python("-m", "gqa.plan", f"--config={config}", "--topology=cpu:8", f"--output={output}")
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text()), process.stdout


def test_memory_by_part_adds_up(plan_of_eight):
    found, table = plan_of_eight
    memory = found["memory"]
    assert sum(memory["parts"].values()) == memory["total"]
    assert memory["parts"]["gradients"] == memory["parts"]["parameters"]
    # float32 cut at least by two everywhere but at norms and the relative bias, and by four where both axes cut.
    assert found["parameters"] <= memory["parts"]["parameters"] < 1.2 * found["parameters"]
    assert memory["parts"]["optimizer"] < 1.2 * memory["parts"]["parameters"]
    assert "cpu:8: 8 devices as data=2 x fsdp=2 x tensor=2" in table


def test_work_is_the_models(plan_of_eight):
    found, _ = plan_of_eight
    work = found["work"]
    assert work["model_flops_per_step"] == 8 * work["model_flops_per_device"]
    # Nothing is computed again without remat; the gradient of the bias is a small product of its own.
    assert work["executed_flops_per_device"] == pytest.approx(work["model_flops_per_device"], rel=0.02)


def test_collectives_of_a_cut_model(plan_of_eight):
    found, _ = plan_of_eight
    kinds = {(each["kind"], each["group"]) for each in found["collectives"]}
    assert ("all-gather", 2) in kinds  # parameters over fsdp
    assert ("all-reduce", 2) in kinds  # activations over tensor
    assert all(each["sent"] > 0 for each in found["collectives"])
    # Every layer of both sides, forward and backward: loops are counted in full.
    assert sum(each["count"] for each in found["collectives"] if each["kind"] == "all-reduce") > 2 * 2 * 4


def test_an_estimate_says_that_it_is_one(tiny_config):
    raw = tiny_config("llama", {"model.remat": "full"})
    found, text = plan.make_plan(raw, parse_topology("gpu:h100:2"), search=False, price=2.0)
    assert found["source"] == "estimated" and "**an analytic estimate**, nothing was compiled" in text
    assert found["memory"]["fits"] is True and 0 < found["mfu_without_overlap"] <= found["mfu"] < 1
    assert sum(found["memory"]["parts"].values()) == found["memory"]["total"]
    hours = found["seconds"]["step"] * 20 / 3600
    assert found["run"] == pytest.approx(
        {"steps": 20, "price": 2.0, "hours": hours, "chip_hours": 2 * hours, "usd": 4 * hours}
    )


def test_an_estimate_cuts_along_the_sequence(tiny_config):
    raw = tiny_config("llama", {"data.inputs_length": 64})
    by_data, by_sequence = (
        plan.make_plan(raw | {"mesh": mesh}, parse_topology("gpu:h100:8"), search=False, price=None)[0]
        for mesh in (raw["mesh"] | {"data": 8}, raw["mesh"] | {"data": 1, "sequence": 8})
    )
    assert by_data["work"] == by_sequence["work"]
    # But that each device holds all keys and values: 2 layers, 8 rows of 64, K=2, d=4, float32.
    ones = 2 * 64 * 2 * 2 * 4 * 4
    found = [each["memory"]["parts"]["activations"] for each in (by_data, by_sequence)]
    assert found[1] - found[0] == pytest.approx(1.1 * 7 * ones, abs=2)
    gathered = [each for each in by_sequence["collectives"] if each["kind"] == "all-gather"]
    assert gathered == [{"kind": "all-gather", "group": 8, "count": 4, "sent": 2 * 8 * ones * 7 // 8}]


def test_a_plan_that_does_not_fit_says_what_would(tiny_config):
    raw = tiny_config("llama", {"model.size": "llama_2_13b", "model.changes": {}, "mesh.data": 8})
    found, text = plan.make_plan(raw, parse_topology("gpu:h100:8"), search=False, price=None)
    assert found["memory"]["fits"] is False and "**total: does not fit**" in text
    assert found["would_fit"].startswith("--config.mesh.data=1 --config.mesh.fsdp=")
    assert "What would fit: --config.mesh.data=1" in text


def test_nothing_fits_on_too_few_chips(tiny_config):
    raw = tiny_config("llama", {"model.size": "llama_2_70b", "model.changes": {}})
    found, _ = plan.make_plan(raw, parse_topology("gpu:h100:2"), search=False, price=None)
    assert found["would_fit"] == ("nothing on gpu:h100:2, by estimate, with this batch: more chips, or a smaller model")


def test_a_base_in_4_bits_fits_one_device():
    config = command_line.load_config("configs/finetune_llama_2_70b_qlora.py", [])
    found, text = plan.make_plan(config.to_dict(), parse_topology("gpu:h100:1"), search=False, price=None)
    parts = found["memory"]["parts"]
    assert found["memory"]["fits"] is True and "| frozen base |" in text
    assert 0.5 < parts["frozen base"] / found["parameters"] < 0.55  # bytes a weight, embedding and logits included
    assert parts["parameters"] == pytest.approx(0.003 * 2 * found["parameters"], rel=0.1) == parts["optimizer"] / 2


def test_adapters_are_planned_as_they_are_trained(tiny_config):
    adapter = {"kernels": ("*",), "rank": 4, "alpha": 8.0, "dropout_rate": 0.0, "rank_stabilised": False}
    raw = tiny_config("llama", {"adapter": adapter | {"base": "nf4"}})
    found, _ = plan.make_plan(raw, parse_topology("cpu:1"), search=False, price=None)
    parts, work = found["memory"]["parts"], found["work"]
    assert found["source"] == "compiled" and parts["gradients"] <= parts["parameters"] < parts["frozen base"]
    # No gradient of frozen kernels; the adapters' own products are not the model's.
    assert work["model_flops_per_device"] < work["executed_flops_per_device"] < 1.5 * work["model_flops_per_device"]
    whole, _ = plan.make_plan(raw | {"adapter": None}, parse_topology("cpu:1"), search=False, price=None)
    assert work["model_flops_per_device"] < whole["work"]["model_flops_per_device"]


@pytest.mark.parametrize("search", [False, True])
def test_preferences_are_not_planned(search):
    config = command_line.load_config(
        "configs/posttraining/reward.py",
        ["--config.data.source=pairs.jsonl", "--config.model.checkpoint=assets/teacher_llama"],
    )
    with pytest.raises(InputError, match=r"^config\.reward: a plan covers training on text alone; expected None$"):
        plan.make_plan(config.to_dict(), parse_topology("cpu:1"), search=search, price=None)


def test_a_search_recommends_what_fits(tiny_config):
    raw = tiny_config("llama", {"model.size": "llama_2_7b", "model.changes": {}, "data.inputs_length": 2048})
    raw |= {"train": raw["train"] | {"batch_size": 64}}
    found, text = plan.make_plan(raw, parse_topology("gpu:h100:8"), search=True, price=None)
    assert found["memory"]["fits"] is True
    mesh = found["mesh"]
    assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == 8
    best = min(each["seconds"]["without_overlap"] for each in found["candidates"])
    assert found["seconds"]["without_overlap"] == best
    assert f"Recommended: --config.mesh.data={mesh['data']} --config.mesh.fsdp={mesh['fsdp']}" in text


def test_decoding_smaller_caches_hold_more_rows():
    raw = DECODING | dict(size="t5_1_1_xxl", kv_heads=(64, 8, 1), inputs_length=2048, new_tokens=512)
    layers = dict(num_encoder_layers=1, num_decoder_layers=1)
    raw |= dict(changes=layers, batch_size_per_device=2304)
    found, text = plan.make_plan(raw, parse_topology("gpu:h100:2"), search=False, price=None)
    by_heads = {row["kv_heads"]: row for row in found["rows"]}
    # GQA §2.2: a key and a value of 64 in bfloat16 for each head, layer and position, 2048 across and 512 of its own;
    # two devices hold half of the heads each, and of MQA's one head both hold all.
    for K, cut in ((64, 2), (8, 2), (1, 1)):
        row = by_heads[K]
        assert row["memory"]["parts"]["cache"] == row["batch"] * 2 * K * 64 * 2 * (2048 + 512) // cut
    assert not by_heads[64]["fits_wanted"] and by_heads[64]["batch"] < 2 * 2304
    assert by_heads[8]["fits_wanted"] and by_heads[1]["fits_wanted"]
    assert by_heads[64]["batch"] < by_heads[8]["largest_batch"] < by_heads[1]["largest_batch"]
    assert f"the largest batch that fits is {by_heads[64]['batch']}" in text
    times = [by_heads[K]["seconds"]["sample_chip"] for K in (64, 8, 1)]
    assert times == sorted(times, reverse=True)


def test_a_search_keeps_to_the_heads_that_fit():
    raw = DECODING | dict(size="t5_1_1_xxl", kv_heads=(64, 1), inputs_length=8_000_000, batch_size_per_device=1)
    raw |= dict(changes=dict(num_encoder_layers=1, num_decoder_layers=1))
    found, text = plan.make_plan(raw, parse_topology("gpu:h100:1"), search=True, price=None)
    assert [row["batch"] for row in found["rows"]] == [0, 1] and len(found["candidates"]) == 1
    assert "Recommended: --config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.tensor=1" in text


def test_decoding_on_cpus_has_no_limit():
    raw = DECODING | dict(changes=dict(num_encoder_layers=1, num_decoder_layers=1), kv_heads=(1,))
    found, text = plan.make_plan(raw, parse_topology("cpu:1"), search=False, price=None)
    assert found["source"] == "compiled" and found["rows"][0]["fits_wanted"] is None
    assert "| 1 | limit not known |  | 2 |" in text
    # An estimate has the FLOPs that the loop was traced with.
    (estimated,) = decode.plan(decode.DecodeConfig.of(raw), parse_topology("cpu:1"), None, estimate=True)["rows"]
    flops, read = (estimated["work"][name] for name in ("flops_per_device_and_step", "bytes_per_device_and_step"))
    assert flops == pytest.approx(found["rows"][0]["work"]["flops_per_device_and_step"], rel=0.01)
    # Compiled, a step also writes; what is copied before and after the loop is none of it.
    assert found["rows"][0]["work"]["bytes_per_device_and_step"] > read
    assert found["rows"][0]["work"]["bytes_per_device_around_the_steps"] > 0
    # It reads neither the encoder nor what looks tokens up.
    parts = estimated["memory"]["parts"]
    assert parts["cache"] < read < parts["cache"] + 0.6 * parts["parameters"]


@pytest.fixture
def error_of(config_file, monkeypatch, capsys):
    """A function (overrides of a T5's config, arguments) -> the error line."""

    for name in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL"):  # what `main` sets is undone
        monkeypatch.setenv(name, {"JAX_PLATFORMS": "cpu"}.get(name, "3"))

    def call(overrides, *arguments):
        monkeypatch.setattr(sys, "argv", ["plan.py", f"--config={config_file('t5', overrides)}", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line.run(plan.main)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return call


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({}, ["--topology=v4:5x5x5"], "--topology=v4:5x5x5: v4 has no slice 5x5x5; nearest: v4:4x4x8 (128 chips)"),
        ({}, ["--topology=gpu", "--price=-1"], "--price=-1.0; expected USD per chip-hour, at least 0"),
        ({}, ["--topology=gpu", "--price=nan"], "--price=nan; expected USD per chip-hour, at least 0"),
        (
            {},
            ["--topology=gpu:h100:8", "--quick"],
            "--quick is for what libtpu compiles; found --topology=gpu:h100:8, expected one of a TPU",
        ),
        ({}, ["--topology=gpu", "--output=tests"], "--output=tests is a folder; nearest: tests/plan.json"),
        ({}, ["--topology=gpu", "--output=no/plan.json"], "--output=no/plan.json: there is no folder no"),
        (
            {"mesh.fsdp": 3},
            ["--topology=gpu:h100:8"],
            "mesh data=-1 x fsdp=3 x tensor=1 does not fit 8 device(s): 3 does not divide it; nearest: 2",
        ),
        (
            {"train.batch_size": 12},
            ["--topology=gpu:h100:8"],
            "train.batch_size=12 in 1 micro-batch(es) is not divisible by data*fsdp=8 devices; nearest: 16",
        ),
        (
            {"train.batch_size": 7},
            ["--topology=gpu:h100:32", "--search"],
            "--search: train.batch_size=7 is divisible by no mesh of gpu:h100:32; nearest: 8",
        ),
        (
            {"mesh.tensor": 16},
            ["--topology=gpu:h100:16"],
            "mesh.tensor=16 does not divide num_heads=8; nearest: 8",
        ),
        (
            {"data.task": "causal_lm"},
            ["--topology=gpu"],
            "data.task='causal_lm' is not for a t5 model; expected one of span_corruption, prefix_lm",
        ),
    ],
)
def test_bad_input_takes_one_line(error_of, overrides, arguments, message):
    assert error_of(overrides, *arguments) == message


def test_quick_asks_the_compiler_for_less_effort(config_file, monkeypatch, capsys, tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_OPTIMIZATION_LEVEL": ""}
    for name, value in environment.items():  # what `main` sets is undone
        monkeypatch.setenv(name, value)
    levels = []

    def make_plan(*_, **__):
        levels.append(os.environ["JAX_OPTIMIZATION_LEVEL"])
        return {}, "a plan"

    monkeypatch.setattr(plan, "make_plan", make_plan)
    for arguments, level, lines in ((["--quick"], "O1", ["a plan", report.QUICK]), ([], "", ["a plan"])):
        monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "")
        output = tmp_path / "plan.json"
        arguments = [f"--config={config_file('t5', {})}", "--topology=v5e:2x4", f"--output={output}", *arguments]
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        plan.main()
        assert levels[-1] == level and capsys.readouterr().out.splitlines() == lines
        assert json.loads(output.read_text())["planning"]["quick"] == (level == "O1")


def test_without_libtpu_one_line_says_how_to_get_it(error_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = error_of({}, "--topology=v5e:2x4")
    assert line.startswith("--topology=v5e:2x4 needs TPU's compiler, libtpu; install it with pip install 'jax[tpu]'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": (3,)}, "decoder_self_kv_heads=3 does not divide num_heads=4; nearest: 2, 4"),
        ({"batch": 3}, "config.batch is unknown in a decoding config"),
        ({"new_tokens": 0}, "config.new_tokens=0; expected at least 1"),
        ({"dtype": "bf16"}, "config.dtype: unknown 'bf16'; expected one of float32, bfloat16; nearest: bfloat16"),
        ({"cache_dtype": "int4"}, "cache type 'int4' is unknown; expected int8, or none for the model's own"),
        (
            {"mesh": dict(data=8, fsdp=1, tensor=1)},
            "mesh data=8 x fsdp=1 x tensor=1 needs 8 device(s), found 2; nearest: data=2 x fsdp=1 x tensor=1",
        ),
    ],
)
def test_bad_decoding_configs(changes, message):
    with pytest.raises(plan.InputError) as caught:
        plan.make_plan(DECODING | changes, parse_topology("gpu:h100:2"), search=False, price=None)
    assert str(caught.value).startswith(message)
