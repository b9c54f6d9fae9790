"""A sweep survives its failures and a kill, and its table says what its runs are."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import sweep
from gqa import models
from gqa.checkpoints import hf
from gqa.command_line import load_config
from gqa.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep_file(tmp_path, random_model, config_file):
    """A sweep of the teacher, two good conversions and one that cannot be, whose heads do not divide the 8."""
    teacher = tmp_path / "teacher"
    heads = dict(num_heads=8, encoder_self_kv_heads=8, decoder_self_kv_heads=8, cross_kv_heads=8)
    config = dataclasses.replace(models.size("t5_1_1_mini"), d_model=32, head_dim=4, d_ff=64, **heads)
    hf.save(random_model(config), teacher, dtype="float32")
    changes = {"model.size": None, "model.changes": {}, "train.steps": None, "train.save_every": 2}
    uptrain = config_file("t5", changes | {"uptrain": dict(original_steps=10, alpha=1.0), "train.eval_every": 100})
    path = tmp_path / "sweep.py"
    teachers = dict(tiny=dict(checkpoint=str(teacher), uptrain=str(uptrain), kv_heads=8))
    runs = dict(method=("mean",), kv_heads=(8, 3, 2), alpha=(0.0, 1.0), seed=(1, 2))
    content = dict(teachers=teachers, runs=runs, calibration={}, overrides=(), finetune={}, keep_checkpoints=False)
    path.write_text(f"from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({content!r})\n")
    return path


@pytest.fixture
def finetuning(tmp_path):
    """Of a task in a sweep's config."""
    path = tmp_path / "finetune.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n"
        "get_config = lambda: ConfigDict(dict(data=dict(task='docstring', source=''), train=dict(steps=5)))\n"
    )
    return dict(
        config=str(path),
        overrides=("--config.train.steps=7", "--config.data.source=texts"),
        rows=9,
        inputs_length=256,
        max_new_tokens=64,
        metrics="rouge",
    )


@pytest.fixture
def called(monkeypatch):
    """The commands so far, which write what theirs would: module and options."""
    called = []

    def call(module, arguments, log, lock):
        options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        called.append((module, options))
        output = Path(options.get("output") or options["workdir"])
        if module == "gqa.train":
            output.mkdir(parents=True)
            (output / "finished.json").touch()
            lines = [dict(step=step, split="heldout", loss=loss) for step, loss in enumerate((4.0, 3.0, 3.5))]
            lines.append(dict(step=3, split="train", loss=9.0))
            (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        elif module == "checkpoints_tools.convert":
            output.mkdir()
        elif "task_file" in options:
            output.mkdir()
            scores = {"docstring": {"rouge1": {"value": 21.5, "low": 20.0, "high": 23.0}}}
            (output / "scores.json").write_text(json.dumps({"checkpoints": {"model": {"scores": scores}}}))
        elif module == "gqa.evaluate":
            output.write_text(json.dumps(dict(loss=2.0, accuracy=0.5, target_tokens=7)))
        else:
            output.touch()
        return 0

    monkeypatch.setattr(sweep, "_call", call)
    return called


@pytest.fixture
def start(sweep_file, tmp_path, monkeypatch, capsys):
    """Starts the sweep in the folder `runs`; gives its exit code and what it printed."""

    def start(*arguments, config=sweep_file):
        words = [f"--config={config}", f"--workdir={tmp_path / 'runs'}", *arguments]
        monkeypatch.setattr("sys.argv", ["sweep", *words])
        code = sweep.main()
        return code, capsys.readouterr().out

    return start


@pytest.mark.full
def test_killed_and_started_again(sweep_file, run_python, tmp_path):
    arguments = ("-m", "experiments.sweep", f"--config={sweep_file}")
    workdir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *arguments, f"--workdir={workdir}"], cwd=ROOT, env=os.environ)
    while not (workdir / "tiny-mean-k2-a1-s1" / "uptrained" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((workdir / "results.json").read_text())["waiting"] == 4
    moved = workdir.rename(tmp_path / "moved")  # it goes on wherever it is

    tables = []
    for folder in (moved, tmp_path / "undisturbed"):
        finished = run_python(*arguments, f"--workdir={folder}")
        assert finished.returncode == 1, finished.stderr
        assert "does not divide" in finished.stdout and "6 done, 3 failed, 0 waiting" in finished.stdout
        kept = {path.parent.name for path in folder.glob("*/metrics.jsonl")}
        assert kept == {f"tiny-{run}-a1-s{seed}" for run in ("none-k8", "mean-k2") for seed in (1, 2)}
        with (folder / "results.csv").open() as file:
            tables.append([row | {"seconds": None} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 6 and len({row["loss"] for row in tables[0]}) == 6


def test_lists_and_writes_an_array(sweep_file, run_python, tmp_path):
    arguments = ("-m", "experiments.sweep", f"--config={sweep_file}", f"--workdir={tmp_path / 'runs'}")
    listed = run_python(*arguments, "--list")
    assert listed.returncode == 0 and "0 done, 0 failed, 9 waiting" in listed.stdout
    assert not (tmp_path / "runs").exists()
    assert run_python(*arguments, "--array=4").returncode == 0
    script = (tmp_path / "runs" / "array.sh").read_text()
    assert "#SBATCH --array=0-3\n" in script and '--worker="$SLURM_ARRAY_TASK_ID/4"' in script
    assert subprocess.run(["bash", "-n", tmp_path / "runs" / "array.sh"]).returncode == 0
    refused = run_python(*arguments, "--worker=4/4")
    assert refused.returncode == 2 and "--worker=4/4; expected I/N" in refused.stderr


def test_takes_over_known_runs(sweep_file, run_python, tmp_path):
    runs = [("mean", 2, 1.25), ("none", 8, 1.0), ("first", 2, 3.0)]  # the last is none of the sweep's
    rows = [
        dict(teacher="tiny", method=method, kv_heads=kv_heads, alpha=1.0, seed=1, loss=loss, accuracy=0.5, seconds=1.0)
        | dict(target_tokens=99.0, commands=["python -m gqa.train"])
        for method, kv_heads, loss in runs
    ]
    known, workdir = tmp_path / "results.json", tmp_path / "runs"
    known.write_text(json.dumps({"runs": rows}))
    arguments = ("-m", "experiments.sweep", f"--config={sweep_file}", f"--workdir={workdir}", "--list")
    listed = run_python(*arguments, f"--known={known}")
    assert listed.returncode == 0 and "2 done, 0 failed, 7 waiting" in listed.stdout
    assert not workdir.exists()
    runs = sweep.Sweep(load_config(sweep_file), workdir)
    runs.claim()
    runs.know(runs.finished(known))
    assert runs.collect() == []
    assert json.loads((workdir / "results.json").read_text())["runs"] == [rows[1], rows[0]]
    for content, reason in (('{"runs": [{}]}', "is no results.json of a sweep"), ("{", "is not readable JSON")):
        known.write_text(content)
        refused = run_python(*arguments, f"--known={known}")
        assert refused.returncode == 2 and reason in refused.stderr and refused.stderr.count("\n") == 1


def test_processes_that_end_together_write_whole_tables(sweep_file, tmp_path):
    config = load_config(sweep_file)
    runs = sweep.Sweep(config, tmp_path).runs
    for run in runs:
        folder = tmp_path / run.name
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(run._asdict() | dict(loss=1.5, accuracy=0.5, target_tokens=7)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: sweep.Sweep(config, tmp_path).collect(), range(40))) == [[]] * 40
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == len(runs)
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(runs)
    assert sorted(path.name for path in tmp_path.glob("*results*")) == ["results.csv", "results.json"]


def test_fine_tunes_and_scores(sweep_file, tmp_path, called, finetuning):
    config = load_config(sweep_file)
    config.runs.update(kv_heads=(2,), alpha=(1.0,), seed=(3,))
    config.finetune = ConfigDict({"docstring": finetuning})
    workdir = tmp_path / "runs"
    workdir.mkdir()
    runs = sweep.Sweep(config, workdir)
    runs.do(runs.runs)
    assert runs.collect() == []
    modules = ["checkpoints_tools.convert", "gqa.train", "gqa.evaluate", "gqa.train", "gqa.data.tasks", "gqa.evaluate"]
    assert [module for module, _ in called] == modules
    folder = workdir / "tiny-mean-k2-a1-s3"
    tuning, rows, scoring = (options for _, options in called[3:])
    assert (
        tuning["config.model.checkpoint"] == str(folder / "uptrained" / "model") and tuning["config.train.seed"] == "3"
    )
    assert tuning["config.train.steps"] == "7"
    assert rows == dict(task="docstring", source="texts", limit="9", output=str(folder / "docstring.jsonl"))
    assert scoring["checkpoint"] == str(folder / "docstring" / "model") and scoring["task_file"] == rows["output"]
    with (workdir / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["docstring rouge1"], row["loss"], row["target_tokens"]) == ("21.5", "2.0", "7")
    assert row["docstring loss"] == "3.5"  # the last of the fine-tuning
    assert not (folder / "docstring").exists() and (folder / "docstring-scores").exists()


@pytest.mark.parametrize("config", ["teacher_t5.py", "teacher_llama.py"])
def test_from_scratch_at_equal_parameters(config, tmp_path):
    pretrain = ROOT / "configs" / config
    content = dict(
        teachers=dict(ours=dict(pretrain=str(pretrain), kv_heads=8)),
        runs=dict(method=("scratch",), kv_heads=(8, 2, 1), alpha=(0.0, 0.05), seed=(1, 2)),
        overrides=("--config.train.eval_every=10",),
    )
    runs = sweep.Sweep(ConfigDict(content), tmp_path)
    assert [run.name for run in runs.runs] == [f"ours-scratch-k{k}-a1-s{seed}" for seed in (1, 2) for k in (8, 2, 1)]
    model = load_config(pretrain).model
    whole = dataclasses.replace(models.size(model.size), **model.changes)
    for run in runs.runs:
        (train, arguments), (evaluate, _) = runs._commands(run, tmp_path)
        assert (train, evaluate) == ("gqa.train", "gqa.evaluate")
        assert f"--config.train.seed={run.seed}" in arguments and "--config.train.eval_every=10" in arguments
        prefix = "--config.model.changes."
        changes = dict(text.removeprefix(prefix).split("=") for text in arguments if text.startswith(prefix))
        trained = dataclasses.replace(whole, **{name: int(value) for name, value in changes.items()})
        assert trained.kv_heads("decoder_self") == (run.kv_heads,) * len(whole.kv_heads("decoder_self"))
        sizes = [models.num_parameters(models.abstract(each)) for each in (whole, trained)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_from_scratch_needs_the_config_of_the_pre_training(sweep_file, tmp_path):
    config = load_config(sweep_file)
    config.runs.method = ("scratch", "mean")
    with pytest.raises(InputError, match=r"teachers\.tiny\.pretrain: None is missing"):
        sweep.Sweep(config, tmp_path)


ONE_RUN = ("--config.runs.kv_heads=2", "--config.runs.alpha=1.0", "--config.runs.seed=1")


def test_what_a_config_need_not_say(sweep_file, tmp_path):
    config = load_config(sweep_file)
    config.unlock()
    for name in ("calibration", "keep_checkpoints", "finetune"):
        del config[name]
    for run in (runs := sweep.Sweep(config, tmp_path)).runs:
        assert {module for module, _ in runs._commands(run, tmp_path)} <= {
            "checkpoints_tools.convert",
            "gqa.train",
            "gqa.evaluate",
        }
    del config.teachers.tiny["kv_heads"]
    with pytest.raises(InputError, match=r"teachers\.tiny\.kv_heads is None; expected the teacher's number"):
        sweep.Sweep(config, tmp_path)


def test_fine_tuning_draws_without_uptraining(sweep_file, tmp_path, finetuning):
    config = load_config(sweep_file)
    config.runs.update(kv_heads=(2,), alpha=(0.0,))
    assert [run.seed for run in sweep.Sweep(config, tmp_path).runs] == [1]
    config.finetune = ConfigDict({"docstring": finetuning})
    assert [run.seed for run in sweep.Sweep(config, tmp_path).runs] == [1, 2]


def test_commands_that_cannot_be_made_fail_their_run_alone(start, called, monkeypatch):
    def convert(self, run, folder):
        if run.seed == 1:
            raise InputError("3 heads do not\ndivide 8")
        yield from ()
        return (yield from scratch(self, run, folder))

    scratch = sweep.Sweep._from_teacher
    monkeypatch.setattr(sweep.Sweep, "_from_teacher", convert)
    code, out = start(*ONE_RUN[:2])
    assert code == 1 and "failed: tiny-mean-k2-a1-s1: 3 heads do not divide 8\n1 done, 1 failed, 0 waiting" in out


def test_known_runs_without_the_sweeps_scores_are_not_taken(start, tmp_path, sweep_file, finetuning):
    axes = dict(teacher="tiny", method="mean", kv_heads=2, alpha=1.0)
    scores = dict(loss=1.0, accuracy=0.5, target_tokens=7)
    rows = [axes | scores | {"seed": 1}, axes | scores | {"seed": 2, "loss": None}, axes | {"seed": 3}]
    rows.append(axes | scores | {"seed": 4, "docstring rouge1": 20.0})
    known, tuned = tmp_path / "results.json", tmp_path / "tuned.py"
    known.write_text(json.dumps({"runs": rows}))
    tuned.write_text(sweep_file.read_text().replace("'finetune': {}", f"'finetune': {{'docstring': {finetuning!r}}}"))
    arguments = (*ONE_RUN[:2], "--config.runs.seed=1,2,3,4", f"--known={known}", "--list")
    for config, taken in ((tuned, 1), (sweep_file, 2)):
        listed = start(*arguments, config=config)[1]
        assert f"{4 - taken} runs lack scores of this sweep" in listed and f"{taken} done, 0 failed" in listed
    known.write_text(json.dumps({"runs": [rows[0] | {"alpha": "x"}]}))
    with pytest.raises(InputError, match=r"is no results\.json of a sweep"):
        start(*arguments)


def test_a_folder_has_the_runs_of_one_sweeps_settings(start, called, tmp_path, sweep_file):
    assert start(*ONE_RUN)[0] is None
    settings = tmp_path / "runs" / "sweep.json"
    before, commands = settings.read_text(), len(called)
    with pytest.raises(InputError, match=r'sweep\.json: .* have overrides=\[\], this sweep has \["--config\.train'):
        start(*ONE_RUN, "--config.overrides=--config.train.batch_size=4")
    assert settings.read_text() == before
    other = tmp_path / "other.py"
    other.write_text(sweep_file.read_text().replace("'tiny'", "'other'"))
    assert start(*ONE_RUN, config=other)[0] is None
    assert {"teachers.tiny", "teachers.other"} < set(json.loads(settings.read_text()))
    results = tmp_path / "runs" / "results.json"
    with pytest.raises(InputError, match=r"sweep\.json: runs in this folder have overrides=\[\]"):
        start(
            *ONE_RUN[:2],
            "--config.overrides=--config.train.batch_size=4",
            f"--known={results}",
            f"--workdir={tmp_path / 'new'}",
        )
    whole = settings.read_text()
    settings.write_text(whole[:20])
    with pytest.raises(InputError, match=r"sweep\.json is damaged; delete it if the runs beside it have this sweep's"):
        start(*ONE_RUN)
    assert settings.read_text() == whole[:20]
    settings.unlink()  # a folder of before
    assert "1 done" in start(*ONE_RUN)[1] and settings.exists() and len(called) == 2 * commands


def test_seconds_and_commands_are_those_of_all_sessions(start, called, tmp_path, monkeypatch):
    whole = sweep._call

    def killed(module, *rest):
        if module == "gqa.evaluate":
            raise KeyboardInterrupt
        return whole(module, *rest)

    monkeypatch.setattr(sweep, "_call", killed)
    with pytest.raises(KeyboardInterrupt):
        start(*ONE_RUN)
    folder = tmp_path / "runs" / "tiny-mean-k2-a1-s1"
    seconds = json.loads((folder / "commands.json").read_text())
    (folder / "commands.json").write_text(json.dumps(dict.fromkeys(seconds, 100.0)))
    monkeypatch.setattr(sweep, "_call", whole)
    start(*ONE_RUN)
    result = json.loads((folder / "result.json").read_text())
    modules = [command.split()[2] for command in result["commands"]]
    assert modules == ["checkpoints_tools.convert", "gqa.train", "gqa.evaluate"]
    assert (
        200 <= result["seconds"] < 300
        and result["cpu"]
        and result["commit"]
        and not (folder / "commands.json").exists()
    )


OTHERS = dict(teacher="tiny", method="mean", kv_heads=4, alpha=1.0, seed=1, loss=1.0, accuracy=0.5, target_tokens=7)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"loss": null}', json.dumps(OTHERS)])
def test_damaged_results_are_done_again(content, start, called, tmp_path):
    folder = tmp_path / "runs" / "tiny-mean-k2-a1-s1"
    folder.mkdir(parents=True)
    for name in ("result.json", "failed.json"):
        (folder / name).write_text(content)
    (folder / "commands.json").write_text('{"x": "y"}')
    assert "0 done, 0 failed, 1 waiting" in start(*ONE_RUN, "--list")[1]
    assert "1 done, 0 failed, 0 waiting" in start(*ONE_RUN)[1]


def test_a_failed_run_is_listed_with_its_last_reason(start, monkeypatch):
    ends = iter([("error: no room on the disk\n", 1), ("step 1\rstep 2\n", 3), ("train: 40%", -9), ("", -15)])

    def call(module, arguments, log, lock):
        said, code = next(ends)
        with log.open("a") as file:
            file.write(said)
        return code

    monkeypatch.setattr(sweep, "_call", call)
    reasons = [start(*ONE_RUN)[1].splitlines()[-2].partition("-s1: ")[2] for _ in range(4)]
    assert reasons == [
        "error: no room on the disk",
        "exit code 3; it said last: step 2",
        "ended by SIGKILL; it said last: train: 40%",
        "ended by SIGTERM; it said nothing",
    ]


def test_scores_that_cannot_be_read_fail_their_run_alone(start, called, tmp_path, monkeypatch):
    whole = sweep._call

    def call(module, arguments, log, lock):
        code = whole(module, arguments, log, lock)
        if module == "gqa.evaluate" and "s1" in str(log):
            (log.parent / "evaluation.json").write_text("{}")
        return code

    monkeypatch.setattr(sweep, "_call", call)
    code, out = start(*ONE_RUN[:2])
    assert code == 1 and "failed: tiny-mean-k2-a1-s1: KeyError: 'loss'\n1 done, 1 failed, 0 waiting" in out
    assert (
        "python -m gqa.evaluate"
        in json.loads((tmp_path / "runs/tiny-mean-k2-a1-s1/failed.json").read_text())["command"]
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(runs=dict(method=("meen",))), r"method='meen' is unknown; expected one of mean, first"),
        (dict(runs=dict(alpha=("5%",))), r"runs\.alpha holds '5%'; expected numbers such as 0\.05"),
        (dict(runs=dict(kv_heads=2)), r"runs\.kv_heads is 2; expected several values, such as \(1, 2\)"),
        (dict(runs=dict(method=(3,))), r"runs\.method holds 3; expected names such as mean"),
        (dict(teachers=3), r"teachers is 3; expected a section, as in configs/sweeps"),
        (dict(teachers=dict(tiny=3)), r"teachers\.tiny is 3; expected a section"),
        (dict(teachers={"org/t5": dict(kv_heads=8)}), r"teachers\.org/t5: no folder can .*; nearest: org_t5"),
        (dict(teachers=dict(tiny=dict(kv_heads=8, uptrain=3))), r"teachers\.tiny\.uptrain: 3 is missing; run from"),
        (dict(overrides="--config.train.seed=1"), r"overrides is '.*'; expected several options, such as \("),
        (dict(overrides=(3,)), r"overrides is \(3,\); expected several options, such as \("),
        (dict(overrides=("--config.train.stpes=7",)), r"config\.train\.stpes; nearest: .*\.steps"),
        (dict(calibration="embedded"), r"calibration is 'embedded'; expected a section, as in configs/sweeps"),
        (dict(finetune=3), r"finetune is 3; expected a section"),
        (dict(heads=4), r"teachers\.tiny\.kv_heads is 4, .* has 8; expected the same"),
        (dict(runs=dict(kv_heads=(2.5,))), r"runs\.kv_heads holds 2\.5; expected numbers such as 2"),
        (dict(finetune=dict(rows=None)), r"finetune\.docstring\.rows=None is a NoneType; expected int"),
        (
            dict(finetune=dict(beam=4)),
            r"finetune\.docstring: unknown 'beam'; expected one of config, overrides, rows, .*",
        ),
        (dict(finetune=dict(rows=0)), r"finetune\.docstring\.rows is 0; expected 1 or more"),
        (dict(finetune=dict(metrics="rogue")), r"metric 'rogue' is unknown; expected one of .*; nearest: rouge"),
        (dict(finetune=dict(overrides=("--config.train.stpes=7",))), r"config\.train\.stpes; nearest: .*\.steps"),
        (
            dict(finetune=dict(overrides=("--config.data.task=arxiv",))),
            r"finetune\.docstring trains on arxiv; expected --config\.data\.task=docstring",
        ),
        (dict(finetune=dict(config="no.py")), r"finetune\.docstring\.config: no\.py is missing; run from"),
    ],
)
def test_what_no_run_could_do_is_said_before_the_first(change, reason, sweep_file, finetuning, tmp_path):
    config = ConfigDict(load_config(sweep_file).to_dict())
    config.runs = ConfigDict(config.runs.to_dict() | change.get("runs", {}))
    changed = change.get("finetune", {})
    with config.ignore_type():
        config.finetune = ConfigDict({"docstring": finetuning | changed}) if isinstance(changed, dict) else changed
    if "heads" in change:
        config.teachers.tiny.kv_heads = change["heads"]
    for name in {"teachers", "overrides", "calibration"} & set(change):
        with config.ignore_type():
            setattr(config, name, change[name])
    with pytest.raises(InputError, match=reason):
        sweep.Sweep(config, tmp_path)


def test_teachers_may_be_named_by_paths(sweep_file, start, called):
    text = sweep_file.read_text().replace("from ml", "from pathlib import Path\nfrom ml")
    sweep_file.write_text(re.sub(r"'checkpoint': ('[^']*')", r"'checkpoint': Path(\1)", text))
    for _ in range(2):  # as what sweep.json says of it
        assert "1 done, 0 failed, 0 waiting" in start(*ONE_RUN)[1]


def test_the_table_is_there_after_every_run(start, called, tmp_path, monkeypatch):
    whole = sweep._call

    def call(module, arguments, log, lock):
        if "-s2" in str(log):
            raise KeyboardInterrupt
        return whole(module, arguments, log, lock)

    monkeypatch.setattr(sweep, "_call", call)
    with pytest.raises(KeyboardInterrupt):
        start(*ONE_RUN[:2])
    content = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert [row["seed"] for row in content["runs"]] == [1] and content["waiting"] == 1
    assert len((tmp_path / "runs" / "results.csv").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text())["query_heads.tiny"] == 8


@pytest.mark.parametrize("of_task", [False, True])
def test_a_moved_folder_goes_on(of_task, start, sweep_file, tmp_path, called, finetuning, monkeypatch):
    """The trainings that were cut short there find the checkpoint that has moved with them."""
    if of_task:
        text = sweep_file.read_text()
        sweep_file.write_text(text.replace("'finetune': {}", f"'finetune': {{'docstring': {finetuning!r}}}"))
    whole, stopped = sweep._call, "docstring" if of_task else "uptrained"

    def call(module, arguments, log, lock):
        workdir = Path(dict(argument[2:].split("=", 1) for argument in arguments).get("workdir", ""))
        if module == "gqa.train" and workdir.name == stopped:
            workdir.mkdir()
            (checkpoint,) = (word.partition("=")[2] for word in arguments if word.startswith("--config.model.checkp"))
            (workdir / "config.json").write_text(json.dumps({"model": {"size": None, "checkpoint": checkpoint}}))
            raise KeyboardInterrupt
        return whole(module, arguments, log, lock)

    monkeypatch.setattr(sweep, "_call", call)
    with pytest.raises(KeyboardInterrupt):
        start(*ONE_RUN)
    (tmp_path / "runs").rename(tmp_path / "moved")
    checkpoint = tmp_path / "moved" / "tiny-mean-k2-a1-s1" / ("uptrained/model" if of_task else "converted")
    monkeypatch.setattr(sweep, "_call", lambda module, *others: int(module == "gqa.train"))
    start(*ONE_RUN, f"--workdir={tmp_path / 'moved'}")
    content = json.loads((checkpoint.parents[1 if of_task else 0] / stopped / "config.json").read_text())
    assert content == {"model": {"size": None, "checkpoint": str(checkpoint)}}


def test_ctrl_c_ends_the_array(start, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho $$ >> "$0.pids"\nexec sleep 100\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    start("--array=2")
    # As from a terminal: where the tests themselves run in the background, Ctrl-C is ignored and so is it in children.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    array = subprocess.Popen([tmp_path / "runs" / "array.sh"], start_new_session=True)
    signal.signal(signal.SIGINT, earlier)
    pids = tmp_path / "python.pids"
    while not pids.exists() or len(pids.read_text().splitlines()) < 2:
        assert array.poll() is None
        time.sleep(0.05)
    os.killpg(array.pid, signal.SIGINT)
    assert array.wait() == 130
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_the_array_does_not_write_itself_and_fails_with_its_workers(start, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*" >> "$0.said"\ncase "$*" in *--worker=1/3) exit 4;; esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    start("--array", "3", "--worker", "0/1")
    finished = subprocess.run([tmp_path / "runs" / "array.sh"], env=os.environ)
    said = sorted((tmp_path / "python.said").read_text().splitlines())
    assert finished.returncode == 4
    assert [line.partition(str(tmp_path / "runs"))[2] for line in said] == [f" --worker={n}/3" for n in range(3)]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--array=0"], "--array=0; expected 1 process or more"),
        (["--arr=3"], "unknown option --arr; nearest: --array"),
        (["--known=none.json"], "none.json is missing"),
        (["--config=configs/timing/t5_xxl.py"], "the config has no teachers; expected a sweep's"),
    ],
)
def test_bad_command_lines_make_no_folder(arguments, reason, start, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=reason):
        start(*arguments)
    assert not (tmp_path / "runs").exists()
