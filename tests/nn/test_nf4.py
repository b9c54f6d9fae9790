"""NF4 with double quantisation against the algorithm of QLoRA and bitsandbytes, written out here in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.errors import InputError
from gqa.nn.layers import embed, linear, unembed
from gqa.nn.nf4 import CODE_BOOK, SCALES_CODE_BOOK, NF4Kernel
from gqa.nn.quantized import QuantizedKernel

# QLoRA appendix E, to the digits printed there and in bitsandbytes' kernels.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nearest(code_book, values):
    return np.abs(np.asarray(values)[..., None] - np.asarray(code_book)).argmin(-1)


def reference(matrix):
    """`(places, values)` of a matrix `[out, in]` whose inputs 64 divides, as bitsandbytes: flat, in blocks of 64."""
    blocks = matrix.reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1)
    places = nearest(PUBLISHED, blocks / scales[:, None])
    mean = scales.mean()
    for first in range(0, len(scales), 256):
        centred = scales[first : first + 256] - mean
        largest = np.abs(centred).max()
        scales[first : first + 256] = SCALES_CODE_BOOK[nearest(SCALES_CODE_BOOK, centred / largest)] * largest + mean
    return places.reshape(matrix.shape), (np.array(PUBLISHED)[places] * scales[:, None]).reshape(matrix.shape)


def test_the_published_code_books():
    np.testing.assert_array_equal(CODE_BOOK, np.array(PUBLISHED, np.float32))
    # bitsandbytes' create_dynamic_map(signed=True): ± a mean of 0.1 and 1 a decade down, then two of each, then four …
    small = [0.55e-6, 0.325e-5, 0.775e-5, 0.2125e-4, 0.4375e-4, 0.6625e-4, 0.8875e-4]
    assert len(SCALES_CODE_BOOK) == 256 and SCALES_CODE_BOOK[-1] == 1.0
    np.testing.assert_allclose(SCALES_CODE_BOOK[127:135], [0, *small], rtol=1e-6)
    np.testing.assert_allclose(SCALES_CODE_BOOK[:127], -SCALES_CODE_BOOK[128:255][::-1], rtol=0)
    assert SCALES_CODE_BOOK[0] == np.float32(-0.99296875)


@pytest.mark.parametrize("kind", ["query", "out"])
def test_round_trip_is_the_reference(kind):
    """More than 256 scales, the last block of them not full; layers are quantised each on its own."""
    num_inputs, shape = {"query": (1, (2, 128, 5, 34)), "out": (2, (2, 8, 16, 170))}[kind]
    kernel = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32) * np.array([1, 7])[:, None, None, None]
    kernel[1, 0] *= 20
    quantized = NF4Kernel(jnp.asarray(kernel, jnp.float32), num_inputs, ("a", "b", "c"))
    assert quantized.shape == kernel.shape
    for layer in range(2):
        matrix = np.asarray(kernel[layer], np.float32).reshape(128, 170).T
        places, values = reference(matrix)
        packed = np.asarray(quantized.integers[layer])
        np.testing.assert_array_equal(np.stack([packed >> 4, packed & 15], -1).reshape(170, 128), places)
        np.testing.assert_allclose(quantized.matrix("float32")[layer], values, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(quantized.kernel("float32")[1].reshape(128, 170), quantized.matrix("float32")[1].T)


def test_error_and_bytes_of_a_normal_matrix():
    """Below bitsandbytes' bounds for blocks of 64 (its `test_4bit_quant`: 0.1 and 0.28); 4.127 bits a weight."""
    kernel = jax.random.normal(jax.random.key(0), (1024, 1024))
    quantized = NF4Kernel(kernel, 1, ("embed", "mlp"))
    error = np.abs(quantized.kernel("float32") - kernel)
    assert error.mean() < 0.075 and (error / (np.abs(kernel) + 1e-8)).mean() < 0.21
    int4 = QuantizedKernel(kernel, 1, ("embed", "mlp"), 4)
    assert error.mean() < 0.93 * np.abs(int4.kernel("float32") - kernel).mean()
    bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(quantized)) / kernel.size
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_zeros_and_what_cannot_be_packed():
    zeros = NF4Kernel(jnp.zeros((6, 2)), 1, ("embed", "mlp"))
    np.testing.assert_array_equal(zeros.kernel("float32"), np.zeros((6, 2)))
    with pytest.raises(InputError, match="nf4 packs two inputs in a byte, a kernel has 5; expected an even number"):
        NF4Kernel(jnp.zeros((5, 2)), 1, ("embed", "mlp"))


@pytest.mark.parametrize("make", [NF4Kernel, lambda *arguments: QuantizedKernel(*arguments, 8)])
def test_products_and_their_gradient_are_those_of_the_values(make):
    """The gradient of the inputs is there, that of the kernel is none: it is integers."""
    kernel = make(jax.random.normal(jax.random.key(0), (32, 4, 6)), 1, ("embed", "heads", "head_dim"))
    x = jax.random.normal(jax.random.key(1), (2, 40, 32))
    values = kernel.kernel("float32")

    def outputs_and_gradient(kernel):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(linear("BTD,DHd->BTHd", x, kernel, "float32"))))(x)

    found, expected = (jax.jit(outputs_and_gradient)(each) for each in (kernel, values))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4), found, expected)


def test_an_embedding_gives_rows_and_logits():
    table = NF4Kernel(jax.random.normal(jax.random.key(0), (64, 50)), 1, ("embed", "vocab"))
    values = np.asarray(table.kernel("float32")).T
    tokens = jnp.array([[3, 49], [0, 3]])
    np.testing.assert_array_equal(embed(table, tokens, "float32"), values[tokens])
    x = jax.random.normal(jax.random.key(2), (2, 2, 64))
    np.testing.assert_allclose(unembed(table, x), x @ values.T, rtol=1e-5, atol=1e-4)
