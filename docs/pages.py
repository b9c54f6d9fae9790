"""What mkdocs asks while it builds the site (`make docs`): what is written elsewhere in the project, put in place.

`{{ README: HEADING }}` is that section of the README, `{{ config }}` the reference of the configuration, made from the
dataclasses that check it, and `{{ commands }}` what the command lines say of themselves. A page of the API for every
room of gqa is added. Links to pictures of the repository bring the picture along; to other files outside docs/ they
become plain text.
"""

import ast
import collections
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURES = (".png", ".svg")
COMMANDS = ("gqa", "checkpoints_tools", "experiments")
_INCLUDE = re.compile(r"^\{\{ (\w+)(?:: (.+))? \}\}$", re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the API's pages and the pictures that pages name."""
    from mkdocs.structure.files import File

    pages = []
    for room in rooms():
        page = f"# gqa.{room}\n\n::: gqa.{room}\n"
        files.append(File.generated(config, f"api/{room}.md", content=page))
        pages.append({f"gqa.{room}": f"api/{room}.md"})
    config.nav = [*config.nav, {"API": pages}]
    for path in pictures():
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """The page with its includes, and with links that lead somewhere on the site."""
    return expand(markdown)


def rooms() -> list[str]:
    """The packages and modules directly in gqa."""
    found = (ROOT / "gqa").iterdir()
    return sorted(
        path.stem
        for path in found
        if path.suffix == ".py" or (path / "__init__.py").is_file()
        if path.stem != "__init__"
    )


def pictures() -> list[str]:
    """Pictures of the repository that pages show, relative to its root."""
    found = set()
    for path in (ROOT / "docs").glob("*.md"):
        for _, _, target, _ in _LINK.findall(expand(path.read_text(encoding="utf-8"))):
            if target.startswith("repository/"):
                found.add(target.removeprefix("repository/"))
    return sorted(found)


def expand(markdown: str) -> str:
    """A page of docs/ with its includes in place and its links made the site's."""

    def include(match: re.Match) -> str:
        name, argument = match.groups()
        if name == "README":
            return _relink(section(argument), ROOT)
        return {"config": config_reference, "commands": commands}[name]()

    return _INCLUDE.sub(include, _relink(markdown, ROOT / "docs"))


def section(heading: str) -> str:
    """What the README says under a heading of the second level, up to the next of its kind."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)  # a shell's comments have one mark
    headings = dict(zip(parts[1::2], parts[2::2], strict=True))
    if heading not in headings:
        raise ValueError(f"README.md has no heading {heading!r}; it has {', '.join(headings)}")
    return headings[heading].strip()


def _relink(markdown: str, base: Path) -> str:
    """Links relative to the folder `base`, of the repository, made relative to the site's pages."""

    def link(match: re.Match) -> str:
        mark, text, target, anchor = match.groups()
        path = (base / target).resolve()
        if "://" in target or not path.exists():
            return match[0]
        if path.suffix in PICTURES:
            return f"{mark}[{text}](repository/{path.relative_to(ROOT).as_posix()})"
        if path.parent == ROOT / "docs":
            return f"{mark}[{text}]({path.name}{anchor or ''})"
        return text

    return _LINK.sub(link, markdown)


def commands() -> str:
    """The docstring of every module that is a command line: what its --help begins with."""
    lines = []
    for folder in COMMANDS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if 'if __name__ == "__main__":' in source:
                lines += [f"## {name}", "", "```text", ast.get_docstring(ast.parse(source)) or "", "```", ""]
    return "\n".join(lines)


def config_reference() -> str:
    """Every value that a configuration may have, in Markdown: its name, type, default and meaning."""
    from gqa.data.cleaning import CleaningConfig
    from gqa.models.llama import LlamaConfig
    from gqa.models.t5 import T5Config
    from gqa.planning.decode import DecodeConfig
    from gqa.posttraining.config import InstructionsConfig, PPORunConfig, RejectionConfig
    from gqa.training.config import RunConfig

    lines, shown = [], {}
    others = {
        "gqa.ppo": PPORunConfig,
        "gqa.rejection_sampling": RejectionConfig,
        "gqa.instructions": InstructionsConfig,
        "gqa.data.clean": CleaningConfig,
    }
    parts = [*sections("config", RunConfig)]
    for command, config in others.items():
        parts += sections(f"{command}: config", config)
    for where, kind in parts:
        lines += [f"## {where}", ""]
        lines += [f"As `{shown[kind]}`.", ""] if kind in shown else _table(kind)
        shown.setdefault(kind, where)
    lines += ["## config.model.changes: T5", "", *_table(T5Config)]
    lines += ["## config.model.changes: Llama", "", *_table(LlamaConfig)]
    lines += ["## Decoding, for gqa.plan", "", *_table(DecodeConfig)]
    return "\n".join(lines)


def sections(where: str, kind: type) -> Iterator[tuple[str, type]]:
    """The dataclass of a section and of all sections inside it, with their dotted names."""
    yield where, kind
    for name, hint in typing.get_type_hints(kind).items():
        for option in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
            if dataclasses.is_dataclass(option):
                yield from sections(f"{where}.{name}", option)


def _table(kind: type) -> list[str]:
    meanings, hints = comments(kind), typing.get_type_hints(kind)
    lines = [*inspect.getdoc(kind).splitlines(), "", "| key | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        cells = [f"`{field.name}`", f"`{_type(hints[field.name])}`", default, meanings.get(field.name, "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _type(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )


def comments(kind: type) -> dict[str, str]:
    """What stands behind each field of a class in its source, or in that of a class that it extends."""
    inherited = [comments(base) for base in kind.__bases__ if dataclasses.is_dataclass(base)]
    source = textwrap.dedent(inspect.getsource(kind))
    said = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    own = {node.target.id: said[node.lineno] for node in fields if node.lineno in said}
    return dict(collections.ChainMap(own, *inherited))
