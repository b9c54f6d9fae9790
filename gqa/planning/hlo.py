"""What a compiled program moves: collectives and memory traffic, read off XLA's text with loops counted.

XLA's own `cost_analysis` counts the body of a scan once. Here every instruction counts as often as the loops around it
run: from a loop's known trip count where XLA notes it (CPU, GPU), else from the comparison in its condition (TPU).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
# Nothing of these is read or written by themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "opt-barrier", "async-start", "async-update", "iota", "add-dependency"),
}
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
_TILES = re.compile(r"\{([0-9,]+):T\(([0-9,]+)\)")  # dimensions from the innermost out, and the tile of the innermost
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_NAME = re.compile(r"%?([\w.\-]+)$")


class Array(NamedTuple):
    """An array of an instruction's shape."""

    bytes: int
    stored: int  # bytes with the padding of its layout's tiles, which moves with it: 128 numbers where 64 are innermost
    in_memory: bool  # in the device's main memory, not in memory on the chip


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # the text between the parentheses: a constant's value, a parameter's number
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)


class Collective(NamedTuple):
    """A collective, counted over all runs of the loops around it."""

    kind: str
    group: int  # devices that take part together
    count: int
    sent: int  # bytes that each device sends, by the ring algorithm, over all runs


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program of one device."""

    computations: dict[str, dict[str, Instruction]]  # in order; the last instruction is the root
    entry: str
    num_partitions: int

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """`(computation, instruction, runs)` of the entry and of all loops; what is inside fusions is left out."""
        return self._walk(self.entry, 1)

    def _walk(self, name: str, runs: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in self.computations[name].values():
            yield name, instruction, runs
            if instruction.opcode == "while":
                trips = trip_count(self, name, instruction)
                yield from self._walk(_called(instruction, "body"), runs * (1 if trips is None else trips))
            elif instruction.opcode in ("call", "async-start"):
                yield from self._walk(_called(instruction, "to_apply") or _called(instruction, "calls"), runs)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._walk(branch, runs)

    def instruction(self, computation: str, name: str) -> Instruction | None:
        return self.computations[computation].get(name)


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is not None and line.startswith("  "):
            instruction = _parse_line(line)
            if instruction:
                current[instruction.name] = instruction
        elif match := _HEADER.match(line):
            current = computations.setdefault(match[2], {})
            if match[1]:
                entry = match[2]
        elif line.startswith("}"):
            current = None
    partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_line(line: str) -> Instruction | None:
    name, separator, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not separator:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    close = _closing(rest, start)
    arguments = rest[start + 1 : close]
    operands = tuple(match[1] for part in _split(arguments) if (match := _NAME.search(part.strip())))
    return Instruction(name.removeprefix("%"), shape, rest[:start], operands, arguments, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text)


def _split(arguments: str) -> Iterator[str]:
    """Arguments at the commas that no bracket encloses."""
    depth, first = 0, 0
    for i, character in enumerate(arguments):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield arguments[first:i]
            first = i + 1
    yield arguments[first:]


@functools.lru_cache(maxsize=100_000)
def arrays(shape: str) -> list[Array]:
    """The arrays of a shape such as `(bf16[8,128]{1,0:T(8,128)S(1)}, u32[])`."""
    found = []
    for kind, dimensions, layout in _ARRAY.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            digits = re.search(r"\d+", kind)
            bits = int(digits[0]) if digits else 8
        sizes = [int(d) for d in dimensions.split(",") if d]
        size = math.prod(sizes) * bits // 8
        if tiles := _TILES.match(layout):
            order, tile = ([int(number) for number in numbers.split(",")] for numbers in tiles.groups())
            for dimension, of_tile in zip(order, reversed(tile), strict=False):
                sizes[dimension] = -(-sizes[dimension] // of_tile) * of_tile
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(size, math.prod(sizes) * bits // 8, space is None or space[1] == "0"))
    return found


def _called(instruction: Instruction, key: str) -> str | None:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else None


def _branches(instruction: Instruction) -> list[str]:
    match = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if match:
        return [name.strip().removeprefix("%") for name in match[1].split(",")]
    return [_called(instruction, "true_computation"), _called(instruction, "false_computation")]


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often a `while` runs its body; `None` where the program does not say, as with a loop that may end early."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = program.computations[_called(loop, "condition")]
    initial = program.instruction(computation, loop.operands[0])
    start = lambda index: _constant_of(program, computation, initial.operands[index])  # noqa: E731
    if initial is None or initial.opcode != "tuple":
        return None
    root = list(condition.values())[-1]
    bound = _comparison(program, condition, root)
    if bound is None:
        return None
    index, limit, inclusive = bound
    if isinstance(limit, _Element):
        limit = start(limit.index)
    if limit is None:
        return None
    first = start(index) or 0
    step = _step(program, _called(loop, "body"), index)
    return max(0, math.ceil((limit + inclusive - first) / step))


class _Element(NamedTuple):
    """An element of the loop's state."""

    index: int


def _comparison(program: Program, condition, root: Instruction) -> tuple[int, "int | _Element", int] | None:
    """`(element, limit, whether equality goes on)` of `element < limit`."""
    operands = [_value(condition, name) for name in root.operands]
    if root.opcode == "fusion":
        inner = program.computations[_called(root, "calls")]
        root, outer = list(inner.values())[-1], operands
        operands = []
        for name in root.operands:
            value = _value(inner, name)
            number = re.match(r"parameter:(\d+)", value) if isinstance(value, str) else None
            operands.append(outer[int(number[1])] if number else value)
    direction = re.search(r"direction=(\w\w)", root.attributes)
    if root.opcode != "compare" or not direction or len(operands) != 2:
        return None
    left, right = operands
    if direction[1] in ("GT", "GE"):
        left, right = right, left
    if direction[1] not in ("LT", "LE", "GT", "GE") or not isinstance(left, _Element) or isinstance(right, str):
        return None
    return None if right is None else (left.index, right, direction[1] in ("LE", "GE"))


def _value(computation, name: str) -> "int | _Element | str | None":
    instruction = computation.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    if instruction.opcode == "parameter":
        return f"parameter:{instruction.arguments}"
    if instruction.opcode == "get-tuple-element":
        return _Element(int(re.search(r"index=(\d+)", instruction.attributes)[1]))
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return _value(computation, instruction.operands[0])
    return None


def _constant_of(program: Program, computation: str, name: str) -> int | None:
    value = _value(program.computations[computation], name)
    return value if isinstance(value, int) else None


def _step(program: Program, body: str, index: int) -> int:
    """What a loop adds to its counter, 1 unless its body shows another constant."""
    computation = program.computations[body]
    root = list(computation.values())[-1]
    counter = computation.get(root.operands[index]) if root.opcode == "tuple" else None
    if counter is not None and counter.opcode == "add":
        values = [_value(computation, name) for name in counter.operands]
        steps = [value for value in values if isinstance(value, int) and value > 0]
        if len(steps) == 1:
            return steps[0]
    return 1


def turn(program: Program) -> Program:
    """One turn of the outermost loop whose length is decided while it runs: its body is the entry.

    Raises ValueError where there is none.
    """
    for name, instruction, _ in program.instructions():
        if instruction.opcode == "while" and trip_count(program, name, instruction) is None:
            return dataclasses.replace(program, entry=_called(instruction, "body"))
    raise ValueError("the program has no loop of unknown length")


def collectives(program: Program) -> list[Collective]:
    """All collectives, those of the same kind and group as one."""
    total: dict[tuple[str, int], list[int]] = {}
    for _, instruction, runs in _with_fusions(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        group = 2 if kind == "collective-permute" else _group_size(instruction, program.num_partitions)
        if group == 1:
            continue
        entry = total.setdefault((kind, group), [0, 0])
        entry[0] += runs
        entry[1] += runs * _sent(kind, group, instruction)
    return [Collective(kind, group, count, sent) for (kind, group), (count, sent) in sorted(total.items())]


def _with_fusions(program: Program) -> Iterator[tuple[str, Instruction, int]]:
    for name, instruction, runs in program.instructions():
        yield name, instruction, runs
        if instruction.opcode == "fusion":  # TPUs fuse collectives with what they overlap with
            inner = program.computations[_called(instruction, "calls")]
            yield from ((name, each, runs) for each in inner.values())


def _sent(kind: str, group: int, instruction: Instruction) -> int:
    sizes = [array.bytes for array in instruction.arrays]
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # (operands, results, …): the results of a gather are the larger half, a permute's are like its operand.
        size = sum(sizes[len(instruction.operands) : 2 * len(instruction.operands)])
    else:
        size = sum(sizes)
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    # Of the result's bytes: a reduce-scatter's is one part of `group`.
    return round(size * {"all-reduce": 2 * share, "reduce-scatter": share * group}.get(kind, share))


def _group_size(instruction: Instruction, num_partitions: int) -> int:
    text = instruction.attributes
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", text):
        return len(match[1].split(","))
    return num_partitions


def memory_traffic(program: Program) -> int:
    """Bytes read from and written to the device's memory; arrays that stay on the chip cost nothing.

    A fusion reads each operand and writes its result once; of an operand that it only slices, and of one that it
    updates in place, it touches the slice.
    """
    return sum(runs * _touched(program, name, each) for name, each, runs in program.instructions())


def _touched(program: Program, computation: str, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    results = instruction.arrays
    if opcode in ("copy-start", "slice-start"):
        moved = min(array.stored for array in results[:2]) if opcode == "slice-start" else results[0].stored
        return moved * sum(array.in_memory for array in results[:2])
    written = sum(array.stored for array in results if array.in_memory)
    operands = [program.instruction(computation, name) for name in instruction.operands]
    if opcode == "dynamic-slice":
        return written + (results[0].stored if operands[0].arrays[0].in_memory else 0)
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].arrays[0].stored if results[0].in_memory else 0
    read = [sum(array.stored for array in each.arrays if array.in_memory) if each else 0 for each in operands]
    if opcode == "fusion":
        inner = program.computations[_called(instruction, "calls")]
        touched = [_read_of_parameter(program, inner, i) for i in range(len(read))]
        read = [size if part is None else min(size, part) for size, part in zip(read, touched, strict=True)]
        in_place = _written_in_place(inner)
        written = written if in_place is None else min(written, in_place)
    return written + sum(read)


def _read_of_parameter(program: Program, inner, number: int) -> int | None:
    """Bytes that a fusion reads of a parameter which it only slices or updates in place; `None`: all of it."""
    names = {each.name for each in inner.values() if each.opcode == "parameter" and each.arguments == str(number)}
    total = 0
    for user in inner.values():  # in order: a bitcast comes before its users
        places = [i for i, operand in enumerate(user.operands) if operand in names]
        if not places:
            continue
        if user.opcode == "bitcast":
            names.add(user.name)
        elif user.opcode == "dynamic-slice" and places == [0]:
            total += user.arrays[0].stored
        elif user.opcode == "fusion":
            called = program.computations[_called(user, "calls")]
            parts = [_read_of_parameter(program, called, place) for place in places]
            if None in parts:
                return None
            total += sum(parts)
        elif user.opcode != "dynamic-update-slice" or places != [0]:
            return None
    # What the computation hands out as it is, under another shape, is read by whoever uses it.
    return total if names and list(inner)[-1] not in names else None


def _written_in_place(inner) -> int | None:
    """Bytes that a fusion writes where all of its results are updates in place; `None`: not so."""
    roots = [list(inner.values())[-1]]
    if roots[0].opcode == "tuple":
        roots = [inner[name] for name in roots[0].operands]
    for i, root in enumerate(roots):
        while root.opcode == "bitcast":
            root = inner[root.operands[0]]
        roots[i] = root
    if any(root.opcode != "dynamic-update-slice" for root in roots):
        return None
    return sum(inner[root.operands[1]].arrays[0].stored for root in roots)


def stacked_results(program: Program, backward: bool) -> int:
    """Bytes of the arrays that loops over layers write layer by layer: what the forward pass keeps for the backward
    pass, or (`backward`) what the backward pass writes."""
    total = 0
    for name, loop, _ in program.instructions():
        if loop.opcode != "while" or ("transpose(" in loop.attributes) != backward:
            continue
        trips = trip_count(program, name, loop)
        if trips is None:
            continue
        body = program.computations[_called(loop, "body")]
        root = list(body.values())[-1]
        shapes = [match[0] for match in re.finditer(_ARRAY, loop.shape)]
        if root.opcode != "tuple" or len(shapes) != len(root.operands):
            continue
        for index, (operand, shape) in enumerate(zip(root.operands, shapes, strict=True)):
            passed_on = _value(body, operand) == _Element(index)
            if not passed_on and re.match(rf"[a-z0-9]+\[{trips},", shape):
                total += arrays(shape)[0].bytes
    return total
