"""The design's rules about the source: imports point one way, modules are values, public names are documented."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each room of gqa imports rooms of the lines above its own, never one beside it.
ROOMS = [
    {"errors", "compiler_flags", "files"},
    {"command_line"},
    {"sharding", "distributed"},
    {"nn"},
    {"models"},
    {"convert", "checkpoints", "decode", "objectives", "adapters", "data"},
    {"training"},
    {"posttraining", "evaluation", "planning"},
    {"config"},
    {"train", "evaluate", "generate", "plan", "rejection_sampling", "instructions", "ppo"},
]
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# data stands beside the chain that starts with nn, and meets it in training.
NOT_FOR_DATA = {"nn", "models"}
TOP_LEVEL_FOLDERS = {"checkpoints_tools", "experiments", "configs", "tests", "notebooks"}
# Modules are immutable pytrees under jax.jit and jax.grad: these would let a traced function mutate them.
MUTATING_TRANSFORMS = {"jit", "grad", "value_and_grad", "Optimizer"}
ROOMS_OF_MODULES = {"nn", "models", "adapters"}


def name_of(path: Path) -> str:
    """Dotted module name of a source file: `gqa.nn.layers`, and `gqa.nn.__init__` for a package's own file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def sources(*folders: str) -> list[tuple[str, str]]:
    """(module name, source) of every Python file of the top-level `folders`."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(name_of(path), path.read_text(encoding="utf-8")) for path in paths]


def imports(module: str, source: str) -> Iterator[str]:
    """Absolute dotted name of everything that `source` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def import_problems(module: str, source: str) -> list[str]:
    """Imports of `module` (a part of gqa) that point the wrong way, one line each."""
    room = module.split(".")[1]
    if room != "__init__" and room not in LEVELS:
        return [f"{module}: room {room!r} has no place in ROOMS"]
    problems = []
    for name in imports(module, source):
        top, _, inner = name.partition(".")
        target = inner.split(".")[0]
        if top in TOP_LEVEL_FOLDERS:
            problems.append(f"{module} imports {name}, of a top-level folder")
        elif top == "gqa" and target != room:
            below = room != "__init__" and LEVELS.get(target, len(ROOMS)) < LEVELS[room]
            if not below or (room == "data" and target in NOT_FOR_DATA):
                problems.append(f"{module} imports {name}")
    return problems


def transform_problems(module: str, source: str) -> list[str]:
    """Uses of an NNX transform that allows mutation, one line each."""
    names = [name for name in imports(module, source) if name.startswith("flax.nnx.")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx"):
            names.append(f"flax.nnx.{node.attr}")
    return [f"{module} uses {name}" for name in names if name.split(".")[2] in MUTATING_TRANSFORMS]


def mutation_problems(module: str, source: str) -> list[str]:
    """Assignments to `self.…` outside `__init__`: inside jax.jit they would be lost without a word."""
    problems = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        for node in ast.walk(function):
            stored = isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)
            if stored and ast.unparse(node).startswith("self."):
                problems.append(f"{module}: {function.name} assigns {ast.unparse(node)}")
    return problems


def docstring_problems(module: str, source: str) -> list[str]:
    """Public modules, functions and classes without a docstring (a `main` has its module's), one line each."""
    tree = ast.parse(source)
    if not tree.body:
        return []
    problems = [] if ast.get_docstring(tree) else [f"{module} has no docstring"]
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and node.name != "main" and not ast.get_docstring(node):
            problems.append(f"{module}.{node.name} has no docstring")
    return problems


def test_imports_point_one_way():
    problems = [problem for source in sources("gqa") for problem in import_problems(*source)]
    assert not problems, "\n".join(problems)


def test_no_transform_that_mutates_modules():
    everything = sources("gqa", "checkpoints_tools", "experiments")
    problems = [problem for source in everything for problem in transform_problems(*source)]
    assert not problems, "\n".join(problems)


def test_modules_are_assigned_in_their_constructor_only():
    modules = [source for source in sources("gqa") if source[0].split(".")[1] in ROOMS_OF_MODULES]
    problems = [problem for source in modules for problem in mutation_problems(*source)]
    assert not problems, "\n".join(problems)


def test_public_names_have_docstrings():
    problems = [problem for source in sources("gqa") for problem in docstring_problems(*source)]
    assert not problems, "\n".join(problems)


def test_files_are_found():
    names = [name for name, _ in sources("gqa")]
    assert {"gqa.errors", "gqa.command_line", "gqa.nn.__init__"} <= set(names)


def test_wrong_imports_are_seen():
    assert import_problems("gqa.nn.layers", "from gqa.errors import InputError\nfrom gqa.nn import position") == []
    assert import_problems("gqa.nn.layers", "import gqa.models.t5") == ["gqa.nn.layers imports gqa.models.t5"]
    assert import_problems("gqa.nn.layers", "from gqa import training") == ["gqa.nn.layers imports gqa.training"]
    assert import_problems("gqa.nn.layers", "from ..models import t5") == ["gqa.nn.layers imports gqa.models.t5"]
    assert import_problems("gqa.nn.__init__", "from .layers import linear") == []
    assert import_problems("gqa.decode.beam", "def f():\n    from gqa.convert import pooling") == [
        "gqa.decode.beam imports gqa.convert.pooling"
    ]
    assert import_problems("gqa.data.tasks", "import gqa.models") == ["gqa.data.tasks imports gqa.models"]
    assert import_problems("gqa.data.tasks", "import gqa.sharding") == []
    assert import_problems("gqa.__init__", "from gqa.nn import layers") == ["gqa.__init__ imports gqa.nn.layers"]
    assert import_problems("gqa.train", "import configs.quickstart") == [
        "gqa.train imports configs.quickstart, of a top-level folder"
    ]
    assert import_problems("gqa.attic.old", "") == ["gqa.attic.old: room 'attic' has no place in ROOMS"]


def test_mutating_transforms_are_seen():
    source = "from flax import nnx\nstep = nnx.jit(f)\nmodule = nnx.Module()"
    assert transform_problems("gqa.x", source) == ["gqa.x uses flax.nnx.jit"]
    assert transform_problems("gqa.x", "from flax.nnx import Optimizer") == ["gqa.x uses flax.nnx.Optimizer"]
    assert transform_problems("gqa.x", '"""No nnx.jit."""') == []


def test_mutations_are_seen():
    source = """
class Counter:
    def __init__(self):
        self.count = 0
    def __call__(self, x):
        self.count += 1
        self.seen[x] = total = x
        return self.count
"""
    assert mutation_problems("gqa.nn.x", source) == [
        "gqa.nn.x: __call__ assigns self.count",
        "gqa.nn.x: __call__ assigns self.seen[x]",
    ]


def test_missing_docstrings_are_seen():
    source = "def f(): ...\ndef _g(): ...\ndef main(): ...\nclass A:\n    x = 1\nclass B:\n    'Documented.'"
    assert docstring_problems("gqa.x", source) == [
        "gqa.x has no docstring",
        "gqa.x.f has no docstring",
        "gqa.x.A has no docstring",
    ]
    assert docstring_problems("gqa.__init__", "") == []
