"""Collectives and memory traffic of programs whose answers are known: literal text, and small compiled ones."""

import jax
import jax.numpy as jnp
import pytest

from gqa.planning import hlo
from gqa.planning.hlo import Collective

# As libtpu prints it: no trip counts, tilings and memory spaces in the layouts, `S(1)` on the chip.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=64

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%sliced (p0: bf16[24,64,1024], p1: s32[]) -> bf16[64,1024] {
  %p0 = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,64,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,1024}
  ROOT %out = bf16[64,1024]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%nested (q0: bf16[24,64,1024], q1: s32[]) -> bf16[64,1024] {
  %q0 = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q1 = s32[]{:T(128)} parameter(1)
  ROOT %inner = bf16[64,1024]{1,0:T(8,128)(2,1)} fusion(%q0, %q1), kind=kLoop, calls=%sliced
}

%updated (u0: bf16[24,64,1024], u1: bf16[64,1024], u2: s32[]) -> bf16[24,64,1024] {
  %u0 = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %u1 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %u2 = s32[]{:T(128)} parameter(2)
  %nought = s32[]{:T(128)} constant(0)
  %row = bf16[1,64,1024]{2,1,0:T(8,128)(2,1)} bitcast(%u1)
  ROOT %new = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%u0, %row, %u2, %nought, %nought)
}

%body (s: (s32[], bf16[24,64,1024], bf16[24,64,1024], /*index=3*/s32[])) -> (s32[], bf16[24,64,1024], bf16[24,64,1024], s32[]) {
  %s = (s32[]{:T(128)}, bf16[24,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[24,64,1024]{2,1,0}, /*index=3*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %weights = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %kept = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %end = s32[] get-tuple-element(%s), index=3
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %layer = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%weights, %i), kind=kOutput, calls=%nested
  %whole = bf16[4096,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%layer), channel_id=1, replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %moved = (bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%layer), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %arrived = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%moved)
  %stack = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} fusion(%kept, %arrived, %i), kind=kLoop, calls=%updated
  ROOT %t = (s32[]{:T(128)S(6)}, bf16[24,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[24,64,1024]{2,1,0}, s32[]) tuple(%next, %weights, %stack, %end)
}

%condition (c: (s32[], bf16[24,64,1024], bf16[24,64,1024], /*index=3*/s32[])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[24,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[24,64,1024]{2,1,0}, /*index=3*/s32[]) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  LIMIT
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (a: bf16[24,64,1024]) -> f32[8,1024] {
  %a = bf16[24,64,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %start = s32[]{:T(128)} constant(0)
  %bound = s32[] constant(24)
  %empty = bf16[24,64,1024]{2,1,0} broadcast(%start), dimensions={}
  %initial = (s32[]{:T(128)}, bf16[24,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[24,64,1024]{2,1,0}, /*index=3*/s32[]) tuple(%start, %a, %empty, %bound)
  %loop = (s32[]{:T(128)}, bf16[24,64,1024]{2,1,0:T(8,128)(2,1)}, bf16[24,64,1024]{2,1,0}, /*index=3*/s32[]) while(%initial), condition=%condition, body=%body, metadata={op_name="jit(step)/jvp()/while"}
  %gradient = f32[8,1024]{1,0:T(8,128)} constant({...})
  %scattered = f32[1,1024]{1,0:T(8,128)} reduce-scatter(%gradient), replica_groups=[8,8]<=[64], dimensions={0}, to_apply=%add.1
  %alone = f32[8,1024]{1,0:T(8,128)} all-reduce(%gradient), replica_groups={{0},{1}}, to_apply=%add.1
  ROOT %reduced = f32[8,1024]{1,0:T(8,128)} all-reduce(%gradient), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
}
"""  # noqa: E501
CONSTANT_LIMIT = TPU.replace("LIMIT", "%limit = s32[]{:T(128)} constant(24)")
CARRIED_LIMIT = TPU.replace("LIMIT", "%limit = s32[] get-tuple-element(%c), index=3")
NO_LIMIT = CARRIED_LIMIT.replace("%bound = s32[] constant(24)", "%bound = s32[] add(%start, %start)")
FROM_FOUR_BY_TWO = CONSTANT_LIMIT.replace(
    "%start = s32[]{:T(128)} constant(0)", "%start = s32[]{:T(128)} constant(4)"
).replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(2)")

LAYER = 64 * 1024 * 2


@pytest.mark.parametrize(
    ("text", "trips"), [(CONSTANT_LIMIT, 24), (CARRIED_LIMIT, 24), (NO_LIMIT, None), (FROM_FOUR_BY_TWO, 10)]
)
def test_trip_counts(text, trips):
    program = hlo.parse(text)
    assert hlo.trip_count(program, "main", program.instruction("main", "loop")) == trips


def test_a_turn_of_a_loop_of_unknown_length():
    counted, program = hlo.parse(CONSTANT_LIMIT), hlo.parse(NO_LIMIT)
    turn = hlo.memory_traffic(hlo.turn(program))
    around = hlo.memory_traffic(counted) - 24 * turn
    assert hlo.memory_traffic(program) == turn + around + 3 * 4  # and the sum that makes its limit
    (gathered, permuted) = hlo.collectives(hlo.turn(program))
    assert (gathered.kind, permuted.kind) == ("all-gather", "collective-permute")
    with pytest.raises(ValueError, match="no loop of unknown length"):
        hlo.turn(counted)


def test_padding_by_tiles():
    sizes = {
        "bf16[8,512,64]{2,1,0:T(8,128)(2,1)}": (8 * 512 * 128, True),  # 64 fill half of a tile's 128
        "bf16[8,512,64]{1,2,0:T(8,128)(2,1)S(1)}": (8 * 512 * 64, False),
        "f32[3,5]{1,0:T(8,128)}": (2 * 8 * 128, True),
        "f32[3,5]{1,0}": (2 * 15, True),
        "f32[300]{0:T(256)}": (2 * 512, True),
    }
    for shape, (pairs, in_memory) in sizes.items():
        (array,) = hlo.arrays(shape)
        assert (array.stored, array.in_memory) == (2 * pairs, in_memory)
    assert hlo.arrays("s32[]{:T(128)}") == [(4, 4, True)]


@pytest.mark.parametrize("text", [CONSTANT_LIMIT, CARRIED_LIMIT])
def test_collectives_are_counted_with_their_loop(text):
    assert hlo.collectives(hlo.parse(text)) == [
        Collective("all-gather", 16, 24, 24 * 4096 * 1024 * 2 * 15 // 16),
        Collective("all-reduce", 4, 1, 2 * 8 * 1024 * 4 * 3 // 4),
        Collective("collective-permute", 2, 24, 24 * LAYER),
        Collective("reduce-scatter", 8, 1, 1024 * 4 * 7),
    ]


def test_memory_traffic_of_slices_and_of_what_stays_on_the_chip():
    program = hlo.parse(CONSTANT_LIMIT)
    # Each turn reads one layer's slice through two fusions and writes one into the stack; the rest stays on the chip.
    loop = 24 * (LAYER + 4 + LAYER + 4)
    counter = 24 * (4 + 4)  # %next: reads its operands; and %lt is not run in the body
    gradient = 8 * 1024 * 4
    outside = (24 * LAYER + 4) + 2 * gradient + 2 * (2 * gradient)  # one row of eight fills a tile too
    assert hlo.memory_traffic(program) == loop + counter + outside


def test_a_fusion_reads_what_one_inside_it_only_reshapes():
    text = """HloModule program

%reshaped (p: bf16[24,64,1024]) -> bf16[1536,1024] {
  %p = bf16[24,64,1024]{2,1,0} parameter(0)
  ROOT %bitcast = bf16[1536,1024]{1,0} bitcast(%p)
}

%product (a: bf16[24,64,1024], b: bf16[24,64,1024]) -> bf16[1536,1536] {
  %a = bf16[24,64,1024]{2,1,0} parameter(0)
  %inner = bf16[1536,1024]{1,0} fusion(%a), kind=kLoop, calls=%reshaped
  %b = bf16[24,64,1024]{2,1,0} parameter(1)
  %sliced = bf16[1,64,1024]{2,1,0} dynamic-slice(%b), dynamic_slice_sizes={1,64,1024}
  ROOT %dot = bf16[1536,1536]{1,0} convolution(%inner, %sliced), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[24,64,1024], y: bf16[24,64,1024]) -> bf16[1536,1536] {
  %x = bf16[24,64,1024]{2,1,0} parameter(0)
  %y = bf16[24,64,1024]{2,1,0} parameter(1)
  ROOT %out = bf16[1536,1536]{1,0} fusion(%x, %y), kind=kOutput, calls=%product
}
"""
    assert hlo.memory_traffic(hlo.parse(text)) == 24 * LAYER + LAYER + 2 * 1536**2


def test_what_a_loop_keeps_by_layer():
    program = hlo.parse(CONSTANT_LIMIT)
    assert hlo.stacked_results(program, backward=False) == 24 * LAYER
    assert hlo.stacked_results(program, backward=True) == 0
    backward = hlo.parse(CONSTANT_LIMIT.replace("jvp()", "transpose(jvp())"))
    assert hlo.stacked_results(backward, backward=True) == 24 * LAYER


def test_a_compiled_scan():
    """XLA's own text: five turns of a product of [64, 64] matrices, each reading its layer and the carry."""

    def scanned(x, layers):
        return jax.lax.scan(lambda x, layer: (x @ layer, None), x, layers)[0]

    size = 64 * 64 * 4
    text = jax.jit(scanned).lower(jnp.zeros((64, 64)), jnp.zeros((5, 64, 64))).compile().as_text()
    program = hlo.parse(text)
    loops = [(name, each) for name, each, _ in program.instructions() if each.opcode == "while"]
    assert [hlo.trip_count(program, *loop) for loop in loops] == [5]
    assert hlo.collectives(program) == []
    # At least: carry in, layer in, carry out; at most the layer's copy and the carry's beside.
    assert 5 * 3 * size <= hlo.memory_traffic(program) <= 5 * 8 * size
