"""What may befall a checkpoint's files: each function does one thing to a folder, drawn from `rng`, and says what."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import msgpack

# What a key or a size may become.
VALUES = [0, -1, 1, 2, 3, 2**31, 10**12, 10**30, 0.5, -0.5, float("nan"), float("inf"), None, True, "", "relu", [], {}]
VALUES += [[4], [4, 2], [4, "a"], {"a": 1}, "\x00", "../x", "a\nb"]
NAMES = ["..", "../model", "a/../b", "", "x", "model.layers.7.mlp.up_proj.weight", "a" * 300, "é\n\x00", "__metadata__"]


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
    import torch

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
SAFETENSORS = [*ANYWHERE, *2 * [change_header, change_header, change_json]]
PICKLES = [*ANYWHERE, *2 * [change_pickle, change_json]]
T5X = [*ANYWHERE, *2 * [change_msgpack, change_json]]
