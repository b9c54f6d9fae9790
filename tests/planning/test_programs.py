"""Work and memory of a step: counted from its program as from the model's shapes."""

import jax
import jax.numpy as jnp
import pytest

from gqa import models
from gqa.errors import InputError
from gqa.planning.programs import dot_flops, memory_needed
from gqa.planning.train import head_notes


def test_products_in_scans_branches_and_loops():
    def program(x, layers):
        x = jax.lax.scan(lambda x, layer: (x @ layer, None), x, layers)[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    jaxpr = jax.make_jaxpr(jax.jit(program))(jnp.zeros((4, 4)), jnp.zeros((5, 4, 4))).jaxpr
    product = 2 * 4**3
    assert dot_flops(jaxpr) == (5 + 2 + 1) * product
    assert dot_flops(jaxpr, while_trips=7) == (5 + 2 + 7) * product


def test_heads_against_the_tensor_degree():
    llama = models.replace(models.size("llama_mini"), decoder_self_kv_heads=(4, 1))
    assert head_notes(llama, 1) == []
    assert head_notes(llama, 2) == [
        "decoder_self: K=1 is not divisible by tensor=2: every device holds all 1 key/value head(s), 2 times what a "
        "cut would leave; nearest tensor that divides: 1"
    ]
    with pytest.raises(InputError, match=r"^mesh\.tensor=3 does not divide num_heads=4; nearest: 2$"):
        head_notes(llama, 3)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (128.00G) "
            "exceeds available HBM (30.75G).",
            128 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 40.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 24.75G.",
            40.5 * 2**30,
        ),
        ("INTERNAL: Mosaic failed", None),
    ],
)
def test_what_the_compiler_says_is_missing(message, needed):
    """As libtpu 0.0.42 words it."""
    assert memory_needed(message) == needed
