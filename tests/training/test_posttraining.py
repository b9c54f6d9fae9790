"""SFT, LoRA, DPO and reward models through the one loop, and what is refused."""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa import checkpoints, models, train
from gqa.adapters import lora
from gqa.checkpoints import peft, reward
from gqa.checkpoints.hf import save
from gqa.command_line import load_config
from gqa.data import loader
from gqa.data.examples import TRAINED, make_task
from gqa.data.packing import packed_row
from gqa.errors import InputError
from gqa.objectives.language_model import cross_entropy
from gqa.sharding import make_mesh
from gqa.training import config as run_config
from gqa.training import loop, metrics, preferences
from gqa.training.recipe import make_recipe

pytestmark = pytest.mark.usefixtures("compilation_cache")

RATINGS = ("negligibly better / unsure", "slightly better", "better", "significantly better")
ADAM = dict(
    name="adamw", schedule="constant", learning_rate=3e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0
)
DPO = dict(beta=0.1, loss="sigmoid", label_smoothing=0.0, length_normalised=False, reference="cached")
LORA = dict(kernels=("self_attention.*", "mlp.up"), rank=4, alpha=8.0, dropout_rate=0.1, rank_stabilised=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of 200 conversations and of 200 pairs, whose chosen response says yes."""
    folder = tmp_path_factory.mktemp("sources")
    words = [f"{first}{second}" for first in "abcdefghijklmnopqrst" for second in "uvwxyzabcd"]
    rows = [{"instruction": word, "output": f"{word} {word}"} for word in words]
    pairs = [
        {"prompt": word, "chosen": f"{word} yes", "rejected": f"{word} no", "rating": RATINGS[1 + number % 2]}
        for number, word in enumerate(words)
    ]
    for name, content in (("sft", rows), ("preferences", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture(scope="module")
def base(tiny_run, tmp_path_factory):
    """A saved model of random weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save(models.create(tiny_run("llama").model.architecture(), jax.random.key(7)), folder, dtype="float32")
    return folder


@pytest.fixture
def run(config_file, sources, base, tiny_vocabulary, monkeypatch, tmp_path_factory):
    """A function (workdir, task, overrides) that trains and returns the history; records are prepared once."""
    monkeypatch.setenv("GQA_CACHE", str(base.parent / "cache"))

    def overrides(task, changes):
        data = dict(source=str(sources / f"{task}.jsonl"), vocabulary=str(tiny_vocabulary), template="human_bot")
        return {
            "model.size": None,
            "model.changes": {},
            "model.checkpoint": str(base),
            "data": dict(task=task, inputs_length=96, targets_length=None, **data),
            "records": None,
            "optimizer": ADAM,
            "train.z_loss": 0.0,
            "train.steps": 30,
            "train.log_every": 30,
            "train.eval_every": 30,
            "train.save_every": 30,
            **changes,
        }

    def run(workdir, task, changes):
        config = config_file("llama", overrides(task, changes))
        monkeypatch.setattr(sys, "argv", ["train.py", f"--config={config}", f"--workdir={workdir}"])
        train.main()
        return [line for line in metrics.read(workdir) if line["split"] == "heldout"]

    run.overrides = overrides
    return run


def test_packed_conversations_do_not_see_each_other(tiny_run):
    """The loss of two conversations in a row is that of each in a row of its own."""
    model = models.create(tiny_run("llama").model.architecture(), jax.random.key(0))
    task = make_task("sft", 16, None, 200)
    chunks = [np.array([5, 6, 7 + TRAINED, 8 + TRAINED]), np.array([9, 10, 11 + TRAINED, 12, 13 + TRAINED])]
    rows = [packed_row(these, task, None) for these in (chunks, chunks[:1], chunks[1:])]

    @jax.jit
    def losses(batch):
        logits = models.apply(model, batch)
        each = jax.vmap(lambda *row: cross_entropy(*row, 0.0).loss_sum)
        return each(logits, batch["targets"], batch["loss_weights"])

    packed, first, second = losses({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    assert float(packed) == pytest.approx(float(first + second), rel=1e-6)
    assert rows[0]["loss_weights"].sum() == 4


def test_adapters_learn_and_the_base_stays(run, base, tmp_path, tiny_run):
    """SFT with LoRA: the final model is the base with the adapter that is exported; a resumed run is the whole one."""
    changes = {"adapter": LORA, "train.save_every": 15, "train.eval_every": 15}
    history = run(tmp_path / "whole", "sft", changes)
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"] - 0.3
    choices = tiny_run("llama").model.run_choices()
    before, after = checkpoints.load(base, **choices), checkpoints.load(tmp_path / "whole" / "model", **choices)
    changed = {
        jax.tree_util.keystr(path)
        for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if not np.array_equal(old, new)
    }
    kernels = [f".self_attention.{name}" for name in ("query", "key", "value", "out")] + [".mlp.up"]
    assert changed == {f".decoder[0]{kernel}.value" for kernel in kernels}
    adapter, said = peft.load(tmp_path / "whole" / "adapter", before.config)
    assert said == peft.Settings(4, 8.0, 0.1, False)
    config = lora.LoRAConfig(**LORA)
    merged = lora.merge(before, lora.from_layers(before, config, adapter), config)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), merged, after)
    # What a run saves is the adapter and its moments alone.
    with pytest.raises(InputError, match=r"trains adapter parameters; use .*model, which is there at its end"):
        checkpoints.read(tmp_path / "whole", **choices)
    run(tmp_path / "parts", "sft", changes | {"train.steps": 15})
    assert run(tmp_path / "parts", "sft", changes) == history
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.full
def test_qlora_learns_beside_a_base_in_few_bits(run, base, tmp_path, tiny_run, tiny_config, call):
    """The adapter is all that comes out; it goes on bit for bit, and merged it has the loss that the run measured."""
    changes = {"adapter": LORA | {"base": "nf4"}, "train.save_every": 15, "train.eval_every": 15}
    history = run(tmp_path / "whole", "sft", changes)
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"] - 0.3
    run(tmp_path / "parts", "sft", changes | {"train.steps": 15})
    assert run(tmp_path / "parts", "sft", changes) == history
    folders = [tmp_path / name / "adapter" for name in ("whole", "parts")]
    weights = [(folder / peft.WEIGHTS).read_bytes() for folder in folders]
    assert weights[0] == weights[1] and not (tmp_path / "whole" / "model").exists()
    choices = tiny_run("llama").model.run_choices()
    with pytest.raises(InputError, match=r"trains adapter parameters; merge .*/adapter with python -m checkpoints_t"):
        checkpoints.read(tmp_path / "whole", **choices)
    merged = tmp_path / "merged"
    assert call("merge", f"--checkpoint={base}", f"--adapter={folders[0]}", "--base=nf4", f"--output={merged}") == 0
    model, plain = (checkpoints.load(folder, **choices) for folder in (merged, base))
    np.testing.assert_array_equal(model.embedding[...], plain.embedding[...])
    config = run_config.parse(tiny_config("llama", run.overrides("sft", changes)))
    batches = loader.heldout_batches(config.prepared_records(), 8, 8)
    found = loop.heldout_metrics(model, batches, make_mesh(config.mesh))
    assert found["loss"] == pytest.approx(history[2]["loss"], abs=1e-5)


def test_dpo_starts_at_log_2_and_learns(run, tmp_path, base):
    history = run(tmp_path / "cached", "preferences", {"dpo": DPO})
    start, end = history
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["margin"] == pytest.approx(0, abs=1e-5) and start["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert end["loss"] < 0.6 and end["accuracy"] > 0.7
    assert end["margin"] == pytest.approx(end["chosen_reward"] - end["rejected_reward"], abs=1e-5)
    assert len(list((base.parent / "cache" / "records").glob("*/reference-*.npz"))) == 1
    # A reference that is asked at every step says the same.
    live = run(tmp_path / "live", "preferences", {"dpo": DPO | {"reference": "live"}})
    assert live[1]["loss"] == pytest.approx(end["loss"], rel=1e-4)


def test_a_cached_reference_is_for_one_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"dpo\.reference=cached is for one process; nearest: live"):
        preferences.Reference(preferences.DPOConfig(**DPO), None, None, 8, None)


def test_a_reward_model_learns_is_saved_and_loaded(run, tmp_path, tiny_config):
    changes = {"reward": dict(margins=(0.0, 0.1, 0.2, 0.3)), "train.steps": 40, "train.eval_every": 40}
    start, end = run(tmp_path / "run", "preferences", changes)
    assert end["loss"] < start["loss"] and end["accuracy"] > 0.7
    assert {name for name in end if name.startswith("accuracy_")} == {"accuracy_slightly_better", "accuracy_better"}
    # Loaded again, it scores the same.
    config = run_config.parse(tiny_config("llama", run.overrides("preferences", changes)))
    model = reward.load(tmp_path / "run" / "model", **config.model.run_choices())
    mesh, records = make_mesh(config.mesh), config.prepared_records()
    recipe = make_recipe(config, models.abstract(model.config), lambda: model.backbone, records, mesh)
    found = loop.heldout_metrics(model, loader.heldout_batches(records, 8, 8), mesh, recipe=recipe)
    assert {name: end[name] for name in found} == pytest.approx(found, rel=1e-6)
    with pytest.raises(InputError, match=r"has no reward_head\.safetensors; expected a reward model"):
        reward.load(config.model.checkpoint, **config.model.run_choices())


@pytest.mark.parametrize("name", ["sft", "sft_lora", "sft_qlora", "dpo", "reward"])
def test_configs_are_valid_and_ask_for_a_source(name):
    path = Path(__file__).parents[2] / "configs" / "posttraining" / f"{name}.py"
    config = run_config.parse(load_config(path, ["--config.data.source=rows.jsonl"]))
    assert config.data.source == "rows.jsonl" and config.data.template == "openbezoar"
    with pytest.raises(InputError, match=r"config\.data\.source has no value"):
        load_config(path)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("sft", {"dpo": DPO}, "data.task='sft' with objective \\['dpo'\\]; expected the task preferences"),
        ("preferences", {}, "objective none; expected dpo or reward to be set"),
        ("preferences", {"dpo": DPO | {"beta": 0.0}}, "dpo.beta=0.0; expected a number above 0"),
        ("preferences", {"dpo": DPO | {"loss": "hinge"}}, "dpo.loss='hinge'; expected one of sigmoid, ipo"),
        ("preferences", {"dpo": DPO | {"label_smoothing": 0.7}}, "label_smoothing=0.7 with loss sigmoid"),
        ("preferences", {"dpo": DPO, "train.z_loss": 1e-4}, "train.z_loss=0.0001 has no meaning on preferences"),
        ("preferences", {"dpo": DPO, "mixture": dict(parts={"preferences": 1.0})}, "mixture and dpo are both set"),
        ("preferences", {"reward": dict(margins=(1.0,))}, "reward.margins=\\(1.0,\\); expected 4 numbers"),
        ("preferences", {"dpo": DPO, "reward": dict(margins=(0.0,) * 4)}, "dpo and reward are set; expected one"),
        ("preferences", {"reward": dict(margins=(0.0,) * 4), "adapter": LORA}, "adapter and reward are both set"),
        (
            "sft",
            {"adapter": LORA, "model.size": "llama_mini", "model.checkpoint": None},
            "adapter goes on from a checkpoint; set model.checkpoint",
        ),
        ("sft", {"adapter": LORA | {"kernels": ("q_proj",)}}, "'q_proj' names no kernel"),
    ],
)
def test_runs_that_are_refused(run, tmp_path, task, changes, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", task, changes)
    assert not (tmp_path / "run").exists()
