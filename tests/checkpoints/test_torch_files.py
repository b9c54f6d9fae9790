"""Files of torch.save: what torch wrote is read bit for bit, and nothing in a hostile file is ever run."""

import collections
import os
import pickle
import random
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from gqa.checkpoints import torch_files
from gqa.checkpoints.torch_files import open_torch
from gqa.errors import InputError


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        for tensor in open_torch(path).values():
            tensor.read()
    message = str(error.value)
    assert "\n" not in message
    return message


# A writer of such files, byte by byte, for what torch would not write.


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def integers(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def view(offset=0, shape=(4,), stride=(1,), *, key="0", kind="FloatStorage", count=4, last=b"") -> bytes:
    """Instructions that leave a tensor on the stack."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"
    arguments = b"(" + storage + integer(offset) + integers(shape) + integers(stride) + b"\x89}" + last + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def dictionary(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


FOUR = np.arange(1, 5, dtype=np.float32)


def write(path, program: bytes, storages=None, *, compression=zipfile.ZIP_STORED, extra=()) -> None:
    files = [("data.pkl", program), ("byteorder", b"little"), *extra]
    files += [(f"data/{key}", data) for key, data in ({"0": FOUR.tobytes()} if storages is None else storages).items()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files:
            archive.writestr(f"archive/{name}", data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def test_a_file_written_by_hand_is_read(path):
    write(path, dictionary(a=view(), b=view(1, (3,)), c=view(3, (), ())))
    tensors = open_torch(path)
    np.testing.assert_array_equal(tensors["a"].read(), [1, 2, 3, 4])
    np.testing.assert_array_equal(tensors["b"].read(), [2, 3, 4])
    np.testing.assert_array_equal(tensors["c"].read(), 4)
    assert tensors["a"].name == "a"
    assert tensors["a"].checksum == zlib.crc32(FOUR.tobytes())
    assert tensors["b"].checksum is tensors["c"].checksum is None


# Against torch.


def as_numpy(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_equal_files(path, expected) -> None:
    found = open_torch(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        array, theirs = tensor.read(), as_numpy(expected[name])
        assert (tensor.name, tensor.file, tensor.shape, tensor.dtype) == (name, path, theirs.shape, theirs.dtype)
        assert (array.shape, array.dtype) == (theirs.shape, theirs.dtype)
        assert array.tobytes() == theirs.tobytes()


def state_dict() -> dict:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    values = {
        "float32": torch.randn(3, 4),
        "float64": torch.randn(2, 2, 3).double(),
        "float16": torch.randn(7).half(),
        "bfloat16": torch.randn(5, 2).bfloat16(),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "shared": base,
        "rows": base[2:4],
        "columns": base[:, 3],
        "every other": base[1::2, ::3],
        "transposed": base.T,
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "repeated": torch.randn(4)[1:2].expand(3),
        "empty": torch.zeros(0, 3),
        "empty view": base[2:2],
        "scalar": torch.tensor(2.5),
        "int64": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    with_attribute = torch.nn.Parameter(torch.ones(2))
    with_attribute.note = {"a": 1}
    return values | {"with an attribute": with_attribute}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_what_torch_saves_is_read_bit_for_bit(protocol, kind, path):
    expected = kind(state_dict())
    import torch

    torch.save(expected, path, pickle_protocol=protocol)
    assert_equal_files(path, expected)


def test_types_that_torch_stores_without_a_storage_class(path):
    torch = pytest.importorskip("torch")
    values = {"uint16": torch.tensor([1, 2, 65535], dtype=torch.uint16)}
    torch.save(values | {"float8": torch.tensor([0.5, -2.0, 448.0]).to(torch.float8_e4m3fn)[1:]}, path)
    found = open_torch(path)
    np.testing.assert_array_equal(found["uint16"].read(), np.array([1, 2, 65535], np.uint16))
    np.testing.assert_array_equal(found["float8"].read(), np.array([-2, 448], ml_dtypes.float8_e4m3fn))


def test_a_module_s_state_dict_and_values_that_are_no_tensors(path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), path)
    assert_equal_files(path, module.state_dict())
    torch.save({"a": torch.ones(1), "version": 3, "name": "x", "scale": 0.5, "nothing": None, "tied": True}, path)
    assert open_torch(path).keys() == {"a"}


def test_tensors_on_another_device_s_name(path):
    torch = pytest.importorskip("torch")
    torch.save({"meta": torch.ones(2, device="meta")}, path)
    assert "torch._utils._rebuild_meta_tensor_no_storage" in refused(path)


def test_values_marked_as_conjugated_are_refused(path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.randn(2, dtype=torch.complex64).conj()}, path)
    assert "conjugated" in refused(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda torch: {"model": {"a": torch.ones(1)}}, "the entry model is a dict; expected tensors"),
        (lambda torch: {"a": (torch.ones(1),)}, "the entry a is a tuple"),
        (lambda torch: {1: torch.ones(1)}, "a int is a key"),
        (lambda torch: {"a\nb": torch.ones(1)}, "'a\\nb'"),
        (lambda torch: {"a": [torch.ones(1)]}, "EMPTY_LIST"),
        (lambda torch: torch.ones(1), "holds one tensor"),
        (lambda torch: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (lambda torch: {"a": torch.ones(1).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(make, words, path):
    torch = pytest.importorskip("torch")
    torch.save(make(torch), path)
    assert words in refused(path)


def test_the_format_before_1_6_is_refused(path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    assert "before 1.6; load it with a current PyTorch and save it again" in refused(path)


# Hostile pickles.


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile_pickles(canary) -> dict[str, bytes]:
    command = f"touch {canary}"
    quoted = repr(command).encode()
    source = f"open({str(canary)!r}, 'w')"
    system = b"cposix\nsystem\n"
    storage = b"(" + text("storage") + system + text("0") + text("cpu") + integer(4) + b"tQ"
    rebuild, arguments = b"ctorch._utils\n_rebuild_tensor_v2\n", integer(0) + integers((4,)) + integers((1,)) + b"\x89}"
    programs = {
        "os.system": pickle.dumps(Call(os.system, command), 2),
        "os.system, protocol 0": pickle.dumps(Call(os.system, command), 0),
        "os.system, protocol 4": pickle.dumps(Call(os.system, command), 4),
        "os.system in a dictionary": pickle.dumps({"a": Call(os.system, command)}, 2),
        "eval": pickle.dumps(Call(eval, source), 2),
        "exec": pickle.dumps(Call(exec, source), 4),
        "getattr": b"\x80\x02c__builtin__\ngetattr\n)R.",
        "open": pickle.dumps(Call(open, str(canary), "w"), 2),
        "codecs": b"\x80\x02c_codecs\nencode\n" + text("a") + text("utf-8") + b"\x86R.",
        "NEWOBJ": b"\x80\x02" + system + text(command) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + system + text(command) + b"\x85}\x92.",
        "NEWOBJ of ours": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "INST": b"(S" + quoted + b"\nios\nsystem\n.",
        "OBJ": b"(" + system + text(command) + b"o.",
        "EXT1": b"\x80\x02\x82\x01.",
        "BUILD with a state": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__class__") + system + b"sb.",
        "BUILD of a dictionary's methods": b"\x80\x02}}" + text("__setstate__") + system + b"sb" + text("x") + b"R.",
        "call of a text": b"\x80\x02" + text("os.system") + text(command) + b"\x85R.",
        "call of a tuple": b"\x80\x02" + text("os") + text("system") + b"\x86" + text(command) + b"\x85R.",
        "call of a type": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "call of a tensor": b"\x80\x02" + view() + b")R.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R.",
        "STACK_GLOBAL of no names": b"\x80\x04}}\x93.",
        "attribute of an allowed module": b"\x80\x04" + text("torch") + text("_utils.os.system") + b"\x93.",
        "two names in one": b"\x80\x04" + text("torch._utils._rebuild") + text("os.system") + b"\x93.",
        "a storage's type": b"\x80\x02" + rebuild + b"(" + storage + arguments + b"tR.",
        "a function as a type": b"\x80\x02"
        + rebuild
        + b"("
        + storage.replace(system, b"ccollections\nOrderedDict\n")
        + arguments
        + b"tR.",
        "a text persistent id": b"\x80\x02Pos.system\n.",
        "OrderedDict of things": b"\x80\x02ccollections\nOrderedDict\n" + text(command) + b"\x85R.",
        "numpy": pickle.dumps(np.ones(2), 2),
    }
    return programs


@pytest.mark.parametrize("name", hostile_pickles("x"))
def test_hostile_pickles_are_refused_and_do_nothing(name, path, tmp_path):
    canary = tmp_path / "canary"
    write(path, hostile_pickles(canary)[name])
    refused(path)
    assert not canary.exists()


def test_what_is_asked_for_is_named(path):
    write(path, pickle.dumps({"a": Call(os.system, "true")}, 2))
    assert "data.pkl asks for posix.system, which is no part of tensors; it is not read" in refused(path)
    write(path, b"\x80\x02cos\nsystem\x1b[2J\n.")
    assert "\x1b" not in refused(path)
    write(path, b"\x80\x02c" + b"a" * 900 + b"\nb\n.")
    assert len(refused(path)) < 300


def bombs() -> dict[str, bytes]:
    laughs = b"\x80\x02)" + b"q\x00h\x00\x86" * 5000  # a pair of the pair before twice, and so on
    collide = b"".join(integer(number * (2**61 - 1)) + b"N" for number in range(1, 5000))
    return {
        "a memo's missing number": b"\x80\x02j" + struct.pack("<I", 2**32 - 1) + b".",
        "laughs": laughs + b".",
        "laughs as a key": b"\x80\x02}" + laughs[2:] + b"Ns.",
        "laughs as a value": b"\x80\x02}" + text("a") + laughs[2:] + b"s.",
        "laughs as a storage": laughs + b"Q.",
        "laughs as arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + laughs[2:] + b"R.",
        "a large memo": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"N.",
        "depth": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        "dictionaries in themselves": b"\x80\x02}q\x00" + text("a") + b"h\x00s.",
        "a long text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
        "a longer text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"a.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
        "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
        "keys that collide": b"\x80\x02}(" + collide + b"u.",
        "no end": b"\x80\x02}" + text("a") + b"N" * 1000,
        "many instructions": b"\x80\x02" + b"N" * 2_100_000 + b".",
        "no mark": b"\x80\x02Nt.",
        "below the mark": b"\x80\x02N(\x85.",
        "a key alone": b"\x80\x02}(" + text("a") + b"u.",
        "no text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        "protocol 9": b"\x80\x09}.",
        "nothing": b"",
        "a name without an end": b"\x80\x02c" + b"a" * 5000,
    }


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused(name, path):
    write(path, bombs()[name])
    refused(path)


def test_a_large_data_pkl_is_refused(path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 100)
    write(path, dictionary(a=view()))
    assert "expected at most 100" in refused(path)


# Views.


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (view(1), "4 elements, the last at 4, is a view of archive/data/0 with 4"),
        (view(2**61), "the last at"),
        (view(shape=(2, 3), stride=(3, 1)), "6 elements"),
        (view(shape=(2,), stride=(4,)), "the last at 4"),
        (view(shape=(100,), stride=(0,)), "100 elements"),  # as torch.expand makes them
        (view(shape=(2**40,), stride=(0,)), "elements"),
        (view(shape=(2**61, 2**61), stride=(0, 0)), "no proper shape"),
        (view(shape=(0, 2**61), stride=(0, 0)), "no proper shape"),
        (view(shape=(1,) * 40, stride=(1,) * 40), "no proper shape"),
        (view(3, shape=(4,), stride=(-1,)), "no proper shape"),
        (view(-1), "no proper shape"),
        (view(shape=(-4,)), "no proper shape"),
        (view(shape=(2, 2)), "no proper shape"),
        (view(shape=(2**500,)), "no proper shape"),
        (view(count=5), "data/0 has 16 bytes; expected 5 of float32"),
        (view(count=2**200), "no proper type or size"),
        (view(key="1"), "lacks data/1"),
        (view(key="../data.pkl"), "lacks data/../data.pkl"),
        (view(kind="QInt8Storage"), "torch.QInt8Storage"),
        (view(kind="uint16"), "has 16 bytes"),
        (view(last=b"}" + text("neg") + b"\x88s"), "negated"),
    ],
)
def test_views_that_leave_their_storage_are_refused(program, words, path):
    write(path, dictionary(a=program))
    assert words in refused(path)


def test_a_name_set_twice_is_refused(path):
    write(path, b"\x80\x02}(" + text("a") + view() + text("a") + view() + b"u.")
    assert "a is set twice" in refused(path)


# Damaged archives.


def test_archives_that_are_no_file_of_torch_are_refused(path):
    path.write_bytes(b"")
    assert "no file of torch.save" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "no file of torch.save" in refused(path)
    assert "No such file" in refused(path.with_name("other"))
    assert "no regular file" in refused(path.parent)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"a" * 100)
    assert "without data.pkl" in refused(path)
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path)


def test_pipes_are_not_waited_for(path):
    os.mkfifo(path)
    assert "no regular file" in refused(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_archives_are_refused(compression, path):
    write(path, dictionary(a=view()), compression=compression)
    assert "is compressed or encrypted" in refused(path)


def test_archives_with_other_contents_are_refused(path):
    write(path, dictionary(a=view()), extra=[("byteorder2", b"")])
    assert open_torch(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        write(path, dictionary(a=view()), extra=[("data.pkl", b"\x80\x02}.")])
    assert "data.pkl twice" in refused(path)
    with pytest.warns(UserWarning, match="Duplicate"):
        write(path, dictionary(a=view()), extra=[("byteorder", b"big")])
    assert "byteorder twice" in refused(path)
    write(path, dictionary(a=view()), extra=[("../other/data.pkl", b"\x80\x02}.")])
    assert open_torch(path).keys() == {"a"}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("second/data.pkl", b"\x80\x02}.")
    assert "data.pkl twice" in refused(path)


def test_big_endian_files_are_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dictionary(a=view()))
        archive.writestr("archive/data/0", FOUR.tobytes())
        archive.writestr("archive/byteorder", b"big")
    assert "byte order b'big'; expected little" in refused(path)


def test_entries_that_overlap_or_lie_are_refused(path):
    write(path, dictionary(a=view(), b=view(key="1")), {"0": FOUR.tobytes(), "1": FOUR.tobytes()})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    place = data.rindex(struct.pack("<I", offsets["archive/data/1"]) + b"archive/data/1")
    changed = data.copy()
    changed[place : place + 4] = struct.pack("<I", offsets["archive/data/0"])
    path.write_bytes(changed)
    assert "not where the directory says" in refused(path)
    changed[place + 4 : place + 18] = b"archive/data/0"
    path.write_bytes(changed)
    assert "overlaps another" in refused(path)
    changed = data.copy()
    first = data.rindex(struct.pack("<I", offsets["archive/data/0"]) + b"archive/data/0")
    for field in (20, 24):  # its two sizes: it would run into the next entry
        changed[first - 42 + field : first - 42 + field + 4] = struct.pack("<I", 60)
    path.write_bytes(changed)
    assert "overlaps another" in refused(path)


def test_zip64_is_read(path, monkeypatch):
    """The sizes and places as in a file of more than 4 GB."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 8)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", dictionary(a=view())), ("data/0", FOUR.tobytes())):
            with archive.open(f"archive/{name}", "w", force_zip64=True) as file:
                file.write(data)
    assert b"PK\6\6" in path.read_bytes()
    assert b"\xff" * 8 + b"\x0e\x00" in path.read_bytes()  # both sizes elsewhere, before the length of a name
    np.testing.assert_array_equal(open_torch(path)["a"].read(), FOUR)


def small_file(path) -> dict[str, bytes]:
    storages = {"0": FOUR.tobytes(), "1": (FOUR + 1).tobytes()}
    write(path, dictionary(a=view(), b=view(0, (2, 2), (1, 2), key="1"), c=view(1, (2,), key="1")), storages)
    return {name: tensor.read().tobytes() for name, tensor in open_torch(path).items()}


def saved_by_torch(path) -> dict[str, bytes]:
    torch = pytest.importorskip("torch")
    base = torch.randn(2, 3)
    torch.save({"a": base, "b": base[1], "c": torch.randn(4).bfloat16()}, path)
    return {name: tensor.read().tobytes() for name, tensor in open_torch(path).items()}


@pytest.mark.parametrize("make", [small_file, saved_by_torch])
def test_files_cut_short_anywhere_are_refused(make, path):
    make(path)
    data = path.read_bytes()
    for size in [*range(0, len(data), 7), *range(len(data) - 100, len(data))]:
        path.write_bytes(data[:size])
        refused(path)


@pytest.mark.parametrize("make", [small_file, saved_by_torch])
def test_flipped_bits_are_found_or_change_nothing(make, path):
    """Most of what is not found lies in the padding and the headers' dates."""
    expected = make(path)
    data, rng = path.read_bytes(), random.Random(0)
    found = 0
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            assert {name: tensor.read().tobytes() for name, tensor in open_torch(path).items()} == expected
        except InputError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > 20


@pytest.mark.parametrize("make", [small_file, saved_by_torch])
def test_each_flipped_bit_of_the_values_is_found(make, path):
    make(path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        values = {name: archive.read(name) for name in names}
    for value in values.values():
        for place in range(len(value)):
            changed = bytearray(data)
            changed[data.index(value) + place] ^= 16
            path.write_bytes(changed)
            assert "is damaged" in refused(path)


def test_a_part_of_a_storage_is_checked_with_the_whole(path):
    write(path, dictionary(a=view(1, (2,))))
    data = bytearray(path.read_bytes())
    data[data.index(FOUR.tobytes())] ^= 1  # outside the part
    path.write_bytes(data)
    assert "is damaged: archive/data/0 has CRC-32" in refused(path)


def test_pickles_changed_at_random_are_refused_or_harmless(path):
    """Whatever the program says, with a right CRC-32: our error or a dictionary of tensors."""
    program, rng = dictionary(a=view(), b=view(0, (2, 2), (1, 2))), random.Random(0)
    for _ in range(1500):
        changed = bytearray(program)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        write(path, bytes(changed))
        try:
            for tensor in open_torch(path).values():
                assert tensor.read().shape == tensor.shape
        except InputError as error:
            assert "\n" not in str(error)
