"""The post-training example: its commands are valid, and its report says what models, rewards and rule say."""

import json

import jax
import numpy as np
import pytest

from experiments import figures, pictures, posttraining, posttraining_report
from experiments.posttraining_data import INSTRUCTION, VOCABULARY
from experiments.posttraining_report import Responses, baselines, checks, matched, summary
from gqa import models
from gqa.checkpoints import hf, reward
from gqa.command_line import load_config
from gqa.data.vocabulary import Vocabulary
from gqa.models.reward import with_head


def test_commands_are_valid(tmp_path):
    chain = posttraining.stages(tmp_path)
    assert [stage.name for stage in chain] == [
        "data", "SFT", "reward model", "rejection sampling", "SFT on the best", "PPO", "DPO"
    ]  # fmt: skip
    made = {str(tmp_path / "data")}
    for stage in chain[1:]:
        path = next(each for each in stage.arguments if each.startswith("--config=")).removeprefix("--config=")
        overrides = [each for each in stage.arguments if each.startswith("--config.")]
        config = load_config(path, overrides)
        assert config.get("template", config.get("data", {}).get("template")) == "llama2"
        # What a stage reads, an earlier one has made.
        for value in (each.split("=")[1] for each in overrides):
            if value.startswith(str(tmp_path)):
                assert any(value.startswith(folder) for folder in made), value
        made |= {each.split("=")[1] for each in stage.arguments if each.startswith(("--workdir=", "--output="))}


def test_finished_stages_are_kept_and_failed_ones_stop_the_chain(tmp_path, capsys):
    stage = posttraining.Stage("data", "experiments.no_such_module", ["--x=1"], tmp_path / "product")
    with pytest.raises(posttraining.InputError, match="data ended with exit code 1"):
        posttraining.run(stage, tmp_path)
    assert not (tmp_path / "seconds.json").exists()
    stage.product.mkdir()
    posttraining.run(stage, tmp_path)
    assert capsys.readouterr().out.endswith("finished before: python -m experiments.no_such_module --x=1\n")


def test_rewards_at_matched_length():
    # Lengths 1-3 and 4-7 are a bin each; the base has three quarters of its responses in the first.
    base = np.array([1, 2, 3, 5])
    lengths = np.array([2] * 5 + [6] * 15 + [9] * 5)
    values = np.array([1.0] * 5 + [3.0] * 15 + [100.0] * 5)
    assert matched(values, lengths, base) == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert matched(values[1:], lengths[1:], base) == pytest.approx(3)  # four of the first bin are too few
    assert matched(values[:4], lengths[:4], base) is None


def test_summary_is_in_deviations_of_the_base():
    def responses(rewards, kl):
        shape = (2, 2)
        return Responses(
            *(np.full(shape, "text"), np.reshape(rewards, shape)), np.ones(shape), np.full(shape, 8), np.full(shape, kl)
        )

    base = responses([0.0, 2.0, 0.0, 2.0], 0.0)  # mean 1, deviation 2 / √3
    row = summary(responses([3.0, 3.0, 3.0, 3.0], 2.5), base)
    assert row["gain"] == pytest.approx(3**0.5)
    assert (row["reward"], row["deviation"], row["mentioned"], row["tokens"], row["kl"]) == (3.0, 0.0, 1.0, 8.0, 2.5)
    assert summary(responses([0.0, 2.0, 0.0, 2.0], np.nan), base)["kl"] is None


def test_baselines_find_what_gives_pairs_away():
    vocabulary = Vocabulary(VOCABULARY)
    pairs = [("Return the name.", "Read a"), ("Return it all.", "Set"), ("Return the file.", "Do")]
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    mirrored = rows + [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert baselines(rows, rows, vocabulary) == {"longer": 1.0, "token": 1.0}
    assert baselines(rows, mirrored, vocabulary) == {"longer": 0.5, "token": 0.5}
    assert baselines(rows, [{"chosen": "A b", "rejected": "C d"}], vocabulary) == {"longer": 0.5, "token": 0.5}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A finished chain of tiny models of random weights, DPO's those of SFT."""
    for name, value in dict(NUM_PROMPTS=3, SAMPLES=2, BEST_OF=4, ROWS=4, SHOWN=1, LEAST_OF_BIN=1).items():
        monkeypatch.setattr(posttraining_report, name, value)
    data = tmp_path / "data"
    data.mkdir()
    prompts = [f"{INSTRUCTION}def {name}_file(path):" for name in ("read", "write", "copy")]
    pair = {"prompt": prompts[0], "chosen": "Read the file.", "rejected": "Write a name.", "rating": "better"}
    mirrored = pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    files = {
        "preferences": [pair, mirrored],
        "preferences_heldout": [pair, mirrored],
        "prompts_heldout": [{"prompt": prompt, "response": "Work on the file at path."} for prompt in prompts],
    }
    for name, rows in files.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "data.json").write_text("{}")
    changes = dict(num_layers=1, d_model=16, d_ff=16, num_heads=2, head_dim=8, decoder_self_kv_heads=2)
    architecture = models.replace(models.size("llama_mini"), vocab_size=4096, **changes)
    files = dict(token_ids={"pad_token_id": 0, "eos_token_id": 1}, extra_files=[VOCABULARY])
    for seed, folders in enumerate([("sft", "dpo"), ("rejection",), ("ppo",)]):
        for folder in folders:
            made = models.create(architecture, jax.random.key(seed))
            hf.save(made, tmp_path / folder / "model", dtype="float32", **files)
    judge = with_head(models.create(architecture, jax.random.key(3)), jax.random.key(4))
    reward.save(judge, tmp_path / "reward" / "model", **files)
    return tmp_path


def test_everything_is_measured_of_the_models(workdir, tmp_path):
    found = posttraining_report.evaluate(workdir)
    rows = found["models"]
    assert list(rows) == ["own docstrings", "SFT", "best of 4", "SFT on the best", "PPO", "DPO"]
    assert (
        rows["SFT"]["gain"] == 0
        and rows["SFT"]["kl"] == 0
        and rows["SFT"]["gain_at_length"] == pytest.approx(0, abs=1e-5)
    )
    assert rows["DPO"]["kl"] == pytest.approx(0, abs=1e-5)  # it is the same model
    assert rows["PPO"]["kl"] > 0
    assert rows["best of 4"]["reward"] > rows["SFT"]["reward"]
    assert rows["best of 4"]["kl"] == pytest.approx(np.log(4) - 3 / 4)
    assert rows["own docstrings"]["mentioned"] == 2  # file and path
    # Of a pair and its mirror image, whoever has an opinion is right once; DPO's, which is SFT's, has none.
    assert found["preferences"] | {"dpo": 0.0} == {
        "pairs": 2,
        "reward": 0.5,
        "by_rating": {"better": 0.5},
        "sft": 0.5,
        "dpo": 0.0,
    }
    assert found["samples"][0]["prompt"] == "def read_file(path):"
    assert found["samples"][0]["responses"]["own docstrings"]["text"] == "Work on the file at path."
    json.dumps(found, allow_nan=False)


def report(ppo_gain, ppo_kl):
    row = dict(reward=1.5, deviation=0.5, gain_at_length=None, mentioned=2.0, mentioned_at_length=1.5, tokens=9.0)
    rows = {name: row | dict(gain=1.2, kl=3.0) for name in ("SFT", "best of 16", "SFT on the best")}
    return {
        "preferences": {"pairs": 790, "reward": 0.85, "by_rating": {"better": 0.9}, "sft": 0.6, "dpo": 0.75},
        "baselines": {"longer": 0.5, "token": 0.5},
        "models": {
            "own docstrings": row | dict(gain=0.1, kl=None),
            **rows,
            "PPO": row | dict(gain=ppo_gain, kl=ppo_kl),
        },
        "prompts": 160,
        "samples": [
            {"prompt": "def f(x):", "responses": {"SFT": {"text": "A `b`\nc", "reward": -0.5, "mentioned": 1}}},
        ],
        "seconds": {"SFT": 300.0, "PPO": 600.0},
        "machine": {"cores": 2, "cpu": "a processor"},
        "commit": "abc",
    }


@pytest.mark.parametrize(("gain", "kl", "met"), [(1.0, 10.0, True), (0.9, 2.0, False), (3.0, 10.1, False)])
def test_aims(gain, kl, met):
    found = {aim: met for aim, _, met in checks(report(gain, kl))}
    assert found["PPO: reward ≥ SFT's + 1 SD at KL ≤ 10 nats"] is met
    assert found["reward model, held-out accuracy ≥ 0.8"] and found["all within 20 minutes"]
    assert not found["DPO, held-out accuracy ≥ 0.8"]


def test_markdown():
    text = posttraining_report.as_markdown(report(2.0, 11.0))
    assert "| own docstrings | 1.50 ± 0.50 | +0.10 |  | 2.00 | 1.50 | 9.0 |  |" in text
    assert "| best of 16 | 1.50 ± 0.50 | +1.20 |  | 2.00 | 1.50 | 9.0 | ≤ 3.00 |" in text
    assert "| PPO: reward ≥ SFT's + 1 SD at KL ≤ 10 nats | +2.00 SD, 11.0 nats | **no** |" in text
    assert "Minutes: SFT 5.0, PPO 10.0, on 2 cores (a processor), commit abc." in text
    assert "- SFT: `A 'b' c` (-0.50, 1)" in text


def test_report_and_its_picture(tmp_path):
    for name, score in (("reward", "accuracy"), ("dpo", "accuracy"), ("ppo", "reward")):
        (tmp_path / name).mkdir()
        scores = [{"step": step, "split": "heldout", score: 0.5 + step, "kl": 2.0 * step} for step in range(3)]
        lines = [*scores, {"step": 3, "split": "train", score: 9.0, "kl": 9.0}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = [{"temperature": 1.0, "max": [0.0, 1.0], "median": [0.0, 0.0]}]
    (tmp_path / "rejection.json").write_text(json.dumps({"curves": drawn}))
    written = report(2.0, 11.0) | posttraining_report.curves(tmp_path)
    assert written["curves"]["PPO, KL from the SFT model"] == {"score": "kl", "steps": [0, 1, 2], "values": [0, 2, 4]}
    posttraining_report.write(written, tmp_path / "posttraining")
    again = json.loads((tmp_path / "posttraining" / "report.json").read_text())
    panels = pictures.posttraining(again).axes
    assert [list(panel.lines[0].get_ydata()) for panel in panels] == [*[[0.5, 1.5, 2.5]] * 3, [0, 2, 4], [0, 1]]
    picture = tmp_path / "posttraining" / "curves.png"
    before = picture.read_bytes()
    picture.unlink()
    assert list(figures.redraw([tmp_path / "posttraining" / "report.json"])) == [picture]
    assert picture.read_bytes() == before
