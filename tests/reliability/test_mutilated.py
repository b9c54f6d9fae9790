"""Mutilated checkpoints of every format are refused in one line, or read exactly as the format's own reader reads them.

Case N is a function of N alone: the format, what is done to it and where. A case goes through
`checkpoints_tools.convert` with as many heads as there are, so that what comes out is what went in.
"""

import json
import random
import shutil
import signal
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

from checkpoints_tools import convert  # noqa: F401  imported before memory is measured
from gqa import checkpoints, models
from gqa.checkpoints import hf, writer

torch = pytest.importorskip("torch")

CASES, SHORT = 200, 30
RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
SMALL = dict(vocab_size=24, d_model=16, num_heads=4, head_dim=4, d_ff=56)
LLAMA = models.replace(models.size("llama_mini"), **SMALL, num_layers=2, decoder_self_kv_heads=4)
T5 = models.replace(models.size("t5_1_1_mini"), **SMALL, num_encoder_layers=2, num_decoder_layers=2)
T5_PER_LAYER = models.replace(T5, relative_bias_per_layer=True)
SLACK_BYTES = 1 << 23  # Python's objects, whatever the checkpoint
DEADLINE = 120  # seconds, of cases that take less than one

# What a key or a size may become.
VALUES = [0, -1, 1, 2, 3, 2**31, 10**12, 10**30, 0.5, -0.5, float("nan"), float("inf"), None, True, "", "relu", [], {}]
VALUES += [[4], [4, 2], [4, "a"], {"a": 1}, "\x00", "../x", "a\nb"]
NAMES = ["..", "../model", "a/../b", "", "x", "model.layers.7.mlp.up_proj.weight", "a" * 300, "é\n\x00", "__metadata__"]


# Sources.


@pytest.fixture(scope="module")
def sources(tmp_path_factory, random_model, save_as_meta, write_t5x):
    """Name -> a checkpoint of that form, not to be changed."""
    root = tmp_path_factory.mktemp("sources")
    llama, t5 = random_model(LLAMA), random_model(T5)

    def plain(model, name: str, dtype: str = "float32") -> Path:
        hf.save(model, root / name, dtype=dtype)
        (root / name / writer.SUMS).unlink()
        return root / name

    def as_bin(source: Path, name: str, files: int) -> None:
        (root / name).mkdir()
        shutil.copy(source / "config.json", root / name)
        tensors = {key: torch.from_numpy(value) for key, value in load_file(source / "model.safetensors").items()}
        names = [f"pytorch_model-{i + 1:05}-of-{files:05}.bin" for i in range(files)]
        parts = [dict(list(tensors.items())[i::files]) for i in range(files)]
        if files == 1:
            names = ["pytorch_model.bin"]
        else:
            weight_map = {key: file for file, part in zip(names, parts, strict=True) for key in part}
            (root / name / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, part in zip(names, parts, strict=True):
            torch.save(part, root / name / file)

    def sharded(source: Path, name: str) -> None:
        (root / name).mkdir()
        shutil.copy(source / "config.json", root / name)
        tensors = load_file(source / "model.safetensors")
        files = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
        weight_map = {key: files[i % 3] for i, key in enumerate(tensors)}
        for file in files:
            save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, root / name / file)
        (root / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    plain(llama, "safetensors")
    plain(t5, "safetensors of T5", "bfloat16")
    sharded(plain(llama, "to shard"), "sharded safetensors")
    as_bin(root / "safetensors", "bin", 1)
    as_bin(plain(t5, "to pickle"), "sharded bin", 2)
    save_as_meta(root / "safetensors", root / "meta", 2)
    arrays = dict(hf.named_tensors(t5))
    write_t5x(root / "T5X", {name: arrays[name] for name in hf.table(T5)})
    arrays = dict(hf.named_tensors(random_model(T5_PER_LAYER)))
    write_t5x(
        root / "scanned T5X",
        {name: arrays[name] for name in hf.table(T5_PER_LAYER)},
        scanned=True,
        head_dim=4,
        compressor="zstd",
        dtype="bfloat16",
        layer_chunk=1,
    )
    hf.save(llama, root / "ours", dtype="float32")
    return {name: root / name for name in FORMS}


# The readers of the formats' own libraries.


def read_hf(folder: Path) -> dict[str, np.ndarray]:
    for suffix, read in ((".safetensors", load_file), (".bin", load_torch)):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        if (folder / f"{stem}{suffix}").is_file():
            return read(folder / f"{stem}{suffix}")
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {file: read(folder / file) for file in set(weight_map.values())}
            return {name: files[file][name] for name, file in weight_map.items()}
    raise FileNotFoundError(folder)


def load_torch(path: Path) -> dict[str, np.ndarray]:
    tensors = torch.load(path, weights_only=True)
    return {name: as_numpy(tensor) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def as_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


COLUMNS = ("wo", "w2", "tok_embeddings")  # Meta's matrices whose parts are columns


def read_meta(folder: Path) -> dict[str, np.ndarray]:
    files = [load_torch(path) for path in sorted(folder.glob("consolidated.*.pth"))]
    tensors = {}
    for name, first in files[0].items():
        parts = [file[name] for file in files]
        if "norm" in name:
            assert all(part.tobytes() == first.tobytes() for part in parts)
            tensors[name] = first
        elif first.ndim == 2:
            tensors[name] = np.concatenate(parts, int(name.split(".")[-2] in COLUMNS))
    return tensors


def read_t5x(folder: Path) -> dict[str, np.ndarray]:
    tree = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())

    def leaves(prefix: str, tree: dict):
        for key, value in tree.items():
            if isinstance(value, dict) and "driver" in value:
                path = str(folder / ("target." + (prefix + key).replace("/", ".")))
                spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}
                yield prefix + key, tensorstore.open(spec, open=True).result().read().result()
            elif isinstance(value, dict):
                yield from leaves(f"{prefix}{key}/", value)
            else:
                yield prefix + key, value

    return dict(leaves("", tree["optimizer"]["target"]))


FORMS = {
    "safetensors": read_hf,
    "safetensors of T5": read_hf,
    "sharded safetensors": read_hf,
    "bin": read_hf,
    "sharded bin": read_hf,
    "meta": read_meta,
    "T5X": read_t5x,
    "scanned T5X": read_t5x,
    "ours": read_hf,
}


# What is done to them; each returns what it did, for the message of a failure.


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(rng: random.Random, folder: Path) -> str:
    path = rng.choice([path for path in files_of(folder) if path.stat().st_size])
    raw = bytearray(path.read_bytes())
    place = rng.choice([rng.randrange(len(raw)), rng.randrange(min(len(raw), 1000))])
    raw[place] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return f"{path.name}: a bit of byte {place} flipped"


def cut(rng: random.Random, folder: Path) -> str:
    path = rng.choice(files_of(folder))
    size = path.stat().st_size
    new_size = rng.choice([rng.randint(0, size), max(size - rng.randint(1, 16), 0), 0])
    path.write_bytes(path.read_bytes()[:new_size])
    return f"{path.name}: {new_size} of {size} bytes left"


def lengthen(rng: random.Random, folder: Path) -> str:
    path = rng.choice(files_of(folder))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 4, 8, 1000])))
    return f"{path.name}: lengthened"


def rename_file(rng: random.Random, folder: Path) -> str:
    path = rng.choice(files_of(folder))
    name = rng.choice([path.name + "x", path.name[:-1] or "x", "model.safetensors", "0.7", "consolidated.07.pth"])
    path.rename(path.with_name(name))
    return f"{path.name} -> {name}"


def delete_file(rng: random.Random, folder: Path) -> str:
    path = rng.choice(files_of(folder))
    path.unlink()
    return f"{path.name} deleted"


def copy_over(rng: random.Random, folder: Path) -> str:
    """One file gets another's bytes, preferably of the same kind: tensors twice, chunks in the wrong place."""
    one = rng.choice(files_of(folder))
    alike = [path for path in files_of(folder) if path.suffix == one.suffix and path != one]
    other = rng.choice(alike or files_of(folder))
    one.write_bytes(other.read_bytes())
    return f"{one.relative_to(folder)} is now {other.relative_to(folder)}"


def change_json(rng: random.Random, folder: Path) -> str:
    """A key of a configuration, index or header of zarr."""
    path = rng.choice([path for path in files_of(folder) if path.suffix == ".json" or path.name == ".zarray"])
    raw = json.loads(path.read_text())
    where = raw
    while (inner := [value for value in where.values() if isinstance(value, dict) and value]) and rng.random() < 0.7:
        where = rng.choice(inner)
    key = rng.choice([*where, rng.choice(NAMES)])
    if key in where and rng.random() < 0.2:
        del where[key]
        what = f"{key} removed"
    elif rng.random() < 0.2:
        text = json.dumps(raw)
        path.write_text(text[:1] + f'"{next(iter(raw))}": 1, ' + text[1:])
        return f"{path.name}: the first key twice"
    else:
        others = [value for value in where.values() if isinstance(value, str)]
        old = where.get(key)
        close = [old + 1, old * 2, old - 1] if type(old) is int else [[*old, 1], old[1:]] if type(old) is list else []
        where[key] = rng.choice([rng.choice(VALUES), *close, *others[:1]])
        what = f"{key}={where[key]!r} instead of {old!r}"
    path.write_text(json.dumps(raw))
    return f"{path.name}: {what}"


def change_tree(rng: random.Random, tree: dict, changes: list[Callable]) -> str:
    """A leaf of a dictionary of tensors: away, under another name, twice, or changed by one of `changes`."""
    key = rng.choice(list(tree))
    action = rng.choice(["away", "renamed", "twice", *changes])
    if callable(action):
        tree[key] = action(rng, tree[key])
        return f"{key}: {action.__name__}"
    name = rng.choice([*NAMES, *tree, key + "x"])
    value = tree[key] if action == "twice" else tree.pop(key)
    if action != "away":
        tree[name] = value
    return f"{key} {action} {name if action != 'away' else ''}"


def change_header(rng: random.Random, folder: Path) -> str:
    """The header of a safetensors file."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.15:
        length = rng.choice([0, size - 1, size + 1, len(raw) - 8, len(raw), 10**8, 2**40, 2**63, 2**64 - 1])
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
        return f"{path.name}: header of {length} bytes"
    header = json.loads(raw[8 : 8 + size])

    def shape(rng, entry):
        shapes = [entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][1:], [], [2**40, 2**40], [0], [-1, 16]]
        return entry | {"shape": rng.choice(shapes)}

    def dtype(rng, entry):
        return entry | {"dtype": rng.choice(["F16", "BF16", "F32", "F64", "I32", "X", 3, None, ["F32"]])}

    def offsets(rng, entry):
        begin, end = entry["data_offsets"]
        size = end - begin
        other = [(0, size), (begin + 4, end + 4), (end, begin), (begin, 2**62), (-4, size - 4), (begin,)]
        return entry | {"data_offsets": rng.choice(other)}

    header.pop("__metadata__", None)
    what = change_tree(rng, header, [shape, dtype, offsets])
    text = json.dumps(header).encode()
    if rng.random() < 0.15:
        text = text[:1] + json.dumps(next(iter(header))).encode() + b": " + json.dumps({}).encode() + b", " + text[1:]
        what += ", and the first key twice"
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    return f"{path.name}: {what}"


def change_pickle(rng: random.Random, folder: Path) -> str:
    """The dictionary in a file of torch.save, written again with torch.save."""
    path = rng.choice(sorted([*folder.glob("*.bin"), *folder.glob("*.pth")]))
    tensors = torch.load(path, weights_only=True)

    def shape(rng, tensor):
        return rng.choice([tensor.reshape(-1), tensor[1:], tensor[None], tensor.T if tensor.ndim == 2 else tensor[:0]])

    def dtype(rng, tensor):
        return tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.complex64]))

    def value(rng, tensor):
        return rng.choice([tensor * float("nan"), tensor * 1e30, 3, "text", None, [tensor], {"a": tensor}])

    def view(rng, tensor):
        return tensor.flatten().expand(3, -1)[0][: tensor.numel()].view(tensor.shape)

    what = change_tree(rng, tensors, [shape, dtype, value, view])
    torch.save(tensors, path)
    return f"{path.name}: {what}"


def change_msgpack(rng: random.Random, folder: Path) -> str:
    """The tree in T5X's file, whose arrays stay bytes."""
    path = folder / "checkpoint"
    tree = msgpack.unpackb(path.read_bytes())
    where = tree["optimizer"]["target"]
    while (inner := [v for v in where.values() if isinstance(v, dict) and "driver" not in v]) and rng.random() < 0.9:
        where = rng.choice(inner)

    def spec(rng, leaf):
        if not isinstance(leaf, dict):
            return rng.choice(VALUES[:4])
        changes = [{"driver": "n5"}, {"dtype": "float16"}, {"metadata": {"shape": [3, 10**12]}}]
        changes += [{"kvstore": {"driver": "file", "path": "/etc/"}}, {"path": "../../x"}, {"metadata": 3}]
        return leaf | rng.choice(changes)

    def array(rng, leaf):
        shape = rng.choice([[16], [10**12], [-1], [4, 4], []])
        values = rng.randbytes(rng.choice([64, 0, 4]))
        dtype = rng.choice(["float32", "bfloat16", "object", "int8", ["float32"]])
        return msgpack.ExtType(1, msgpack.packb((shape, dtype, values)))

    what = change_tree(rng, where, [spec, array])
    path.write_bytes(msgpack.packb(tree))
    return f"checkpoint: {what}"


ANYWHERE = [flip, flip, cut, lengthen, rename_file, delete_file, copy_over]
OF_FORM = {
    read_hf: {"bin": [change_pickle, change_json], "safetensors": [change_header, change_header, change_json]},
    read_meta: {"": [change_pickle, change_json]},
    read_t5x: {"": [change_msgpack, change_json]},
}


def mutilations(form: str) -> list[Callable]:
    of_form = OF_FORM[FORMS[form]]
    own = next((found for word, found in of_form.items() if word in form), of_form.get("safetensors"))
    return ANYWHERE + own + own


# The property.


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}


@pytest.fixture
def deadline():
    """Interrupts what hangs."""

    def late(*_):
        raise AssertionError(f"not done after {DEADLINE} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def assert_same_tensors(folder: Path, theirs: dict[str, np.ndarray], output: Path) -> None:
    """What we read of `folder` is `theirs`, and `output` has nothing else."""
    contents = checkpoints.read(folder, **RUN)
    names = {row.path: (name, row.transform) for name, row in hf.table(contents.config).items()}
    written = load_file(output / "model.safetensors")
    assert written.keys() == {name for name, _ in names.values()} == {names[path][0] for path in contents.tensors}
    for path, (tensor, transform) in contents.tensors.items():
        found, expected = tensor.read(), theirs[tensor.name]
        if "coder/" in tensor.name[7:]:  # T5X's scanned layers
            expected = expected[:, int(path.split(".")[1])]
        expected = np.ascontiguousarray(expected).reshape(tensor.shape)
        assert found.dtype == expected.dtype and found.shape == tensor.shape
        assert found.tobytes() == expected.tobytes(), tensor.name
        name, written_transform = names[path]
        ours = transform.to_ours(expected, shapes_of(contents.config)[path])
        result = written[name]
        assert (
            result.tobytes() == np.ascontiguousarray(written_transform.to_theirs(ours).astype(result.dtype)).tobytes()
        )


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    from gqa.checkpoints.table import parameters

    return {path: each.layer_shape for each in parameters(models.abstract(config)) for path in each.paths}


@pytest.mark.parametrize("number", [n if n < SHORT else pytest.param(n, marks=pytest.mark.full) for n in range(CASES)])
@pytest.mark.usefixtures("deadline")
def test_refused_or_read_as_the_formats_own_reader_does(number, sources, tmp_path, call, capsys):
    rng = random.Random(number)
    form = list(FORMS)[number % len(FORMS)]
    folder, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(sources[form], folder)
    mutilation = rng.choice(mutilations(form))
    what = f"{form}, {mutilation(rng, folder)}"
    before = contents_of(folder)
    try:
        theirs = FORMS[form](folder)
    except Exception:  # each library has its own
        theirs = None
    tracemalloc.start()
    try:
        code = call("convert", f"--source={folder}", f"--output={output}", "--kv_heads=4", "--method=mean")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    errors = capsys.readouterr().err
    assert contents_of(folder) == before, what
    assert peak < 2 * sum(map(len, before.values())) + SLACK_BYTES, what
    lines = errors.splitlines()
    if code == 2:
        assert [line for line in lines if not line.startswith("warning: ")] == lines[-1:], what
        assert lines[-1].startswith("error: "), what
        assert [path.name for path in tmp_path.iterdir()] == ["source"], what
    else:
        assert code == 0, what
        sums_present = form == "ours" and mutilation is flip and "SHA256SUMS" not in what
        assert not sums_present, what
        # Damage that its own reader does not bear and ours does is in what says nothing of the values.
        assert_same_tensors(folder, theirs if theirs is not None else FORMS[form](sources[form]), output)
