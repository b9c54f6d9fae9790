"""Files of `torch.save(state_dict)`, read without torch and without running anything in them.

Since PyTorch 1.6 such a file is a zip archive (`torch_zip`) of `data.pkl`, a pickle of the dictionary; `data/0`,
`data/1`, …, the bytes of the storages that its tensors are views of; and `byteorder` (torch/serialization.py,
torch/_utils.py). A pickle is a program that may call anything, so Python's unpickler is not used: a stack machine of
our own knows the instructions that a dictionary of tensors needs, and its only calls are the few of `_CALLS`.
"""

import dataclasses
import math
import pickle
import pickletools
import struct
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from gqa.checkpoints.tensor import Tensor
from gqa.checkpoints.torch_zip import RESAVE, Entry, contents, entries, read_part, short
from gqa.errors import InputError

# Bounds on what a hostile file can make us hold or do; a tensor takes about 150 bytes and 25 instructions.
MAX_PICKLE_BYTES = 1 << 26
MAX_INSTRUCTIONS = 2_000_000
MAX_ELEMENTS = 1 << 48
MAX_AXES = 32


def open_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save(state_dict)` by name, of any type that numpy has; reads no values.

    Values that are no tensors (numbers, strings, None) are left out. Raises `InputError` for whatever is not such a
    dictionary, above all for pickles that call anything else.
    """
    files = entries(path)
    if "byteorder" in files and (order := contents(path, files["byteorder"], 100)) != b"little":
        raise InputError(f"{path} has byte order {short(order)}; expected little: {RESAVE} on another machine")
    if "data.pkl" not in files:
        raise InputError(f"{path} is a zip archive without data.pkl; expected a file of torch.save")
    values = _Machine(path, contents(path, files["data.pkl"], MAX_PICKLE_BYTES), files).run()
    if type(values) is not dict:
        raise InputError(f"{path} holds one {_kind(values)}; expected a dictionary of tensors")
    tensors = {}
    for name, value in values.items():
        if not name.isprintable() or len(name) > 1000:
            raise InputError(f"{path} has an entry named {short(name)}; expected a tensor's name")
        if isinstance(value, Tensor):
            tensors[name] = dataclasses.replace(value, name=name)
        elif value is not None and type(value) not in (bool, int, float, str):
            raise InputError(
                f"{path}: the entry {name} is a {_kind(value)}; expected tensors: save the state_dict alone"
            )
    return tensors


# The pickle.


@dataclasses.dataclass(frozen=True)
class _Global:
    """What a name in a pickle stands for: one of the calls below, or a type."""

    name: str
    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True)
class _Storage:
    entry: Entry
    dtype: np.dtype


_STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
_TYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")  # stored untyped, the type beside the view
_CALLS = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_GLOBALS = (
    {name: _Global(name, None) for name in _CALLS}
    | {f"torch.{name}Storage": _Global(name, np.dtype(dtype)) for name, dtype in _STORAGES.items()}
    | {"torch.storage.UntypedStorage": _Global("Untyped", np.dtype(np.uint8))}
    | {f"torch.{name}": _Global(name, np.dtype(getattr(ml_dtypes, name, name))) for name in _TYPES}
)
_INTEGERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H"}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_STRINGS = {pickle.BINUNICODE: "<I", pickle.SHORT_BINUNICODE: "<B"}
_PUTS, _GETS = ({pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}, {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"})


class _Machine:
    """Runs a pickle of protocol 2 to 5 as far as dictionaries of tensors need.

    Values are None, numbers, strings, tuples, dictionaries with strings as keys and the dataclasses above; nothing
    compares, hashes or prints a tuple, which may hold another many times over.
    """

    def __init__(self, path: Path, program: bytes, files: dict[str, Entry]):
        self.path, self.program, self.files = path, program, files
        self.position = 0
        self.stack: list = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, object] = {}
        self.verified: set[str] = set()  # entries whose CRC-32 was found right, of all tensors of the file

    def run(self):
        """What the pickle makes."""
        for _ in range(MAX_INSTRUCTIONS):
            instruction = self.take(1)
            if instruction == pickle.STOP:
                return self.pop()
            self.step(instruction)
        raise self.damaged(f"it has more than {MAX_INSTRUCTIONS} instructions")

    def step(self, instruction: bytes) -> None:
        """One instruction (pickletools explains them)."""
        stack = self.stack
        if instruction in _GETS:
            number = self.number(_GETS[instruction])
            if number not in self.memo:
                raise self.damaged(f"nothing was remembered as {number}")
            stack.append(self.memo[number])
        elif instruction in _PUTS or instruction == pickle.MEMOIZE:
            number = self.number(_PUTS[instruction]) if instruction in _PUTS else len(self.memo)
            self.memo[number] = self.top()
        elif instruction in _STRINGS:
            stack.append(self.text(self.take(self.number(_STRINGS[instruction]))))
        elif instruction in _INTEGERS:
            stack.append(self.number(_INTEGERS[instruction]))
        elif instruction == pickle.LONG1:
            stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))
        elif instruction == pickle.BINFLOAT:
            stack.append(self.number(">d"))
        elif instruction in _CONSTANTS:
            stack.append(_CONSTANTS[instruction])
        elif instruction == pickle.EMPTY_DICT:
            stack.append({})
        elif instruction == pickle.MARK:
            self.marks.append(len(stack))
        elif instruction in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[instruction])]
            stack.append(tuple(reversed(items)))
        elif instruction == pickle.TUPLE:
            stack.append(tuple(self.pop_to_mark()))
        elif instruction == pickle.SETITEM:
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif instruction == pickle.SETITEMS:
            self.set_items(self.pop_to_mark())
        elif instruction == pickle.GLOBAL:
            module, name = self.text(self.line()), self.text(self.line())
            stack.append(self.named(module, name))
        elif instruction == pickle.STACK_GLOBAL:
            name, module = self.pop(), self.pop()
            stack.append(self.named(module, name))
        elif instruction == pickle.BINPERSID:
            stack.append(self.storage(self.pop()))
        elif instruction == pickle.REDUCE:
            arguments, function = self.pop(), self.pop()
            stack.append(self.call(function, arguments))
        elif instruction == pickle.BUILD:
            # A state_dict's attribute _metadata, versions of its modules: nothing that we need.
            self.pop()
            self.top(dict)
        elif instruction == pickle.PROTO:
            if self.number("<B") > 5:
                raise self.damaged("its protocol is unknown")
        elif instruction == pickle.FRAME:
            self.take(8)
        else:
            opcode = pickletools.code2op.get(instruction.decode("latin-1"))
            what = opcode.name if opcode else repr(instruction)
            raise InputError(f"{self.path}: data.pkl uses {what}, which no dictionary of tensors needs; it is not read")

    def damaged(self, why: str) -> InputError:
        return InputError(f"{self.path} has a damaged data.pkl: {why}")

    def take(self, count: int) -> bytes:
        found = self.program[self.position : self.position + count]
        if len(found) < count:
            raise self.damaged("it is cut short")
        self.position += count
        return found

    def line(self) -> bytes:
        end = self.program.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise self.damaged("a name does not end")
        return self.take(end + 1 - self.position)[:-1]

    def number(self, layout: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{short(raw)} is not UTF-8") from None

    def top(self, kind: type = object):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("an instruction lacks its operands")
        if not isinstance(self.stack[-1], kind):
            raise self.damaged(f"an instruction meets a {_kind(self.stack[-1])}")
        return self.stack[-1]

    def pop(self):
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list:
        if not self.marks:
            raise self.damaged("an instruction lacks its operands")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def set_items(self, items: list) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise self.damaged("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # numbers can be chosen so that their hashes collide
                raise self.damaged(f"a {_kind(key)} is a key")
            if key in target:
                raise InputError(f"{self.path}: {short(key)} is set twice")
            target[key] = value

    def named(self, module, name) -> _Global:
        full = f"{module}.{name}" if type(module) is type(name) is str else "something without a name"
        if full not in _GLOBALS:
            raise InputError(
                f"{self.path}: data.pkl asks for {short(full)}, which is no part of tensors; it is not read"
            )
        return _GLOBALS[full]

    def storage(self, key) -> _Storage:
        """The storage of a persistent id `("storage", type, key, location, number of elements)`."""
        if type(key) is not tuple or len(key) != 5 or key[0] != "storage" or type(key[2]) is not str:
            raise self.damaged("a storage has no proper name")
        kind, name, count = key[1], key[2], key[4]
        if not isinstance(kind, _Global) or kind.dtype is None or not _integers((count,)):
            raise self.damaged(f"the storage {short(name)} has no proper type or size")
        entry = self.files.get(f"data/{name}")
        if entry is None:
            raise InputError(f"{self.path} lacks data/{short(name)}, which a tensor needs")
        if entry.size != count * kind.dtype.itemsize:
            expected = f"{short(count)} of {kind.dtype.name}"
            raise InputError(f"{self.path}: data/{short(name)} has {entry.size} bytes; expected {expected}")
        return _Storage(entry, kind.dtype)

    def call(self, function, arguments):
        """What one of `_CALLS` gives for a tuple of arguments."""
        if not isinstance(function, _Global) or function.dtype is not None or type(arguments) is not tuple:
            raise self.damaged("it calls what is no function")
        match function.name.rpartition(".")[2], arguments:
            case "OrderedDict", ():
                return {}
            case "_rebuild_tensor_v2", (_Storage() as storage, offset, shape, stride, _, _, *marks):
                return self.tensor(storage, storage.dtype, offset, shape, stride, marks)
            case "_rebuild_tensor_v3", (_Storage() as storage, offset, shape, stride, _, _, _Global() as kind, *marks):
                if kind.dtype is not None:
                    return self.tensor(storage, kind.dtype, offset, shape, stride, marks)
            case "_rebuild_parameter", (Tensor() as tensor, _, _):
                return tensor
            case "_rebuild_parameter_with_state", (Tensor() as tensor, _, _, _):
                return tensor  # the state is attributes that someone set on it
        raise self.damaged(f"it calls {function.name} with other arguments than torch.save")

    def tensor(self, storage: _Storage, dtype: np.dtype, offset, shape, stride, marks) -> Tensor:
        """A view of a storage, checked to stay within it."""
        entry = storage.entry
        if any(item is not None and item != {} for item in marks):
            raise self.damaged("a tensor is marked as negated or conjugated, so that its values are not those stored")
        if not _integers((offset,)) or not _integers(shape) or not _integers(stride) or len(shape) != len(stride):
            raise self.damaged(f"a tensor of {short(entry.name)} has no proper shape")
        available, rest = divmod(entry.size, dtype.itemsize)
        # An axis of no elements hides how large the others are.
        if rest or len(shape) > MAX_AXES or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
            raise self.damaged(f"a tensor of {short(entry.name)} has no proper shape")
        count = math.prod(shape)
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else 0
        if count > available or (count and last >= available):
            found = f"{count} elements, the last at {short(last)},"
            raise InputError(f"{self.path}: a tensor of {found} is a view of {short(entry.name)} with {available}")
        span = last + 1 - offset if count else 0
        whole = count == available and stride == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        read = partial(_read, self.path, entry, self.verified, dtype, (offset, span), shape, stride)
        return Tensor("", self.path, shape, dtype, read, entry.crc if whole else None)


def _integers(values) -> bool:
    return type(values) is tuple and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _kind(value) -> str:
    return type(value).__name__.lstrip("_").lower()


def _read(
    path: Path, entry: Entry, verified: set[str], dtype: np.dtype, place: tuple[int, int], shape, stride
) -> np.ndarray:
    """A view of the storage from `place`, the offset and span in elements from its first to its last."""
    offset, span = (number * dtype.itemsize for number in place)
    if not span:
        return np.empty(shape, dtype)
    values = read_part(path, entry, offset, span, verified).view(dtype)
    return np.lib.stride_tricks.as_strided(values, shape, [step * dtype.itemsize for step in stride])
