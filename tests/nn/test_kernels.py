"""Every backend's kernel against the plain equation, and where each is used; run by itself, eight devices' part.

Kernels for GPUs and TPUs run here in interpret mode, cuDNN's arguments through XLA.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.nn import kernels
from gqa.nn.attention import choose_kernel, plain_attention
from gqa.nn.layers import Dropout
from gqa.sharding import MeshConfig, make_mesh

B, G, d = 2, 2, 16
cudnn = functools.partial(kernels.cudnn, implementation="xla")
splash = functools.partial(kernels.splash, interpret=True)
split_k_decode = functools.partial(kernels.split_k_decode, interpret=True)


def arrays(K: int, T: int, S: int, rows: int = B):
    """Queries, keys, values, a bias that rows share, a mask of rows' own."""
    rng = np.random.default_rng(0)
    query, key, value, bias = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((rows, T, K, G, d), (rows, K, S, d), (rows, K, S, d), (K, G, T, S))
    )
    mask = rng.random((rows, T, S)) < 0.5
    mask[0, :, S // 2 :] = False  # a shorter row
    mask[:, :, 0] = True
    return query, key, value, bias, jnp.asarray(mask)


def plain(query, key, value, bias, mask):
    *rows, T, K, G, d = query.shape
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-4], K * G, *bias.shape[-2:])
    found = plain_attention(query.reshape(*rows, T, K * G, d), key, value, bias_HTS=bias, mask_BTS=mask)
    return found.reshape(query.shape)


def with_gradients(kernel, query, key, value, bias, mask):
    """What the queries that see something read, and the gradients of a weighted sum of it by all that is learnt."""
    seeing = mask.any(axis=-1)[:, :, None, None, None]
    weights = seeing * jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)
    learnt = (query, key, value) if bias is None else (query, key, value, bias)

    @jax.jit
    def run(learnt, mask):
        def loss(learnt):
            out = kernel(*(learnt if len(learnt) == 4 else (*learnt, None)), mask)
            return jnp.sum(weights * out), seeing * out  # not finite where a query's that sees nothing is not

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(learnt)
        return out, gradients

    return run(learnt, mask)


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("kernel", "K", "has_bias", "one_mask"),
    [
        (kernels.on_cpu, 2, True, False),
        (cudnn, 2, True, False),
        (cudnn, 1, True, True),
        (cudnn, 2, False, False),
        (splash, 2, False, False),
        (splash, 1, False, True),
    ],
    ids=["cpu", "cudnn", "cudnn_one_mask", "cudnn_no_bias", "splash", "splash_one_mask"],
)
def test_output_and_gradients_are_those_of_the_equation(kernel, K, has_bias, one_mask):
    query, key, value, bias, mask = arrays(K, 128, 128)
    mask = mask.at[1, 5:9].set(False)  # padding, which may see nothing
    arguments = query, key, value, bias if has_bias else None, mask[1:] if one_mask else mask
    assert_close(with_gradients(kernel, *arguments), with_gradients(plain, *arguments))


@pytest.mark.parametrize(
    ("K", "bias_rows", "mask_rows"),
    [(1, None, 1), (2, 0, 2), (2, 2, None)],
    ids=["mqa", "t5", "bias_of_each_row"],
)
def test_split_k_decodes_what_the_equation_does(K, bias_rows, mask_rows):
    query, key, value, bias, mask = arrays(K, 1, 300)  # 300 keys: the last block is not full
    if bias_rows:
        bias = jnp.stack([bias, 2 * bias])
    arguments = query, key, value, None if bias_rows is None else bias, None if mask_rows is None else mask[:mask_rows]
    assert_close(split_k_decode(*arguments), plain(*arguments))


def test_split_k_of_a_query_that_sees_nothing_is_the_mean():
    query, key, value, _, mask = arrays(1, 1, 130, rows=1)
    found = split_k_decode(query, key, value, None, jnp.zeros_like(mask))
    np.testing.assert_allclose(found[0, 0, 0, 0], value[0, 0].mean(0), rtol=1e-4, atol=1e-6)


def test_kernels_compile_for_their_platforms():
    shapes = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    mask = jax.ShapeDtypeStruct((B, 256, 256), bool)
    keys = shapes(B, 2, 256, 64)
    gradient = jax.jit(
        jax.grad(lambda q, k, v, mask: kernels.splash(q, k, v, None, mask).sum().astype(float), (0, 1, 2))
    )
    lowered = gradient.trace(shapes(B, 256, 2, G, 64), keys, keys, mask).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3  # forward, of the queries, of keys and values
    bias = jax.ShapeDtypeStruct((2, G, 1, 256), jnp.float32)
    mask = jax.ShapeDtypeStruct((B, 1, 256), bool)
    decode = jax.jit(kernels.split_k_decode).trace(shapes(B, 1, 2, G, 64), keys, keys, bias, mask)
    assert "triton" in decode.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("backend", "case", "expected"),
    [
        ("cpu", {}, kernels.on_cpu),
        ("cpu", dict(dropout=Dropout(0.1, None)), None),
        ("rocm", {}, None),
        ("cuda", {}, kernels.cudnn),
        ("cuda", dict(bias=True), kernels.cudnn),
        ("cuda", dict(T=255), None),
        ("cuda", dict(dtype=jnp.float32), None),
        ("cuda", dict(d=256), None),
        ("cuda", dict(dropout=Dropout(0.1, None)), None),
        ("cuda", dict(T=1, S=2048), None),
        ("cuda", dict(T=1, S=2048, split_k=True), kernels.split_k_decode),
        ("cuda", dict(T=1, S=2048, split_k=True, bias=True), kernels.split_k_decode),
        ("cuda", dict(T=1, S=512, split_k=True), None),
        ("cuda", dict(T=1, S=2048, split_k=True, d=80), None),
        ("tpu", {}, kernels.splash),
        ("tpu", dict(bias=True), None),
        ("tpu", dict(S=300), None),
        ("tpu", dict(T=1), None),
    ],
)
def test_kernel_of_a_backend(backend, case, expected):
    case = dict(T=256, S=256, d=64, dtype=jnp.bfloat16, bias=False, dropout=None, split_k=False) | case
    query, key = (
        jax.ShapeDtypeStruct(shape, case["dtype"])
        for shape in ((B, case["T"], 8, case["d"]), (B, 2, case["S"], case["d"]))
    )
    bias = jax.ShapeDtypeStruct((8, case["T"], case["S"]), jnp.float32) if case["bias"] else None
    assert choose_kernel(backend, query, key, bias, case["dropout"], case["split_k"]) is expected


def test_devices_of_a_mesh_run_a_kernel_each_on_its_own_rows_and_heads():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu", PYTHONPATH=os.pathsep.join(sys.path))
    subprocess.run([sys.executable, __file__], env=environment, check=True)


def on_eight_devices() -> None:
    query, key, value, bias, mask = arrays(2, 8, 8, rows=4)
    arguments = query, key, value, bias, mask
    expected = with_gradients(cudnn, *arguments)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        found = with_gradients(cudnn, *arguments)
        assert found[0].sharding.shard_shape(found[0].shape) == (1, 8, 1, G, d)
        assert_close(found, expected)


if __name__ == "__main__":
    on_eight_devices()
