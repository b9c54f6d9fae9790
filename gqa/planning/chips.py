"""Facts of chips, each with its source, and the topologies that they come in."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from gqa.errors import InputError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a plan needs to know of a device; rates are peaks, in units a second."""

    name: str
    platform: str  # tpu, gpu or cpu
    hbm: int | None  # bytes of memory that a program may use; None: not known here
    hbm_bandwidth: float | None  # bytes
    bf16_flops: float | None  # dense matrix products
    link_bandwidth: float | None  # bytes, one link of the torus in one direction; a GPU: all of its links
    price: float | None  # USD per chip and hour, on demand in the US; None: none that all agree on
    compiler_name: str | None  # what libtpu calls it
    torus: int  # dimensions of the interconnect; 1 where all devices are one switch apart
    source: str


PRICES_OF = "June 2025"  # of cloud.google.com/tpu/pricing; they change, and --price overrides them

# Usable memory is what libtpu 0.0.42 lets a program have (it says so when one does not fit); link bandwidth is the
# documents' bidirectional figure per chip over two directions and 6 (3D torus) or 4 (2D torus) links.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", int(30.75 * GIB), 1.2e12, 275e12, 50e9, 3.22, "v4", 3,
             "cloud.google.com/tpu/docs/v4; Jouppi et al. 2023 (arXiv 2304.01433) table 4"),
        Chip("v5e", "tpu", int(15.75 * GIB), 819e9, 197e12, 50e9, 1.20, "v5e", 2, "cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", "tpu", int(95.74 * GIB), 2765e9, 459e12, 100e9, 4.20, "v5", 3, "cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", "tpu", int(31.25 * GIB), 1640e9, 918e12, 100e9, 2.70, "v6e", 2, "cloud.google.com/tpu/docs/v6e"),
        Chip("a100", "gpu", 80 * GIB, 2039e9, 312e12, 300e9, None, None, 1, "NVIDIA A100 80GB SXM data sheet"),
        Chip("h100", "gpu", 80 * GIB, 3.35e12, 989e12, 450e9, None, None, 1, "NVIDIA H100 SXM data sheet"),
        Chip("h200", "gpu", 141 * 10**9, 4.8e12, 989e12, 450e9, None, None, 1, "NVIDIA H200 SXM data sheet"),
        Chip("cpu", "cpu", None, None, None, None, None, None, 1, "none: a host's figures are its own"),
    )
}  # fmt: skip
DEFAULT_GPU = "h100"
_OTHER_BOARDS = {"40gb", "pcie", "nvl"}  # of the same names, with less memory or bandwidth than the table's

# Slices that are smaller than a cube of 64 chips (3D) and all of a pod's (2D); 3D ones go on in multiples of 4, as
# the documents above list them.
_SMALL_3D = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
_LARGEST_3D = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}
_SHAPES_2D = [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and how they hang together."""

    chip: Chip
    shape: tuple[int, ...]  # of the torus; (N,) for CPUs and GPUs

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        prefix = f"gpu:{self.chip.name}" if self.chip.platform == "gpu" else self.chip.name
        return f"{prefix}:{'x'.join(map(str, self.shape))}"

    def links(self, group: int) -> int:
        """Links of a device that a ring over `group` devices keeps busy, in the direction of sending.

        The group is taken to lie along as few dimensions of the torus as hold it. A dimension closes to a ring where
        it is a multiple of 4 (3D: cubes are wired through switches) or 16 (2D: a whole pod), and then both of its
        directions carry half of the data each.
        """
        if self.chip.torus == 1:
            return 1
        wraps = 4 if self.chip.torus == 3 else 16
        covered, links = 1, 0
        for size in sorted(self.shape, reverse=True):
            if covered >= group and links:
                break
            covered *= size
            links += 2 if size % wraps == 0 else 1
        return links


def valid_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The slices that a TPU comes in, smallest first."""
    if chip.torus == 2:
        return list(_SHAPES_2D)
    largest = _LARGEST_3D[chip.name]
    cubes = itertools.product(*(range(4, size + 1, 4) for size in largest))
    return _SMALL_3D + sorted((shape for shape in cubes if list(shape) == sorted(shape)), key=math.prod)


def parse_topology(text: str) -> Topology:
    """The topology that `v4:4x4x8`, `v5e:16x16`, `cpu:8`, `gpu`, `gpu:h100:8` names.

    Raises `InputError`, naming the nearest, for what does not exist.
    """
    name, _, rest = text.partition(":")
    if name == "gpu":
        kind, _, count = rest.partition(":")
        kind = kind or DEFAULT_GPU
        kinds = [chip.name for chip in CHIPS.values() if chip.platform == "gpu"]
        if kind not in kinds:
            instead = f"gpu:{DEFAULT_GPU}:{kind}" if kind.isdecimal() else nearest(kind.lower(), kinds)
            raise InputError(
                f"--topology={text}: no GPU {kind!r} in the table; expected one of {', '.join(kinds)}; "
                f"nearest: {instead}"
            )
        return Topology(CHIPS[kind], (_count(text, count or "1", f"gpu:{kind}"),))
    if name == "cpu":
        return Topology(CHIPS["cpu"], (_count(text, rest, "cpu"),))
    chip = CHIPS.get(name)
    if chip is None or chip.platform != "tpu":
        names = [chip.name for chip in CHIPS.values() if chip.platform == "tpu"]
        raise InputError(
            f"--topology={text}: no chip {name!r}; expected {', '.join(f'{each}:SHAPE' for each in names)}, cpu:N, gpu "
            "or gpu:NAME:N, such as v4:4x4x8"
        )
    numbers = rest.split("x")
    if not all(re.fullmatch("[0-9]{1,4}", number) for number in numbers) or "0" in numbers:
        raise InputError(f"--topology={text}: {rest!r} is no shape; expected {name}:{_example(chip)}")
    shape, shapes = tuple(map(int, numbers)), valid_shapes(chip)
    if shape not in shapes:
        best = min(shapes, key=lambda valid: _distance(valid, shape))
        raise InputError(
            f"--topology={text}: {name} has no slice {rest}; nearest: {name}:{'x'.join(map(str, best))} "
            f"({math.prod(best)} chips)"
        )
    return Topology(chip, shape)


def local_gpus(topology: Topology, device_kinds: Sequence[str], *, named: bool) -> Topology | None:
    """The topology with the figures of the GPUs that are there, such as `NVIDIA H200`; those asked for, where `named`.

    None where there are fewer, others, or none of the table: no program can be compiled for the topology here.
    """
    if len(device_kinds) < topology.num_devices:
        return None
    words = set(re.findall(r"[a-z0-9]+", device_kinds[0].lower()))
    if words & _OTHER_BOARDS:
        return None
    known = [chip for chip in CHIPS.values() if chip.platform == "gpu" and chip.name in words]
    if not known or (named and topology.chip not in known):
        return None
    return dataclasses.replace(topology, chip=known[0])


def _example(chip: Chip) -> str:
    return "4x4x8" if chip.torus == 3 else "16x16"


def _count(text: str, number: str, prefix: str) -> int:
    if re.fullmatch("[1-9][0-9]{4,}", number):
        raise InputError(f"--topology={text}: {number} devices; expected at most 9999; nearest: {prefix}:9999")
    if not re.fullmatch("[1-9][0-9]{0,3}", number):
        raise InputError(f"--topology={text}: {number!r} is no number of devices; nearest: {prefix}:8")
    return int(number)


def _distance(valid: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[float, float]:
    """First by the number of chips, then by the sorted shape."""
    size = max(len(valid), len(wanted))
    pad = lambda shape: sorted(shape) if len(shape) == size else sorted((1,) * (size - len(shape)) + shape)  # noqa: E731
    sides = sum(abs(math.log(a / b)) for a, b in zip(pad(valid), pad(wanted), strict=True))
    return abs(math.log(math.prod(valid) / math.prod(wanted))), sides
