import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gqa import models, sharding
from gqa.errors import InputError
from gqa.models.quantize import dequantize_layers, quantize, quantize_layers
from gqa.nn.quantized import QuantizedKernel

TOKENS = np.random.default_rng(0).integers(2, 256, (2, 9), dtype=np.int32)
BATCH = dict(inputs=TOKENS, inputs_segments=TOKENS * 0 + 1, decoder_inputs=TOKENS, targets_segments=None)
# Numbers of heads of their own at every site, and layers that differ.
KINDS = {
    "t5": ("t5_1_1_mini", dict(encoder_self_kv_heads=4, decoder_self_kv_heads=(1, 2), cross_kv_heads=2)),
    "llama": ("llama_mini", dict(decoder_self_kv_heads=(2, 1), qkv_bias=True, qk_norm=True)),
    "tied": ("llama_mini", dict(decoder_self_kv_heads=2, tied_logits=True)),
}
PER_LAYER = dict(t5=7 + 7 + 4, llama=7, tied=7)  # query, key, value, out of each attention, gate, up, down


def architecture(kind):
    size, changes = KINDS[kind]
    return models.replace(models.size(size), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_and_no_more(kind):
    model = models.create(architecture(kind), jax.random.key(0)).unstacked()
    quantized = jax.eval_shape(lambda model: quantize(model, "int4"), model)
    leaves = jax.tree.leaves(quantized, is_leaf=lambda node: isinstance(node, QuantizedKernel))
    kernels = [leaf for leaf in leaves if isinstance(leaf, QuantizedKernel)]
    assert len(kernels) == 2 * PER_LAYER[kind] + 1  # two layers, and logits or the tied table
    rest = [leaf.shape for leaf in leaves if not isinstance(leaf, QuantizedKernel)]
    large = [shape for shape in rest if len(shape) > 1 and shape[-1] > 32 and shape[0] > 1]
    assert large == ([] if kind == "tied" else [(256, 64)])  # an embedding that is only looked up
    for site in models.FAMILIES[models.family_of(model.config)].sites:
        found = [attention.key.shape[-2] for attention in models.site_attention(quantized, site)]
        assert found == list(model.config.kv_heads(site))
    # A table of logical axes shards it as it does floats.
    mesh = sharding.make_mesh(sharding.MeshConfig(data=-1, fsdp=1, tensor=1))
    assert len(jax.tree.leaves(sharding.parameter_shardings(mesh, quantized))) == len(jax.tree.leaves(quantized))


# Relative error of the logits of random weights, which are as hard as any.
@pytest.mark.parametrize(
    ("kind", "weights", "tolerance"),
    [
        ("t5", "int8", 0.03),
        ("llama", "int4", 0.4),
        ("tied", "int8", 0.03),
        pytest.param("t5", "int4", 0.4, marks=pytest.mark.full),
        pytest.param("llama", "int8", 0.03, marks=pytest.mark.full),
        pytest.param("tied", "int4", 0.4, marks=pytest.mark.full),
    ],
)
def test_logits_are_near(kind, weights, tolerance):
    model = models.create(architecture(kind), jax.random.key(0))
    quantized = quantize(model, weights)
    apply = jax.jit(models.apply)
    expected, found = apply(model, BATCH), apply(quantized, BATCH)
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < tolerance
    if kind != "tied":
        np.testing.assert_allclose(found, apply(dequantized(quantized), BATCH), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(leaf, QuantizedKernel) for leaf in jax.tree.leaves(model, is_leaf=is_kernel))


def is_kernel(node) -> bool:
    return isinstance(node, QuantizedKernel)


def dequantized(model):
    """The model with floats of the same values."""
    back = lambda node: nnx.Param(node.kernel("float32")) if is_kernel(node) else node  # noqa: E731
    return jax.tree.map(back, model, is_leaf=is_kernel)


def test_a_base_in_4_bits_is_small():
    """Llama-2-7B's layers in NF4, its embedding and logits in bfloat16: 0.57 bytes a parameter."""
    config = models.replace(models.size("llama_2_7b"), param_dtype="bfloat16")
    found = jax.eval_shape(lambda: quantize_layers(models.create(config, jax.random.key(0)), "nf4"))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))
    layers, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    assert models.num_parameters(models.abstract(config)) == layers + rest + 65 * 4096
    # 4 bits, 8 for every 64, 32 for every 64 · 256 and for every kernel of a layer, the last block not full.
    assert size == pytest.approx(layers * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 2 * (rest + 65 * 4096), rel=1e-5)
    assert size / (layers + rest) == pytest.approx(0.5737, abs=1e-4) and size <= 0.6 * (layers + rest)


def test_layers_and_back():
    """A few bits' values are what comes back; the rest of the model is the same arrays, cut over devices alike."""
    model = models.create(architecture("tied"), jax.random.key(0))
    quantized = jax.jit(quantize_layers, static_argnums=1)(model, "nf4")
    np.testing.assert_array_equal(quantized.embedding[...], model.embedding[...])
    back = dequantize_layers(quantized)
    assert jax.tree.structure(back) == jax.tree.structure(model)
    kernel = quantized.decoder[0].self_attention.key
    np.testing.assert_array_equal(back.decoder[0].self_attention.key[...], kernel.kernel("float32"))
    assert kernel.axes == ("embed", "kv_heads", "head_dim")
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1, 2), sharding.MESH_AXES)
    cut = [where.spec for where in jax.tree.leaves(sharding.parameter_shardings(mesh, kernel))]
    # Places, the mean scale, places of scales (one of 64 inputs, which two devices cannot share), their scales.
    assert cut == [P(None, "tensor", "fsdp"), P(None), P(None, "tensor", None), P(None, None)]


def test_unknown_weights():
    with pytest.raises(InputError, match=r"^weights='int3'; expected int8, int4, nf4, or none .*; nearest: int[48]$"):
        quantize(models.abstract(models.size("llama_mini")), "int3")
