"""What every command line shares: one error line for bad input, a config file with overrides, nearest valid choices.

A command is

    def main() -> int | None:
        parser = argparse.ArgumentParser(description=__doc__)
        add_config_argument(parser)
        args, config = parse(parser)
        ...

    if __name__ == "__main__":
        run(main)

Nothing here imports JAX, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import errno
import os
import select
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa.errors import InputError, nearest, one_of

try:
    import ml_collections
    from ml_collections.config_dict import RequiredValueError, placeholder
except ImportError:  # what needs no configuration, such as experiments.gpu_timing, runs without
    ml_collections = None

# A path or disk that the user has to mend. Any other OSError is a bug and keeps its traceback.
_USER_ERRNOS = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EFBIG,
        errno.ENAMETOOLONG,
    }
)

# Keys that a section of a run has though its file leaves them out, by section: the default, or the type of what may
# stand instead of None. Spelt out, as the dataclasses that they belong to import JAX; tests/test_configs.py compares.
_OPTIMIZER = {
    "clip_norm": float,
    "warmup_steps": int,
    "decay_steps": int,
    "final_ratio": float,
    "decay_rate": float,
    "clipping_threshold": float,
    "multiply_by_parameter_scale": bool,
    "beta1": float,
    "beta2": float,
    "epsilon": float,
    "weight_decay": float,
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "data": {"prefix": str, "template": str},
    "optimizer": _OPTIMIZER,
    "value_optimizer": _OPTIMIZER,
    "train": {
        "keep_minutes": float,
        "mirror": str,
        "skip_above": float,
        "roll_back_after": int,
        "peak_tflops": float,
    },
    "mesh": {"slice": 1, "sequence": 1},
    "mixture": {"temperature": float, "maximum": int},
    "adapter": {"base": str},
}


def run(main: Callable[[], int | None]) -> None:
    """Calls `main` and exits the process with its code (None is 0).

    Exits 2 with the single line `error: …` on stderr for `InputError` and for a path or disk at fault (missing, not
    permitted, a file where a folder should be, full), and 130 on Ctrl-C, with the interrupt's own message where it has
    one. 141, as a shell has it, when whoever reads the output has had enough (`| head`). Other exceptions are bugs:
    they propagate.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except InputError as error:
        code = _report(str(error))
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        code = 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        code = _report(f"{error.strerror}{where}")
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout; it is /dev/null from then on, so that Python ends without a word about it."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def add_config_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--config=FILE` and the explanation of its overrides to `parser`, whose arguments `parse` then reads."""
    group = parser.add_argument_group(
        "configuration",
        "A run is a Python file with a get_config() function. Any value in it is replaced with "
        "--config.SECTION.KEY=VALUE, for example --config.train.steps=1000 (numbers as 10 or 1e-3, booleans as true "
        "or false, tuples as 1,2,4, and None where the file says None), and so is what a section may leave out, such "
        "as mesh.slice. Unknown keys and values of another type are refused.",
    )
    group.add_argument(
        "--config", required=required, metavar="FILE", help="configuration file, e.g. configs/quickstart.py"
    )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, ml_collections.ConfigDict | None]:
    """Reads a command line (`argv`, or the process's own) with a `--config` into its arguments and its configuration,
    which is None where `--config` may be left out and is.

    Raises `InputError` for an unknown option or key (naming the nearest) and for a configuration that does not load.
    """
    overrides, rest = _split_overrides(sys.argv[1:] if argv is None else argv)
    args, unknown = _parse_known(parser, rest)
    if args.config is None and overrides:
        raise InputError(f"{overrides[0]} changes a configuration; expected --config=FILE beside it")
    config = None if args.config is None else load_config(args.config, overrides)
    keys = [] if config is None else _known(config)
    _refuse_unknown(unknown, [*_options(parser), *(f"--config.{key}" for key in keys)])
    return args, config


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`parser.parse_args` for a command without a configuration; an unknown option raises `InputError` (nearest)."""
    args, unknown = _parse_known(parser, argv)
    _refuse_unknown(unknown, _options(parser))
    return args


def check_new_file(output: Path) -> None:
    """Raises `InputError` unless the file of `--output` can be made."""
    if output.exists():
        raise InputError(f"--output={output} exists already; name a new file")
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The locked `get_config()` of the Python file at `path`, with each `--config.a.b=value` of `overrides` applied.

    A value takes the type of the one that it replaces (an int is a valid float); where the file says None, None
    stays valid, and `placeholder(int)` also fixes the type of what may replace it. A key of `OPTIONAL` need not be in
    the file if its section is. Of two overrides of one key the last holds.

    Raises `InputError` for a missing or broken file, an unknown key (naming the nearest), a value of another type and
    a `required_placeholder` left empty.
    """
    if ml_collections is None:
        raise InputError(
            "ml-collections, which configurations are made of, is not installed; expected pip install -e ."
        )
    config = _run_config_file(Path(path))
    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.startswith("--config."):
            raise InputError(f"{override!r} is not an override; expected --config.KEY=VALUE")
        values[key.removeprefix("--config.")] = text
    for key, text in values.items():
        _override(config, key, text)
    for key in _keys(config):
        section, name = _section(config, key)
        try:
            section[name]
        except RequiredValueError:
            raise InputError(f"config.{key} has no value; expected --config.{key}=VALUE") from None
    return config.lock()


def check_keys(config: Mapping, keys: Iterable[str], example: str) -> None:
    """Raises `InputError` unless a configuration without sections has `keys`, as the file `example` has them."""
    for key in keys:
        if key not in config:
            raise InputError(f"the configuration has no {key}; expected one such as {example}")


def build(kind: type, raw: Mapping, where: str) -> Any:
    """The dataclass `kind` of a section of a configuration, its own sections too.

    `where` names it in the `InputError` for an unknown or missing key and for a value of another type.
    """
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{where}={raw!r}; expected a section with {', '.join(f.name for f in dataclasses.fields(kind))}"
        )
    hints, values = typing.get_type_hints(kind), dict(raw)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        one_of(where, name, fields)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"{where}.{name} is missing")
        if name in values:
            values[name] = coerce(hints[name], values[name], f"{where}.{name}")
    return kind(**values)


def coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` says; an int is a valid float. Raises `InputError` for another."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return build(option, value, where)
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is Mapping and isinstance(value, Mapping):
            return types.MappingProxyType(dict(value))
        if isinstance(origin, type) and isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise InputError(f"{where}={value!r} is a {type(value).__name__}; expected {names.replace('NoneType', 'None')}")


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """`parser.parse_known_args`, its errors one line like all others instead of a usage text of many."""

    def refuse(message: str):
        raise InputError(f"{message}; see --help")

    parser.error = refuse
    return parser.parse_known_args(argv)


def _report(message: str) -> int:
    # An InputError that quotes a multi-line message of a library still takes one line.
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    return 2


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--")]


def _refuse_unknown(unknown: Sequence[str], options: Iterable[str]) -> None:
    if not unknown:
        return
    word = unknown[0].partition("=")[0]
    if not word.startswith("-"):
        raise InputError(f"unexpected argument {unknown[0]!r}; options are written --NAME=VALUE")
    raise InputError(f"unknown option {word}; nearest: {nearest(word, options)}")


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    # Taken out before argparse sees them: it would read the value of `--config.a VALUE` as a positional argument.
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise InputError(f"{word} has no value; expected {word}=VALUE")
            overrides.append(f"{word}={value}")
    return overrides, rest


def _run_config_file(path: Path) -> ml_collections.ConfigDict:
    if not path.is_file():
        raise InputError(_describe_missing(path))
    module = types.ModuleType("config")
    module.__file__ = str(path)
    try:
        # Not through importlib, whose bytecode cache misses an edit of equal size within the same second.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        get_config = module.__dict__.get("get_config")
        config = get_config() if callable(get_config) else None
    except (InputError, OSError):
        raise
    except Exception as error:
        raise InputError(f"{path}:{_line_of(error, path)} raised {type(error).__name__}: {error}") from error
    if get_config is None:
        raise InputError(f"{path} has no get_config(); expected a function that returns an ml_collections.ConfigDict")
    if not isinstance(config, ml_collections.ConfigDict):
        found = type(config).__name__
        raise InputError(f"get_config() of {path} returns {found}; expected an ml_collections.ConfigDict")
    return config


def _line_of(error: Exception, path: Path) -> int | None:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else 1


def _describe_missing(path: Path) -> str:
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.py"))
        return f"config {path} is a folder; expected one of its files: {', '.join(files) or 'it has none'}"
    if not path.parent.is_dir():
        return f"config {path} not found: there is no folder {path.parent}"
    choice = nearest(path.name, (file.name for file in path.parent.glob("*.py")))
    return f"config {path} not found; " + (
        f"nearest: {path.parent / choice}" if choice else f"{path.parent} has no .py file"
    )


def _kind(config: ml_collections.ConfigDict, name: str) -> type:
    try:
        return config.get_type(name)
    except RequiredValueError:
        return config.get_ref(name).get_type()


def _keys(config: ml_collections.ConfigDict) -> Iterator[str]:
    """Dotted names of every value in `config`, sections left out."""
    for key in config:
        if issubclass(_kind(config, key), ml_collections.ConfigDict):
            yield from (f"{key}.{inner}" for inner in _keys(config[key]))
        else:
            yield key


def _known(config: ml_collections.ConfigDict) -> list[str]:
    """Dotted names of every value that `config` has or may have."""
    sections = [name for name in OPTIONAL if _is_section(config, name)]
    return list(dict.fromkeys([*_keys(config), *(f"{name}.{key}" for name in sections for key in OPTIONAL[name])]))


def _is_section(config: ml_collections.ConfigDict, name: str) -> bool:
    return name in config and issubclass(_kind(config, name), ml_collections.ConfigDict)


def _add_optional(config: ml_collections.ConfigDict, key: str) -> None:
    """Gives a key of `OPTIONAL` that the file left out its default."""
    section, _, name = key.partition(".")
    if name in OPTIONAL.get(section, {}) and _is_section(config, section) and name not in config[section]:
        default = OPTIONAL[section][name]
        with config[section].unlocked():
            config[section][name] = placeholder(default) if isinstance(default, type) else default


def _section(config: ml_collections.ConfigDict, key: str) -> tuple[ml_collections.ConfigDict, str]:
    """The section that holds the dotted `key`, and the key's last name in it."""
    *sections, name = key.split(".")
    node = config
    for section in sections:
        if not _is_section(node, section):
            break
        node = node[section]
    else:
        if name in node:
            return node, name
    raise InputError(f"unknown key config.{key}; nearest: config.{nearest(key, _known(config))}")


def _value(config: ml_collections.ConfigDict, name: str) -> Any:
    """The value of `name`; None for a required placeholder that nothing fills yet."""
    try:
        return config[name]
    except RequiredValueError:
        return None


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    _add_optional(config, key)
    section, name = _section(config, key)
    kind, default = _kind(section, name), _value(section, name)
    if issubclass(kind, ml_collections.ConfigDict):
        raise InputError(f"config.{key} is a section; expected one of its keys: {', '.join(section[name])}")
    try:
        section[name] = _parse_value(text, kind, default)
    except ValueError:
        expected = kind.__name__ + (" or None" if default is None else f" such as {default!r}")
        raise InputError(f"config.{key}={text} has the wrong type; expected {expected}") from None


def _parse_value(text: str, kind: type, default: Any) -> Any:
    """`text` as a value of type `kind`; raises `ValueError` when it is none."""
    if default is None and text in ("None", "none"):
        return None
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float, str):
        return kind(text)
    if kind in (tuple, list):
        return kind(_parse_items(text, default or ()))
    if kind is type(None):  # the file does not say what else it may be
        return _parse_literal(text)
    raise ValueError(f"{text!r} is not a {kind.__name__}")


def _parse_items(text: str, default: Sequence[Any]) -> Iterator[Any]:
    """Items of `1,2`, `(1, 2)` or `[1, 2]`, each of the type of those that they replace where these agree."""
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    kinds = {type(item) for item in default}
    kind = kinds.pop() if len(kinds) == 1 else None
    for item in filter(None, map(str.strip, text.split(","))):
        if kind in (bool, int, float):
            yield _parse_value(item, kind, default[0])
        elif kind is str:
            yield item.strip("'\"")
        else:
            yield _parse_literal(item)


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
