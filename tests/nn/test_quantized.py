import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.errors import InputError
from gqa.nn.layers import embed, linear, unembed
from gqa.nn.quantized import QuantizedKernel

D, H, d = 96, 4, 16
AXES = ("embed", "heads", "head_dim")


def random(*shape):
    """Channels and inputs of very different size."""
    sizes = 10.0 ** jax.random.uniform(jax.random.key(1), shape, minval=-2, maxval=2)
    return sizes * jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("kind", ["query", "out", "stacked"])
def test_a_weight_is_off_by_at_most_half_its_scale(bits, largest, kind):
    num_inputs, shape = {"query": (1, (D, H, d)), "out": (2, (H, d, D)), "stacked": (1, (3, D, H, d))}[kind]
    kernel = random(*shape)
    quantized = QuantizedKernel(kernel, num_inputs, AXES, bits)
    assert quantized.shape == kernel.shape
    stacked, inputs = shape[: len(shape) - 3], math.prod(shape[len(shape) - 3 :][:num_inputs])
    group = inputs if bits == 8 else math.gcd(inputs, 64)
    by_group = np.asarray(kernel).reshape(*stacked, inputs // group, group, -1)
    errors = np.abs(np.asarray(quantized.kernel("float32")).reshape(by_group.shape) - by_group)
    scales = np.abs(by_group).max(axis=-2, keepdims=True) / largest
    assert (errors <= scales / 2 * (1 + 1e-5)).all()
    assert errors.max() > 0.4 * scales.max()
    # A byte, or half of one, for a weight; and the scales.
    assert quantized.integers[...].nbytes == kernel.size * bits // 8
    assert quantized.scale[...].nbytes == 4 * scales.size


def test_two_weights_of_a_byte():
    """The first half of the inputs is in the low bits; the scale is 1."""
    quantized = QuantizedKernel(jnp.array([[7.0], [-7.0], [3.4], [0.0]]), 1, ("embed", "mlp"), 4)
    np.testing.assert_array_equal(quantized.integers[...], [[7 | 3 << 4, -7 & 15]])
    np.testing.assert_array_equal(quantized.kernel("float32")[:, 0], [7, -7, 3, 0])
    zeros = QuantizedKernel(jnp.zeros((4, 1)), 1, ("embed", "mlp"), 4)
    np.testing.assert_array_equal(zeros.kernel("float32"), np.zeros((4, 1)))
    with pytest.raises(InputError, match="a kernel has 5; expected an even number, or int8"):
        QuantizedKernel(jnp.zeros((5, 2)), 1, ("embed", "mlp"), 4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_those_of_the_values(bits, rows):
    x = jax.random.normal(jax.random.key(2), (1, rows, D))
    query = QuantizedKernel(random(D, H, d), 1, AXES, bits)
    expected = np.einsum("BTD,DHd->BTHd", x, query.kernel("float32"))
    np.testing.assert_allclose(linear("BTD,DHd->BTHd", x, query, "float32"), expected, rtol=1e-5, atol=1e-3)
    cache_layout = linear("BSD,DKd->BKSd", x, query, "float32")
    np.testing.assert_allclose(cache_layout, expected.transpose(0, 2, 1, 3), rtol=1e-5, atol=1e-3)
    heads = expected / np.abs(expected).max()
    out = QuantizedKernel(random(H, d, D), 2, AXES[1:] + AXES[:1], bits)
    found = linear("BTHd,HdD->BTD", heads, out, "float32")
    np.testing.assert_allclose(found, np.einsum("BTHd,HdD->BTD", heads, out.kernel("float32")), rtol=1e-5, atol=1e-3)


def test_a_wide_kernel_times_one_row():
    x = jax.random.normal(jax.random.key(2), (1, 4096))
    kernel = QuantizedKernel(jax.random.normal(jax.random.key(3), (4096, 3)), 1, ("embed", "mlp"), 8)
    np.testing.assert_allclose(kernel.product(x), x @ kernel.kernel("float32"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_gives_rows_and_logits(bits):
    table = QuantizedKernel(random(50, D).T, 1, ("embed", "vocab"), bits)
    values = np.asarray(table.kernel("float32")).T
    tokens = jnp.array([[3, 49], [0, 3]])
    np.testing.assert_array_equal(embed(table, tokens, "float32"), values[tokens])
    x = jax.random.normal(jax.random.key(2), (2, 2, D))
    np.testing.assert_allclose(unembed(table, x), x @ values.T, rtol=1e-5, atol=1e-3)
