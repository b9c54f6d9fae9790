"""PPO and GRPO against a reward model that likes some tokens: they learn, go on after a kill, refuse bad input."""

import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from gqa import checkpoints, command_line
from gqa.errors import InputError
from gqa.posttraining import ppo
from gqa.posttraining.config import PPORunConfig
from gqa.training import config as run_config
from gqa.training import metrics

pytestmark = pytest.mark.usefixtures("compilation_cache")
STEPS = 8
RATE = {"optimizer.learning_rate": 6e-3, "value_optimizer.learning_rate": 6e-3, "optimizer.epsilon": 1e-8}
CHANGES = RATE | {
    "ppo.rollouts": 32,
    "ppo.minibatch": 16,
    "ppo.beta": 0.01,
    "train.steps": STEPS,
    "train.heldout": 20,
    "train.eval_every": 4,
    "train.save_every": 2,
}
GRPO = {"ppo.method": "grpo", "ppo.samples_per_prompt": 8}


@pytest.fixture(scope="module")
def start(sampling_config):
    """A function (workdir, changes) that runs to the end and returns the history without what is a matter of time."""

    def start(workdir, changes=()):
        config = sampling_config("ppo", {**CHANGES, **dict(changes)})
        ppo.run(run_config.parse(config, PPORunConfig), workdir)
        return history(workdir)

    return start


def history(workdir):
    return [{name: value for name, value in line.items() if name not in ppo.RATES} for line in metrics.read(workdir)]


@pytest.fixture(scope="module")
def finished():
    return {}


@pytest.fixture
def whole(start, finished, tmp_path_factory, compilation_cache):
    """A run that nothing disturbed, its folder and history; made once."""
    if not finished:
        workdir = tmp_path_factory.mktemp("runs") / "whole"
        finished["whole"] = workdir, start(workdir)
    return finished["whole"]


def of(lines, split):
    return [line for line in lines if line["split"] == split]


def test_the_reward_grows(whole, folders, liked):
    workdir, lines = whole
    train, heldout = of(lines, "train"), of(lines, "heldout")
    assert [line["step"] for line in heldout] == [0, 4, 8] and [line["step"] for line in train] == list(range(1, 9))
    assert heldout[0]["reward"] == pytest.approx(0, abs=1e-5) and heldout[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert heldout[-1]["reward"] > 1
    assert sum(line["reward"] for line in train[-3:]) > sum(line["reward"] for line in train[:3]) + 0.5
    assert 0 < heldout[-1]["kl"] < 15
    assert max(line["sampler_difference"] for line in train) < 1e-4
    assert train[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert train[-1]["kl"] > 1e-4
    assert train[0]["entropy"] > 4 and all(0 <= line["clipped"] < 1 for line in train)
    assert train[-1]["explained_variance"] > 0 > train[0]["explained_variance"], "the value model learns"
    every = metrics.read(workdir)
    assert all(0 < line["useful_share"] <= 1 for line in of(every, "train"))
    # The final model says what is liked.
    said = json.loads((workdir / "finished.json").read_text())
    assert said == {"step": STEPS, "stopped": STEPS, "best": min(heldout, key=lambda line: line["loss"])["step"]}
    assert (workdir / "model" / "characters.model").is_file()
    shares = [liked_share(folder, liked) for folder in (folders["policy"], workdir / "model")]
    assert shares[1] > shares[0] + 0.15


def liked_share(folder, ids):
    """How probable the liked tokens are after some prompt."""
    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    model = checkpoints.load(folder, **choices)
    logits = jax.jit(lambda model: model(np.arange(3, 13)[None]))(model)
    return float(jax.nn.softmax(logits[0, -1])[np.array(ids)].sum())


def test_an_interrupted_run_ends_the_same(whole, start, tmp_path, monkeypatch):
    """Cut at the metrics of iteration 2, which goes back to 0, and of 4, which goes back to 2."""
    workdir, lines = whole
    for number in (3, 4):
        write, calls = metrics.MetricsWriter.write, []

        def cut(self, *arguments, write=write, calls=calls, number=number):
            calls.append(arguments)
            if len(calls) == number:
                raise KeyboardInterrupt
            write(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(metrics.MetricsWriter, "write", cut)
            with pytest.raises(KeyboardInterrupt):
                start(tmp_path / "parts")
    assert start(tmp_path / "parts") == lines
    for name in ("model/model.safetensors", "finished.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (workdir / name).read_bytes()
    with pytest.raises(InputError, match="holds a finished run of 8 steps"):
        start(tmp_path / "parts")
    with pytest.raises(InputError, match=r"holds a run with ppo\.beta=0.01, this one has 0.1"):
        start(tmp_path / "parts", {"ppo.beta": 0.1})


def test_an_unfinished_run_is_a_checkpoint(whole, start, tmp_path, monkeypatch, liked):
    """Told to stop, it saves; its newest policy is read by whoever reads checkpoints, and it goes on."""
    _, lines = whole
    write = metrics.MetricsWriter.write

    def stop(self, step, split, values):
        write(self, step, split, values)
        if (step, split) == (3, "train"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.MetricsWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM at iteration 3: saved; the same command goes on from there"):
        start(tmp_path / "run")
    contents = checkpoints.read(
        tmp_path / "run", dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0
    )
    assert contents.config.vocab_size == 256 and [file.name for file in contents.companions] == ["characters.model"]
    assert liked_share(tmp_path / "run", liked) > 0
    assert start(tmp_path / "run") == lines


@pytest.mark.full
def test_killed(whole, sampling_config, tmp_path, run_python):
    """By SIGKILL as the metrics of iteration 4 are written."""
    workdir, lines = whole
    path = tmp_path / "config.py"
    raw = sampling_config("ppo", CHANGES).to_dict()
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({raw!r})\n")
    arguments = (__file__, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert run_python(*arguments, KILL_AT="6").returncode == -signal.SIGKILL
    process = run_python(*arguments)
    assert process.returncode == 0, process.stderr
    assert history(tmp_path / "run") == lines
    model = "model/model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (workdir / model).read_bytes()


def test_grpo_learns_without_a_value_model(start, tmp_path):
    lines = start(tmp_path / "run", GRPO)
    train, heldout = of(lines, "train"), of(lines, "heldout")
    assert heldout[-1]["reward"] > 0.5 and "value_loss" not in train[0]
    assert all(line["kl_loss"] > 0 for line in train)


def test_it_stops_early_and_keeps_the_best(start, tmp_path):
    """Steps far too large for the policy: what is kept is the initial one."""
    changes = {"optimizer.learning_rate": 1.0, "ppo.kl_limit": 1.0, "train.eval_every": 1, "train.patience": 3}
    lines = start(tmp_path / "run", changes)
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    losses = {line["step"]: line["loss"] for line in of(lines, "heldout")}
    best = min(losses, key=losses.get)
    assert finished == {"step": STEPS, "stopped": best + 3, "best": best} and best + 3 < STEPS
    train = of(lines, "train")
    assert train[1]["kl"] > 1 and train[2]["beta"] == pytest.approx(0.02), "above the limit, beta doubles"


def test_prompts_come_in_permutations():
    numbers = [ppo.prompt_numbers(5, 2, step, seed=1) for step in range(5)]
    flat = [number for row in numbers for number in row]
    assert sorted(flat[:5]) == sorted(flat[5:]) == [0, 1, 2, 3, 4] and flat[:5] != flat[5:]
    assert numbers == [ppo.prompt_numbers(5, 2, step, seed=1) for step in range(5)]


def test_beta_by_hand():
    assert ppo.next_beta(0.01, 11.0, least=0.01, limit=10.0) == 0.02
    assert ppo.next_beta(0.04, 8.0, least=0.01, limit=10.0) == 0.04
    assert ppo.next_beta(0.04, 6.0, least=0.01, limit=10.0) == 0.02
    assert ppo.next_beta(0.01, 1.0, least=0.01, limit=10.0) == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ppo.method": "reinforce"}, "ppo.method: unknown 'reinforce'; expected one of ppo, grpo"),
        ({"ppo.method": "grpo"}, "ppo.samples_per_prompt=1 with grpo; expected 2 or more"),
        ({"ppo.minibatch": 5}, "ppo.minibatch=5 does not divide ppo.rollouts=32; nearest: 4, 8"),
        ({"ppo.decay": 1.5}, r"ppo.decay=1.5; expected a number in \[0, 1\]"),
        ({"ppo.beta": -1.0}, "ppo.beta=-1.0; expected at least 0"),
        ({"ppo.beta": float("nan")}, "ppo.beta=nan; expected at least 0"),
        ({"ppo.kl_limit": float("nan")}, "ppo.kl_limit=nan; expected a number above 0"),
        ({"train.heldout": 30}, "train.heldout=30 of 40 prompts; expected at most half: 20"),
        ({"train.patience": 0}, "train.patience=0; expected 1 or more, or None"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
    ],
)
def test_runs_that_are_refused(start, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        start(tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_reward_model(start, folders, tmp_path):
    for name in ("reward", "safety"):
        with pytest.raises(InputError, match=f"{name} .* has no reward_head.safetensors; expected a reward model"):
            start(tmp_path / "run", {name: str(folders["policy"])})
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_own_prompts_alone(sampling_config, prompts_file, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(prompts_file, prompts)
    config = run_config.parse(sampling_config("ppo", {**CHANGES, "prompts": str(prompts)}), PPORunConfig)
    for _ in range(2):
        ppo.check_prompts(tmp_path, config)
    prompts.write_text('{"prompt": "another"}\n')
    with pytest.raises(InputError, match=r"holds a run with other prompts than .*prompts\.jsonl has now"):
        ppo.check_prompts(tmp_path, config)


def main() -> None:
    """`gqa.ppo` that kills itself at a write of metrics."""
    from gqa import ppo as command

    write, count = metrics.MetricsWriter.write, []

    def counted(self, *arguments):
        count.append(0)
        if str(len(count)) == os.environ.get("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *arguments)

    metrics.MetricsWriter.write = counted
    command_line.run(command.main)


if __name__ == "__main__":
    sys.exit(main())
