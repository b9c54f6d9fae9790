"""Work and memory of a step: counted from its program as from the model's shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from gqa import models, sharding
from gqa.errors import InputError
from gqa.nn import attention, kernels
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


def _flops_of_attention(attend) -> int:
    """Of its gradient, four rows of two groups of two heads."""
    B, K, G, T, d = 4, 2, 2, 256, 64
    query = jax.ShapeDtypeStruct((B, T, K, G, d), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((B, K, T, d), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((B, T, T), bool)
    loss = lambda query, key, value, mask: attend(query, key, value, None, mask).sum().astype(jnp.float32)  # noqa: E731
    return dot_flops(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(query, keys, keys, mask).jaxpr)


def _plain(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS):
    query_BTHd = query_BTKGd.reshape(*query_BTKGd.shape[:2], -1, query_BTKGd.shape[-1])
    return attention.plain_attention(query_BTHd, key_BKSd, value_BKSd, bias_HTS=bias_KGTS, mask_BTS=mask_BTS)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("kernel", "products"), [(kernels.splash, 9), (kernels.cudnn, 7)], ids=["splash", "cudnn"])
def test_products_in_kernels_count_for_their_grid_and_devices(kernel, products, devices, monkeypatch):
    """Plain attention's gradient has six products; the kernels compute scores again (splash the weights, too)."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_"
    monkeypatch.setattr(f"{cudnn}cudnn_version", lambda: 91000)  # as where the GPU is
    monkeypatch.setattr(f"{cudnn}compute_capability", lambda capability: True)
    mesh = AbstractMesh((1, max(devices // 2, 1), 1, 1, min(devices, 2)), sharding.MESH_AXES)
    with jax.sharding.use_abstract_mesh(mesh):
        assert _flops_of_attention(kernel) == pytest.approx(products / 6 * _flops_of_attention(_plain), rel=1e-3)


def test_heads_against_the_tensor_degree():
    llama = models.replace(models.size("llama_mini"), decoder_self_kv_heads=(4, 1))
    assert head_notes(llama, 1) == []
    assert head_notes(llama, 2) == [
        "decoder_self: K=1 is not divisible by tensor=2: every device holds all 1 key/value head(s), 2 times what a "
        "cut would leave; nearest tensor that divides: 1"
    ]
    six = models.replace(llama, num_heads=12, decoder_self_kv_heads=6)
    assert head_notes(six, 4)[0].endswith(
        "all 6 key/value head(s), 4 times what a cut would leave; nearest tensor that divides: 3"
    )
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
