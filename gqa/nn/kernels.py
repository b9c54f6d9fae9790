"""Attention kernels of the backends; `gqa.nn.attention.choose_kernel` says which is used where.

All take queries `[B, T, K, G, d]`, scaled already, keys and values `[B, K, S, d]`, a bias on the scores `[K, G, T, S]`
(with `B` in front where rows differ) or `None`, and a mask `[B, T, S]`, True where a query may attend (B and T may be
1), or `None`; they return `[B, T, K, G, d]`. `gqa.nn.attention.plain_attention` is what they are tested against.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gqa.sharding import partition_spec

MASKED_SCORE = -1e30  # finite: a query that may attend to nothing (padding) stays finite too
BLOCK = 128  # queries and keys of splash attention's blocks
SPLIT_K_LENGTH = 1024  # keys from which one query's work is worth splitting
SPLIT_K_HEAD_DIMS = (16, 32, 64, 128)  # a power of two, as Triton wants it


def masked(scores_BKGTS, bias_KGTS, mask_BTS) -> jax.Array:
    """Scores with the bias, and `MASKED_SCORE` where a query may not attend."""
    if bias_KGTS is not None:
        scores_BKGTS += bias_KGTS
    if mask_BTS is not None:
        # Added, not selected: XLA:CPU does not vectorise a selection inside the softmax.
        scores_BKGTS += jnp.where(mask_BTS, 0.0, MASKED_SCORE)[:, None, None]
    return scores_BKGTS


# The queries of a group are the R = G * T rows of one matrix: products
# with more than two dimensions beside the batch's turn and copy scores and weights, the largest arrays. And automatic
# differentiation adds a sum over a leading axis and products that miss the fast kernel. Forward and backward in
# float32, two cores: B=32, H=8, T=S=128, d=32 25 ms (40 ms with the general products); B=8, T=S=512 128 ms (220 ms).


@jax.custom_vjp
def on_cpu(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS) -> jax.Array:
    """The equation as XLA:CPU runs it fastest, forward and backward."""
    return _on_cpu_forward(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS)[0]


def _on_cpu_forward(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS):
    B, T, K, G, _ = query_BTKGd.shape
    query_BKRd = _rows(query_BTKGd)
    scores_BKRS = jnp.einsum("BKRd,BKSd->BKRS", query_BKRd, key_BKSd, preferred_element_type=jnp.float32)
    scores_BKGTS = masked(scores_BKRS.reshape(B, K, G, T, -1), bias_KGTS, mask_BTS)
    weights_BKRS = jax.nn.softmax(scores_BKGTS, axis=-1).reshape(scores_BKRS.shape)
    out_BKRd = jnp.einsum("BKRS,BKSd->BKRd", weights_BKRS.astype(value_BKSd.dtype), value_BKSd)
    return _from_rows(out_BKRd, query_BTKGd.shape), (query_BKRd, key_BKSd, value_BKSd, weights_BKRS, bias_KGTS)


def _on_cpu_backward(residuals, gradient_BTKGd):
    query_BKRd, key_BKSd, value_BKSd, weights_BKRS, bias_KGTS = residuals
    gradient_BKRd = _rows(gradient_BTKGd)
    of_weights = jnp.einsum("BKRd,BKSd->BKRS", gradient_BKRd, value_BKSd, preferred_element_type=jnp.float32)
    of_scores = weights_BKRS * (of_weights - (weights_BKRS * of_weights).sum(-1, keepdims=True))
    narrow_weights, narrow_scores = weights_BKRS.astype(value_BKSd.dtype), of_scores.astype(value_BKSd.dtype)
    # Computed with d in front, then turned: the direct products miss the fast kernel.
    barrier = jax.lax.optimization_barrier
    of_value = barrier(jnp.einsum("BKRd,BKRS->BKdS", gradient_BKRd, narrow_weights)).swapaxes(2, 3)
    of_key = barrier(jnp.einsum("BKRd,BKRS->BKdS", query_BKRd, narrow_scores)).swapaxes(2, 3)
    of_query = _from_rows(jnp.einsum("BKRS,BKSd->BKRd", narrow_scores, key_BKSd), gradient_BTKGd.shape)
    of_bias = None
    if bias_KGTS is not None:
        of_bias = of_scores.reshape(of_scores.shape[0], -1)
        if of_bias.size > bias_KGTS.size:
            # Rows share it: a sum over the leading axis as a product is 40 times faster.
            of_bias = jnp.ones((1, of_bias.shape[0])) @ of_bias
        of_bias = of_bias.reshape(bias_KGTS.shape)
    return of_query, of_key, of_value, of_bias, None


def _rows(x_BTKGd) -> jax.Array:
    B, T, K, G, d = x_BTKGd.shape
    return x_BTKGd.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)


def _from_rows(x_BKRd, shape: tuple[int, ...]) -> jax.Array:
    B, T, K, G, d = shape
    return x_BKRd.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4)


on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def _on_each_device(kernel: Callable) -> Callable:
    """A kernel that every device of the mesh runs on its own rows and heads: XLA cannot split a custom call."""

    @functools.wraps(kernel)
    def on_each_device(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS, **options):
        mesh = jax.sharding.get_abstract_mesh()
        run = functools.partial(kernel, **options)
        arguments = query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS
        if mesh.empty or mesh.size == 1:
            return run(*arguments)

        def spec(x, *axes: str | None) -> PartitionSpec | None:
            return None if x is None else partition_spec(mesh, axes, x.shape)

        of_queries = spec(query_BTKGd, "batch", None, "kv_heads", None, None)
        of_keys = spec(key_BKSd, "batch", "kv_heads", None, None)
        rows = ("batch",) if bias_KGTS is not None and bias_KGTS.ndim == 5 else ()
        of_bias = spec(bias_KGTS, *rows, "kv_heads", None, None, None)
        of_mask = spec(mask_BTS, "batch" if mask_BTS is not None and mask_BTS.shape[0] > 1 else None, None, None)
        specs = of_queries, of_keys, of_keys, of_bias, of_mask
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=of_queries, check_vma=False)(*arguments)

    return on_each_device


@_on_each_device
def cudnn(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS, *, implementation: str = "cudnn") -> jax.Array:
    """cuDNN's flash attention, in bfloat16 or float16 (Dao 2023, arXiv 2307.08691); it has a gradient.

    It rounds bias and mask to the queries' dtype. Not run on a GPU yet: `implementation="xla"` is what tests run.
    """
    B, T, K, G, d = query_BTKGd.shape
    S = key_BKSd.shape[2]
    query_BTHd = query_BTKGd.reshape(B, T, K * G, d)
    attend = functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation=implementation)
    bias_BHTS = mask_B1TS = None
    if bias_KGTS is not None:
        bias_BHTS = bias_KGTS.astype(query_BTHd.dtype).reshape(-1, K * G, T, S)
    if mask_BTS is not None:
        mask_B1TS = jnp.broadcast_to(mask_BTS, (mask_BTS.shape[0], T, S))[:, None]
    arguments = query_BTHd, key_BKSd.swapaxes(1, 2), value_BKSd.swapaxes(1, 2)
    if bias_BHTS is None or mask_B1TS is None or mask_B1TS.shape[0] == 1:
        return attend(*arguments, bias_BHTS, mask_B1TS).reshape(query_BTKGd.shape)

    # Bias and mask become one array of all heads, as large as the scores: row by row it is B times smaller.
    def attend_row(row):
        query_THd, key_SKd, value_SKd, mask_1TS, *bias_HTS = row
        bias_1HTS = bias_HTS[0][None] if bias_HTS else bias_BHTS
        return attend(query_THd[None], key_SKd[None], value_SKd[None], bias_1HTS, mask_1TS[None])[0]

    rows_of_bias = (bias_BHTS,) if bias_BHTS.shape[0] > 1 else ()
    return jax.lax.map(attend_row, (*arguments, mask_B1TS, *rows_of_bias)).reshape(query_BTKGd.shape)


@_on_each_device
def splash(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS, *, interpret: bool = False) -> jax.Array:
    """Splash attention of JAX's Pallas kernels for TPUs; T and S are multiples of `BLOCK`, and there is no bias.

    Blocks in which nobody may attend are skipped. A query that may attend to nothing reads the first key. It has a
    gradient. Not run on a TPU yet: tests run it in interpret mode.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    assert bias_KGTS is None
    T, S = query_BTKGd.shape[1], key_BKSd.shape[2]
    mask_BTS = jnp.ones((1, T, S), bool) if mask_BTS is None else jnp.broadcast_to(mask_BTS, (len(mask_BTS), T, S))
    blind_BT = ~jnp.any(mask_BTS, axis=-1)  # its sum of weights would be 0, and its output NaN
    mask_BTS = mask_BTS.at[:, :, 0].set(mask_BTS[:, :, 0] | blind_BT)

    def of_row(mask_TS, query_KGTd, key_KSd, value_KSd):
        # One head's kernel, mapped over groups and heads, which share the mask.
        kernel = splash_attention_kernel.make_splash_mqa_single_device(mask_TS[None], interpret=interpret)
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            # Made under jax.jit, it is an array that Python cannot branch on.
            setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=True))
        of_head = lambda query_Td, key_Sd, value_Sd: kernel(query_Td[None], key_Sd, value_Sd)[0]  # noqa: E731
        return jax.vmap(jax.vmap(of_head, (0, None, None)))(query_KGTd, key_KSd, value_KSd)

    query_BKGTd = query_BTKGd.transpose(0, 2, 3, 1, 4)
    if len(mask_BTS) == 1:
        out_BKGTd = jax.vmap(functools.partial(of_row, mask_BTS[0]))(query_BKGTd, key_BKSd, value_BKSd)
    else:
        out_BKGTd = jax.lax.map(lambda row: of_row(*row), (mask_BTS, query_BKGTd, key_BKSd, value_BKSd))
    return out_BKGTd.transpose(0, 3, 1, 2, 4)


@_on_each_device
def split_k_decode(query_BTKGd, key_BKSd, value_BKSd, bias_KGTS, mask_BTS, *, interpret: bool = False) -> jax.Array:
    """One query (T = 1) over many keys: the keys are split over the GPU, the parts' softmaxes joined (flash decoding).

    A group's G queries are the rows of one product, so keys and values are read once for all of them. A Pallas kernel
    for Triton, without a gradient. Checked in interpret mode only, against `plain_attention`; it lowers to Triton, but
    has been neither run nor measured on a GPU, and is off unless `GroupedQueryAttention.split_k` is set.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    B, T, K, G, d = query_BTKGd.shape
    S = key_BKSd.shape[2]
    assert T == 1 and d in SPLIT_K_HEAD_DIMS, query_BTKGd.shape
    rows = max(16, 1 << (G - 1).bit_length())  # the least that a product on the tensor cores has
    block = 64 if d == 128 else 128
    blocks = -(-S // block)
    # Enough programs to fill the largest GPUs' multiprocessors twice.
    of_split = -(-blocks // min(blocks, -(-264 // (B * K))))
    splits = -(-blocks // of_split)

    def kernel(query_ref, key_ref, value_ref, bias_ref, mask_ref, out_ref, max_ref, sum_ref):
        there_R = jnp.arange(rows) < G
        query_Rd = triton.load(query_ref.at[pl.ds(0, rows), :], mask=there_R[:, None], other=0.0)
        first = pl.program_id(2) * of_split

        def add_block(number, carry):
            out_Rd, max_R, sum_R = carry
            start = (first + number) * block
            there_s = start + jnp.arange(block) < S
            key_sd, value_sd = (
                triton.load(ref.at[pl.ds(start, block), :], mask=there_s[:, None], other=0.0)
                for ref in (key_ref, value_ref)
            )
            scores_Rs = triton.dot(query_Rd, key_sd.T)
            if bias_ref is not None:
                there_Rs = there_R[:, None] & there_s[None]
                scores_Rs += triton.load(bias_ref.at[pl.ds(0, rows), pl.ds(start, block)], mask=there_Rs, other=0.0)
            if mask_ref is not None:
                seen_s = triton.load(mask_ref.at[pl.ds(start, block)], mask=there_s, other=0)
                scores_Rs += jnp.where(seen_s != 0, 0.0, MASKED_SCORE)[None]
            scores_Rs = jnp.where(there_s[None], scores_Rs, -jnp.inf)
            new_max_R = jnp.maximum(max_R, scores_Rs.max(axis=1))
            shrunk_R = jnp.exp(max_R - new_max_R)
            weights_Rs = jnp.exp(scores_Rs - new_max_R[:, None])
            out_Rd = out_Rd * shrunk_R[:, None] + triton.dot(weights_Rs.astype(value_sd.dtype), value_sd)
            return out_Rd, new_max_R, sum_R * shrunk_R + weights_Rs.sum(axis=1)

        zeros = jnp.zeros((rows, d), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32)
        out_Rd, max_R, sum_R = jax.lax.fori_loop(0, jnp.minimum(of_split, blocks - first), add_block, zeros)
        triton.store(out_ref.at[pl.ds(0, rows), :], out_Rd, mask=there_R[:, None])
        triton.store(max_ref.at[pl.ds(0, rows)], max_R, mask=there_R)
        triton.store(sum_ref.at[pl.ds(0, rows)], sum_R, mask=there_R)

    def of_rows(x, num_rows: int) -> Callable:
        """Index of a row's part, 0 where all rows share one."""
        return lambda b, k, split: (b if num_rows > 1 else 0, k, *(0,) * (x.ndim - 2))

    query_BKGd = query_BTKGd[:, 0]
    bias_spec = mask_spec = bias_BKGS = mask_BS = None
    if bias_KGTS is not None:
        bias_BKGS = bias_KGTS.reshape(-1, K, G, S)
        bias_spec = pl.BlockSpec((None, None, G, S), of_rows(bias_BKGS, bias_BKGS.shape[0]))
    if mask_BTS is not None:
        mask_BS = mask_BTS[:, 0].astype(np.int8)
        mask_spec = pl.BlockSpec((None, S), lambda b, k, split: (b if mask_BS.shape[0] > 1 else 0, 0))
    keys_spec = pl.BlockSpec((None, None, S, d), of_rows(key_BKSd, 2))
    out_BKNGd, max_BKNG, sum_BKNG = pl.pallas_call(
        kernel,
        grid=(B, K, splits),
        in_specs=[
            pl.BlockSpec((None, None, G, d), of_rows(query_BKGd, 2)),
            keys_spec,
            keys_spec,
            bias_spec,
            mask_spec,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, G, d), lambda b, k, split: (b, k, split, 0, 0)),
            *[pl.BlockSpec((None, None, None, G), lambda b, k, split: (b, k, split, 0))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, splits, G, d), jnp.float32),
            *[jax.ShapeDtypeStruct((B, K, splits, G), jnp.float32)] * 2,
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="split_k_decode",
    )(query_BKGd, key_BKSd, value_BKSd, bias_BKGS, mask_BS)
    share_BKNG = jnp.exp(max_BKNG - max_BKNG.max(axis=2, keepdims=True))
    out_BKGd = jnp.einsum("BKNGd,BKNG->BKGd", out_BKNGd, share_BKNG)
    out_BKGd /= jnp.sum(sum_BKNG * share_BKNG, axis=2)[..., None]
    return out_BKGd.astype(query_BTKGd.dtype)[:, None]
