"""`python -m gqa.evaluate`: answers, scores and tables of several checkpoints, and bad input."""

import json
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from gqa import checkpoints, command_line, evaluate, models
from gqa.checkpoints import hf, hf_config, training_run
from gqa.checkpoints.store import Store
from gqa.data.vocabulary import Vocabulary
from gqa.decode import batches
from gqa.evaluation import text_metrics
from gqa.evaluation.checkpoint_text import TextModel
from gqa.evaluation.generation import read_rows

ROWS = [
    {"inputs": "def f(x)", "targets": "return x", "id": 7},
    {"inputs": "x", "targets": "y"},
    {"inputs": "return y * z + 1 and more than is read", "answers": ["z", "return z"]},
]
OTHER = [{"inputs": "abc", "targets": "a b c"}, {"inputs": "z", "targets": "y"}]
LENGTH = 16


class State(NamedTuple):
    """As training's: the model beside what is none of it."""

    step: jax.Array
    model: Any


@pytest.fixture(scope="module")
def seeds(tiny_vocabulary, tmp_path_factory):
    """Two random T5 and a Llama."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, size, seed in (("seed_0", "t5_1_1_mini", 0), ("seed_1", "t5_1_1_mini", 1), ("llama", "llama_mini", 0)):
        network = models.create(models.size(size), jax.random.key(seed))
        hf.save(network, folder / name, dtype="float32", extra_files=[tiny_vocabulary])
    return folder


@pytest.fixture
def files(tmp_path):
    """The two task files."""
    for name, rows in (("dev", ROWS), ("arxiv", OTHER)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "dev.jsonl", tmp_path / "arxiv.jsonl"]


@pytest.fixture
def call(monkeypatch, capsys):
    """A function (arguments) -> exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.run(evaluate.main)
        return exit.value.code, *capsys.readouterr()

    return run


def answers(folder, rows):
    """What the library decodes, greedily, from inputs cut to `LENGTH` tokens, the last of them EOS."""
    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    vocabulary = Vocabulary(folder / "characters.model")
    prompts = {i: [*vocabulary.encode(row["inputs"])[: LENGTH - 1], 1] for i, row in enumerate(rows)}
    settings = batches.Settings(6, (1,), None, 0, num_beams=1, length_penalty=1.0, batch_size=2)
    found = dict(batches.generate_all(checkpoints.load(folder, **choices), prompts, settings))
    return [vocabulary.decode([token for token in found[i] if token < vocabulary.size]) for i in prompts]


def test_scores_of_two_seeds_on_two_tasks(seeds, files, call, tmp_path, monkeypatch):
    output = tmp_path / "scores"
    arguments = [f"--checkpoint={seeds / name}" for name in ("seed_0", "seed_1")]
    arguments += [*(f"--task_file={file}" for file in files), "--metrics=trivia_qa,rouge", f"--output={output}"]
    arguments += ["--max_new_tokens=6", f"--inputs_length={LENGTH}", "--batch_size=2", "--bootstrap=50"]
    code, out, _ = call(*arguments)
    assert code == 0
    # 9, 2 and 16 tokens in two batches of two rows of 16.
    assert f"seed_0 dev: 3 rows, {1 - 27 / 64:.1%} of what was read is padding" in out
    written = json.loads((output / "scores.json").read_text())
    values = {}
    for name in ("seed_0", "seed_1"):
        values[name] = {}
        for task, rows in (("arxiv", OTHER), ("dev", ROWS)):
            expected = answers(seeds / name, rows)
            lines = (output / name / task / "predictions.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [
                row | {"prediction": text} for row, text in zip(rows, expected, strict=True)
            ]
            targets = [row.get("answers") or row["targets"] for row in rows]
            found = written["checkpoints"][name]["scores"][task]
            for metric in ("trivia_qa", "rouge"):
                scores = text_metrics.evaluate(metric, targets, expected, samples=50, seed=0)
                for score, interval in scores.items():
                    assert found[score] == pytest.approx(interval._asdict())
            values[name][task] = found["f1"]["value"]
    averages = {name: sum(row.values()) / 2 for name, row in values.items()}
    assert written["average"] == pytest.approx(averages)
    assert written["mean"]["avg"]["mean"] == pytest.approx(sum(averages.values()) / 2)
    table = (output / "table.md").read_text()
    assert out.endswith(f"\n{table}")
    row = [averages["seed_1"], values["seed_1"]["arxiv"], values["seed_1"]["dev"]]
    assert table.splitlines()[0] == "| model | avg | arxiv f1 | dev f1 |"
    assert table.splitlines()[3] == f"| seed_1 | {' | '.join(f'{value:.1f}' for value in row)} |"

    # Killed in the middle of a result: the rest of that task is decoded, and nothing else.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    journal = output / "seed_1" / "dev" / ".predictions.journal"
    journal.write_bytes(b"".join(before[journal].splitlines(keepends=True)[:2]) + b"[2, [1")
    asked = []
    generate_all = batches.generate_all
    monkeypatch.setattr(
        batches,
        "generate_all",
        lambda model, prompts, settings: asked.append(len(prompts)) or generate_all(model, prompts, settings),
    )
    assert call(*arguments)[0] == 0
    assert asked == [2]
    for path, content in before.items():
        assert path == journal or path.read_bytes() == content
    code, _, err = call(*arguments, "--beam=2")
    assert code == 2 and "holds a run with another settings; delete it or name another --output" in err


def test_beams_and_decoders(seeds, call, tmp_path):
    (tmp_path / "arxiv.jsonl").write_text(json.dumps(OTHER[0]) + "\n")
    common = [f"--task_file={tmp_path / 'arxiv.jsonl'}", "--max_new_tokens=6"]
    assert call(f"--checkpoint={seeds / 'seed_0'}", *common, "--beam=3", f"--output={tmp_path / 'beams'}")[0] == 0
    [row] = read_rows(tmp_path / "beams" / "seed_0" / "arxiv" / "predictions.jsonl")
    model = TextModel(seeds / "seed_0")
    settings = batches.Settings(6, (1,), None, 0, num_beams=3, length_penalty=1.0, batch_size=1)
    [(_, new)] = batches.generate_all(model.model, {0: model.text.tokens("abc")}, settings)
    assert row["prediction"] == model.text.decode(new)
    assert call(f"--checkpoint={seeds / 'llama'}", *common, f"--output={tmp_path / 'greedy'}")[0] == 0
    [row] = read_rows(tmp_path / "greedy" / "llama" / "arxiv" / "predictions.jsonl")
    model = TextModel(seeds / "llama")
    prompt = model.text.tokens("abc")
    settings = batches.Settings(6, (1,), None, 0, num_beams=1, length_penalty=1.0, batch_size=1)
    [(_, new)] = batches.generate_all(model.model, {0: prompt}, settings)
    assert model.text.decode([*prompt, *new]) == "abc" + row["prediction"]


@pytest.fixture
def run(tiny_run, tiny_vocabulary, tmp_path):
    """The folder of a run that has kept the steps 9 and 10, and its models."""
    config = tiny_run("llama")
    architecture = config.model.architecture()
    workdir = tmp_path / "run"
    workdir.mkdir()
    networks = [models.create(architecture, jax.random.key(seed)) for seed in (0, 1)]
    with Store(workdir / "checkpoints", keep=9) as store:
        for step, network in zip((9, 10), networks, strict=True):
            store.save(step, State(jnp.int32(step), network))
    (workdir / training_run.ARCHITECTURE).write_text(json.dumps(hf_config.write(architecture, "float32", None)))
    (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(tiny_vocabulary)}}))
    return workdir


def test_every_checkpoint_of_a_run(run, config_file, files, call, tmp_path):
    losses = {}
    for step in (9, 10):
        single = [f"--checkpoint={run / 'checkpoints' / str(step)}", f"--config={config_file('llama')}"]
        assert call(*single, f"--output={tmp_path / 'one.json'}")[0] == 0
        losses[str(step)] = json.loads((tmp_path / "one.json").read_text())["loss"]
    every = [f"--checkpoint={run}", "--every_checkpoint"]
    code, out, _ = call(*every, f"--config={config_file('llama')}", f"--output={tmp_path / 'all.json'}")
    best = min(losses, key=losses.get)
    assert code == 0 and f"best: step {best}, loss {losses[best]:.4f}" in out
    written = json.loads((tmp_path / "all.json").read_text())
    assert {name: scores["loss"] for name, scores in written["checkpoints"].items()} == losses
    assert written["best"] == str(run / "checkpoints" / best)

    both = [f"--checkpoint={run / 'checkpoints' / step}" for step in losses]
    assert call(*both, f"--config={config_file('llama')}", f"--output={tmp_path / 'all.json'}")[0] == 0
    mean = json.loads((tmp_path / "all.json").read_text())["mean"]["loss"]
    assert mean["mean"] == pytest.approx(sum(losses.values()) / 2)
    assert mean["spread"] == pytest.approx(abs(losses["9"] - losses["10"]) / 2**0.5)

    # By its answers, of which step 10 has all but the first character right.
    row = OTHER[0]
    model = TextModel(run / "checkpoints" / "10")
    prompt = model.text.tokens(row["inputs"])
    settings = batches.Settings(6, model.text.eos_ids, None, 0, num_beams=1, length_penalty=1.0, batch_size=1)
    [(_, new)] = batches.generate_all(model.model, {0: prompt}, settings)
    dev = tmp_path / "dev.jsonl"
    dev.write_text(json.dumps({"inputs": row["inputs"], "targets": "a" + model.text.text(prompt, new)}))
    common = [f"--task_file={dev}", "--metrics=bleu", "--max_new_tokens=6", f"--output={tmp_path / 'scores'}"]
    code, out, _ = call(*every, *common)
    assert code == 0 and "best: step " in out
    written = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert list(written["checkpoints"]) == ["9", "10"]
    assert written["best"].endswith(max(written["average"], key=written["average"].get))


def test_the_perplexity_of_a_model_that_has_diverged():
    assert evaluate._perplexity(0.0) == 1 and evaluate._perplexity(800.0) == float("inf")


def test_bad_arguments(seeds, files, call, tmp_path, config_file):
    t5, llama = f"--checkpoint={seeds / 'seed_0'}", f"--checkpoint={seeds / 'llama'}"
    dev, arxiv = (f"--task_file={file}" for file in files)
    output = f"--output={tmp_path / 'new'}"
    modes = "expected one of --config, --task_file, --preferences, --dialogues, --harness; found"
    for arguments, message in (
        ([t5], f"{modes} none"),
        ([t5, dev, "--harness=x"], f"{modes} --task_file and --harness"),
        ([t5, dev, "--config.train.steps=2"], "--config.train.steps=2 changes a configuration; expected --config=FILE"),
        (
            [t5, f"--config={config_file('t5')}", f"--output={tmp_path}"],
            f"--output={tmp_path} is a folder; expected a file",
        ),
        ([t5, dev, "--metrics=bleu", "--cross_attention"], "--cross_attention does nothing with --task_file; expected"),
        ([t5, arxiv, output, "--weights=int4"], "--weights does nothing with --task_file; expected it with --config"),
        ([t5, "--harness=x", "--cache=int8"], "--cache does nothing with --harness; expected it with --config"),
        ([t5, "--harness=x", "--template=y"], "--template does nothing with --harness; expected it with --preferences"),
        ([t5, arxiv, output, "--length_penalty=2"], "--length_penalty=2.0 is of beam search; add --beam=4, say"),
        ([t5, dev, output], f"{files[0]} has no metric of its own; expected --metrics=rouge|bleu|trivia_qa"),
        ([t5, dev, output, "--metrics=rogue"], "metric 'rogue' is unknown; expected one of rouge, bleu, trivia_qa"),
        ([t5, arxiv], "--task_file writes predictions and scores; expected --output=DIR"),
        ([t5, arxiv, arxiv, output], "two task files are named arxiv; expected different names"),
        ([t5, t5, arxiv, output], f"checkpoint {seeds / 'seed_0'} is named twice; expected different ones"),
        ([t5, llama, arxiv, output, "--every_checkpoint"], "--every_checkpoint is of one run; found 2 --checkpoint"),
        ([t5, arxiv, output, "--every_checkpoint"], f"{seeds / 'seed_0'} has no folder checkpoints; expected a run's"),
        ([t5, arxiv, output, "--beam=0"], "num_beams=0 is below 1; expected 1 or more"),
        ([t5, arxiv, output, "--max_new_tokens=0"], "--max_new_tokens=0 is below 1; expected 1 or more"),
        ([t5, arxiv, output, "--inputs_length=1"], "--inputs_length=1 is below 2; expected 2 or more"),
        ([t5, arxiv, f"--output={files[0]}"], f"--output={files[0]} is a file; expected a folder"),
        ([t5, arxiv, f"--output={tmp_path / 'a' / 'b'}"], f"--output={tmp_path / 'a' / 'b'}: there is no folder"),
        ([t5, f"--task_file={tmp_path / 'arxiv'}", output], f"{tmp_path / 'arxiv'} is not a file; expected one with a"),
        ([t5, arxiv, output, "--max_newtokens=5"], "unknown option --max_newtokens; nearest: --max_new_tokens"),
        ([t5, "--harness=x", f"--include_path={tmp_path / 'no'}"], f"--include_path={tmp_path / 'no'} is no folder"),
        ([t5, "--harness=x", "--limit=0"], "--limit=0 is below 1; expected 1 or more"),
        ([t5, "--harness=x", "--num_fewshot=-1"], "--num_fewshot=-1 is below 0; expected 0 or more"),
    ):
        code, out, err = call(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {message}"), err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "no JSON: Expecting value at character 1"),
        (b'{"inputs": "\xff", "targets": "x"}', "byte 13 is no UTF-8"),
        (b"[1]", "expected a JSON object, found list"),
        (
            b'{"input": "x", "targets": "y"}',
            "no field 'inputs'; expected inputs and targets (or answers), nearest: input",
        ),
        (
            b'{"inputs": "x", "target": "y"}',
            "no field 'targets'; expected inputs and targets (or answers), nearest: target",
        ),
        (b'{"inputs": 3, "targets": "y"}', "inputs is int; expected text"),
        (b'{"inputs": "x", "targets": null}', "targets is NoneType; expected text"),
        (b'{"inputs": " ", "targets": "y"}', "inputs is empty; expected some text"),
        (b'{"inputs": "x", "answers": []}', "answers is no list of texts; expected at least one"),
        (b'{"inputs": "x", "answers": "y"}', "answers is no list of texts; expected at least one"),
        (b'{"inputs": "x", "answers": ["y", 3]}', "answers holds something that is no text"),
        (b"", "no JSON: Expecting value at character 1"),
        pytest.param(
            b'{"inputs": ' + b"1" * 5000 + b"}",
            "no JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use "
            "sys.set_int_max_str_digits() to increase the limit",
            id="digits",
        ),
    ],
)
def test_a_bad_line(line, message, seeds, call, tmp_path):
    path = tmp_path / "arxiv.jsonl"
    path.write_bytes(b'{"inputs": "x", "targets": "y"}\n' + line + b"\n")
    code, _, err = call(f"--checkpoint={seeds / 'seed_0'}", f"--task_file={path}", f"--output={tmp_path / 'new'}")
    assert (code, err) == (2, f"error: {path}:2: {message}\n")
    assert not (tmp_path / "new").exists()


def test_rows_that_the_model_cannot_read(seeds, call, tmp_path):
    path = tmp_path / "arxiv.jsonl"
    path.write_text(json.dumps(OTHER[0]) + "\n" + json.dumps({"inputs": "x" * 5000, "targets": "y"}) + "\n")
    code, _, err = call(f"--checkpoint={seeds / 'llama'}", f"--task_file={path}", f"--output={tmp_path / 'new'}")
    assert code == 2 and err.startswith(
        "error: row 2: a prompt of 5000 tokens and max_new_tokens=128 exceed the model's"
    )
