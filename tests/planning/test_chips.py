"""Topologies by name, and what is refused."""

import dataclasses

import pytest

from gqa.errors import InputError
from gqa.planning.chips import CHIPS, local_gpus, parse_topology, valid_shapes


@pytest.mark.parametrize(
    ("text", "chip", "shape", "devices"),
    [
        ("v4:4x4x8", "v4", (4, 4, 8), 128),
        ("v4:2x2x1", "v4", (2, 2, 1), 4),
        ("v5e:16x16", "v5e", (16, 16), 256),
        ("v5p:4x4x8", "v5p", (4, 4, 8), 128),
        ("v6e:1x1", "v6e", (1, 1), 1),
        ("cpu:8", "cpu", (8,), 8),
        ("gpu", "h100", (1,), 1),
        ("gpu:h200", "h200", (1,), 1),
        ("gpu:a100:16", "a100", (16,), 16),
    ],
)
def test_topologies(text, chip, shape, devices):
    topology = parse_topology(text)
    assert (topology.chip.name, topology.shape, topology.num_devices) == (chip, shape, devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4:3x4x4", "v4 has no slice 3x4x4; nearest: v4:4x4x4 (64 chips)"),
        ("v4:4x4", "v4 has no slice 4x4; nearest: v4:2x2x4 (16 chips)"),
        ("v4:8x4x4", "v4 has no slice 8x4x4; nearest: v4:4x4x8 (128 chips)"),
        ("v5e:16x32", "v5e has no slice 16x32; nearest: v5e:16x16 (256 chips)"),
        ("v5e:4x4x4", "v5e has no slice 4x4x4; nearest: v5e:8x8 (64 chips)"),
        ("v5p:", "'' is no shape; expected v5p:4x4x8"),
        ("v5e:16xx16", "'16xx16' is no shape; expected v5e:16x16"),
        ("cpu:0", "'0' is no number of devices; nearest: cpu:8"),
        ("cpu", "'' is no number of devices; nearest: cpu:8"),
        ("gpu:h100:x", "'x' is no number of devices; nearest: gpu:h100:8"),
        ("gpu:b1", "no GPU 'b1' in the table; expected one of a100, h100, h200; nearest: h100"),
        ("gpu:8", "no GPU '8' in the table; expected one of a100, h100, h200; nearest: gpu:h100:8"),
        ("gpu:H200:8", "no GPU 'H200' in the table; expected one of a100, h100, h200; nearest: h200"),
        ("gpu:h100:16384", "16384 devices; expected at most 9999; nearest: gpu:h100:9999"),
        (
            "v7:2x2",
            "no chip 'v7'; expected v4:SHAPE, v5e:SHAPE, v5p:SHAPE, v6e:SHAPE, cpu:N, gpu or gpu:NAME:N, such as "
            "v4:4x4x8",
        ),
    ],
)
def test_impossible_topologies(text, message):
    with pytest.raises(InputError) as caught:
        parse_topology(text)
    assert str(caught.value) == f"--topology={text}: {message}"


def test_every_chip_is_complete():
    for chip in CHIPS.values():
        figures = dataclasses.astuple(chip)[2:6]
        assert chip.source and (chip.platform == "cpu") == (None in figures)
        if chip.platform == "tpu":
            assert chip.compiler_name and chip.price and 1 < chip.bf16_flops / chip.hbm_bandwidth < 1000
            assert valid_shapes(chip)


@pytest.mark.parametrize(
    ("text", "group", "links"),
    [
        ("v4:4x4x4", 64, 6),  # three rings, both directions
        ("v4:4x4x4", 16, 4),
        ("v4:4x4x8", 8, 2),  # the longest dimension alone
        ("v4:2x2x2", 8, 3),  # no ring: one direction at a time
        ("v5e:16x16", 256, 4),
        ("v5e:16x16", 16, 2),
        ("v5e:8x8", 64, 2),
        ("gpu:h100:8", 8, 1),
    ],
)
def test_links_that_a_group_keeps_busy(text, group, links):
    assert parse_topology(text).links(group) == links


def test_local_gpus_bring_their_own_figures():
    four = parse_topology("gpu:h100:4")
    assert str(local_gpus(four, ["NVIDIA H200"] * 8, named=False)) == "gpu:h200:4"
    assert local_gpus(four, ["NVIDIA H100 80GB HBM3"] * 4, named=True) == four
    assert str(local_gpus(four, ["NVIDIA A100-SXM4-80GB"] * 4, named=False)) == "gpu:a100:4"


@pytest.mark.parametrize(
    ("kinds", "named"),
    [(["NVIDIA H200"] * 4, True), (["NVIDIA H100"] * 3, True), (["Tesla T4"] * 4, False), ([], False)]
    + [([kind] * 4, False) for kind in ("NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB")],
)
def test_gpus_that_are_not_here(kinds, named):
    assert local_gpus(parse_topology("gpu:h100:4"), kinds, named=named) is None
