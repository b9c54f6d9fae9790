"""Command lines: the literal lines and exit codes that a user sees."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gqa.command_line import add_config_argument, load_config, parse, parse_arguments, run
from gqa.errors import InputError

CONFIG = """
import ml_collections
from ml_collections.config_dict import placeholder

def get_config():
    config = ml_collections.ConfigDict()
    config.train = {"steps": 10, "learning_rate": 1e-3, "remat": False, "name": "a", "decay": placeholder(float)}
    config.init = {"checkpoint": None}
    config.groups = (1, 2)
    config.methods = ("mean", "first")
    config.mesh = ()
    config.warmup = config.train.get_ref("steps") // 2
    return config
"""

COMMAND = '''
"""python -m command --config=FILE"""
import argparse
from gqa.command_line import add_config_argument, parse, run

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--workdir")
    args, config = parse(parser)
    print(args.workdir, config.train.steps)

run(main)
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "quickstart.py"
    path.write_text(CONFIG)
    return path


def error_of(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


def command(folder: Path, *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of COMMAND, run in `folder`."""
    (folder / "command.py").write_text(COMMAND)
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "command.py", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def exit_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code, capsys.readouterr().err


def raiser(error: BaseException):
    def main():
        raise error

    return main


def test_command_reads_its_config_and_both_forms_of_override(config_file):
    argv = ["--config=quickstart.py", "--config.train.steps", "7", "--workdir=out"]
    assert command(config_file.parent, *argv) == (0, "out 7\n", "")
    assert command(config_file.parent, "--config=quickstart.py", "--config.train.steps=8") == (0, "None 8\n", "")


def test_command_refuses_an_unknown_key_in_one_line(config_file):
    argv = ["--config=quickstart.py", "--config.train.stpes=3"]
    expected = "error: unknown key config.train.stpes; nearest: config.train.steps\n"
    assert command(config_file.parent, *argv) == (2, "", expected)


def test_help_explains_overrides(config_file):
    code, stdout, stderr = command(config_file.parent, "--help")
    assert (code, stderr) == (0, "")
    assert "python -m command --config=FILE" in stdout
    assert "--config.SECTION.KEY=VALUE" in " ".join(stdout.split())


def test_no_command_line_starts_jax():
    loaded = "import sys, gqa.command_line; print('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "False\n"
    )


@pytest.mark.parametrize(
    ("main", "code", "stderr"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (
            raiser(InputError("kv_heads=6 does not divide 32;\nnearest: 4, 8")),
            2,
            "error: kv_heads=6 does not divide 32; nearest: 4, 8\n",
        ),
        (raiser(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: Path("/none/file").read_text(), 2, "error: No such file or directory: /none/file\n"),
        (raiser(PermissionError(errno.EACCES, "Permission denied", "out")), 2, "error: Permission denied: out\n"),
        (raiser(OSError(errno.ENOSPC, "No space left on device")), 2, "error: No space left on device\n"),
    ],
)
def test_exit_codes(main, code, stderr, capsys):
    assert exit_of(main, capsys) == (code, stderr)


def test_path_at_fault(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert exit_of(lambda: (file / "inside").mkdir(), capsys) == (2, f"error: Not a directory: {file}/inside\n")
    assert exit_of(lambda: file.mkdir(), capsys) == (2, f"error: File exists: {file}\n")
    assert exit_of(lambda: tmp_path.read_text(), capsys) == (2, f"error: Is a directory: {tmp_path}\n")


@pytest.mark.parametrize("bug", [TypeError("bug"), OSError(errno.EINVAL, "bug")])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug), match="bug"):
        run(raiser(bug))


def test_whoever_reads_has_had_enough():
    """As of `| head`: no word on stderr, and a shell's code for it."""
    code = "from gqa.command_line import run; run(lambda: print('x' * 200_000))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_unknown_options_name_the_nearest(config_file):
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir")
    assert parse_arguments(parser, ["--workdir=a"]).workdir == "a"
    assert error_of(parse_arguments, parser, ["--wokdir=a"]) == "unknown option --wokdir; nearest: --workdir"
    assert error_of(parse_arguments, parser, ["a"]) == "unexpected argument 'a'; options are written --NAME=VALUE"
    add_config_argument(parser)
    config = f"--config={config_file}"
    expected = "unknown option --train.steps; nearest: --config.train.steps"
    assert error_of(parse, parser, [config, "--train.steps=3"]) == expected
    expected = "--config.train.steps has no value; expected --config.train.steps=VALUE"
    assert error_of(parse, parser, [config, "--config.train.steps"]) == expected
    assert error_of(parse, parser, ["--config.train.steps", config]) == expected


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "7", 7),
        ("train.steps", "-1", -1),
        ("train.learning_rate", "3", 3.0),
        ("train.learning_rate", "5e-4", 5e-4),
        ("train.remat", "true", True),
        ("train.remat", "False", False),
        ("train.name", "7=x", "7=x"),
        ("train.decay", "0.1", 0.1),
        ("train.decay", "None", None),
        ("init.checkpoint", "runs/a", "runs/a"),
        ("init.checkpoint", "none", None),
        ("groups", "4", (4,)),
        ("groups", "(1, 4,8)", (1, 4, 8)),
        ("methods", "mean,random", ("mean", "random")),
        ("methods", "['mean', 'random']", ("mean", "random")),
        ("mesh", "2,4", (2, 4)),
        ("mesh", "", ()),
    ],
)
def test_override_takes_the_type_of_the_default(config_file, key, text, value):
    found = load_config(config_file, [f"--config.{key}={text}"])
    for name in key.split("."):
        found = found[name]
    assert (type(found), found) == (type(value), value)


def test_overrides_reach_references_and_the_last_one_holds(config_file):
    config = load_config(config_file, ["--config.train.steps=50", "--config.train.steps=20"])
    assert (config.train.steps, config.warmup) == (20, 10)
    assert load_config(config_file, ["--config.train.decay=0.5", "--config.train.decay=None"]).train.decay is None


def test_config_is_locked(config_file):
    with pytest.raises(AttributeError):
        load_config(config_file).typo = 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=1.5", "config.train.steps=1.5 has the wrong type; expected int such as 10"),
        ("train.steps=None", "config.train.steps=None has the wrong type; expected int such as 10"),
        ("train.learning_rate=x", "config.train.learning_rate=x has the wrong type; expected float such as 0.001"),
        ("train.remat=1", "config.train.remat=1 has the wrong type; expected bool such as False"),
        ("train.decay=x", "config.train.decay=x has the wrong type; expected float or None"),
        ("groups=1,a", "config.groups=1,a has the wrong type; expected tuple such as (1, 2)"),
        (
            "train=1",
            "config.train is a section; expected one of its keys: decay, learning_rate, name, remat, steps",
        ),
        ("train.steps.x=1", "unknown key config.train.steps.x; nearest: config.train.steps"),
        ("step=1", "unknown key config.step; nearest: config.train.steps"),
    ],
)
def test_wrong_overrides(config_file, override, message):
    assert error_of(load_config, config_file, [f"--config.{override}"]) == message


def test_missing_config_files(config_file):
    folder = config_file.parent
    expected = f"config {folder}/quikstart.py not found; nearest: {config_file}"
    assert error_of(load_config, folder / "quikstart.py") == expected
    expected = f"config {folder}/no/quickstart.py not found: there is no folder {folder}/no"
    assert error_of(load_config, folder / "no" / "quickstart.py") == expected
    expected = f"config {folder} is a folder; expected one of its files: quickstart.py"
    assert error_of(load_config, folder) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("config = 3", "{} has no get_config(); expected a function that returns an ml_collections.ConfigDict"),
        ("def get_config():\n    return {}", "get_config() of {} returns dict; expected an ml_collections.ConfigDict"),
        ("def get_config():\n    return 1 / 0", "{}:2 raised ZeroDivisionError: division by zero"),
        ("def f(:", "{}:1 raised SyntaxError: invalid syntax"),
        ("\nimport none_such", "{}:2 raised ModuleNotFoundError: No module named 'none_such'"),
        (
            "import ml_collections as m\nfrom ml_collections.config_dict import required_placeholder\n"
            "def get_config():\n    return m.ConfigDict({'source': required_placeholder(str)})",
            "config.source has no value; expected --config.source=VALUE",
        ),
    ],
)
def test_broken_config_files(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(source)
    assert error_of(load_config, path).startswith(message.format(path) if "{}" in message else message)


def test_required_value_given(tmp_path):
    path = tmp_path / "required.py"
    path.write_text(
        "import ml_collections as m\nfrom ml_collections.config_dict import required_placeholder\n"
        "def get_config():\n    return m.ConfigDict({'source': required_placeholder(str)})"
    )
    assert load_config(path, ["--config.source=a"]).source == "a"


def test_edited_config_is_read_again(config_file):
    assert load_config(config_file).train.steps == 10
    config_file.write_text(CONFIG.replace('"steps": 10', '"steps": 99'))
    assert load_config(config_file).train.steps == 99
