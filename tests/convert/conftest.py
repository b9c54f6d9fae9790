"""References in float64 NumPy for what conversions do to one attention's heads; models and rows to convert on."""

import jax
import numpy as np
import pytest
from flax import nnx

from gqa import models
from gqa.convert import walk
from gqa.convert.heads import Heads, Moments, read_heads, write_heads
from gqa.convert.plan import with_attention


def with_one(x):
    """`[x, 1]`."""
    return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1)


def rotated(x_HTd):
    """RoPE in the half-split layout, of base 100."""
    d = x_HTd.shape[-1]
    angles = np.arange(x_HTd.shape[1])[:, None] * 100.0 ** (-np.arange(0, d, 2) / d)
    turned = (x_HTd[..., : d // 2] + 1j * x_HTd[..., d // 2 :]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def well_conditioned(rng, size, num):
    """Random invertible matrices `[num, size, size]`, singular values within a factor of 4."""
    left, right = (np.linalg.qr(rng.normal(size=(num, size, size)))[0] for _ in range(2))
    return left * np.exp(rng.uniform(-0.7, 0.7, (num, 1, size))) @ right


@pytest.fixture(scope="session")
def head_outputs():
    """A function (heads, query inputs [T, D], key inputs [S, D], rotary, mask [T, S]) -> what heads read [T, H, d]."""

    def attend(heads, x_query, x_key_value, rotary, mask=None):
        G = heads.query.shape[1] // heads.num_kv_heads
        query = np.einsum("TA,AHd->HTd", with_one(x_query), heads.query)
        key = np.repeat(np.einsum("SA,AKd->KSd", with_one(x_key_value), heads.key), G, axis=0)
        value = np.repeat(np.einsum("SA,AKd->KSd", with_one(x_key_value), heads.value), G, axis=0)
        if rotary:
            query, key = rotated(query), rotated(key)
        scores = query @ key.transpose(0, 2, 1) + (0 if mask is None else np.where(mask, 0, -1e30))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) @ value).transpose(1, 0, 2)

    return attend


@pytest.fixture(scope="session")
def outputs(head_outputs):
    """A function (heads, query inputs, key inputs, rotary) -> the attention's output `[T, D]`."""
    return lambda heads, *inputs: np.einsum("THd,HdD->TD", head_outputs(heads, *inputs), heads.out)


@pytest.fixture(scope="session")
def attention_case():
    """A function (rng, units, query heads of one, d, biases) -> random heads, query inputs, key inputs, moments."""

    def make(rng, K, G, d, biases=False):
        D = 3 * d
        scale = D**-0.5
        heads = Heads(
            scale * rng.normal(size=(D + 1, K * G, d)),
            scale * rng.normal(size=(D + 1, K, d)),
            scale * rng.normal(size=(D + 1, K, d)),
            scale * rng.normal(size=(K * G, d, D)),
        )
        for projection in heads[:3]:
            projection[-1] *= D**0.5 if biases else 0
        # Inputs with correlations and a mean.
        mixing = rng.normal(size=(2, D, D)) * scale
        x_query, x_key_value = rng.normal(size=(2, 40, D)) @ mixing + rng.normal(size=(2, 1, D))
        sums = [with_one(x).T @ with_one(x) / len(x) for x in (x_query, x_key_value)]
        return heads, x_query, x_key_value, Moments(*sums, tokens=40)

    return make


@pytest.fixture(scope="session")
def rebased():
    """A function (rng, heads, rotary, orthogonal) -> the same function, each unit's keys and values in another basis.

    Without RoPE and for values: any invertible matrix; for keys with RoPE a rotation and a scale for each frequency.
    """

    def rebase(rng, heads, rotary, orthogonal=False):
        K, d = heads.num_kv_heads, heads.key.shape[-1]
        bases = well_conditioned(rng, d, 2 * K)
        if orthogonal:
            bases = np.linalg.qr(bases)[0]
        of_key, of_value = bases[:K], bases[K:]
        if rotary:
            turns = np.exp(1j * rng.uniform(-np.pi, np.pi, (K, d // 2)))
            turns *= 1 if orthogonal else np.exp(rng.uniform(-0.7, 0.7, (K, d // 2)))
            diagonal = np.eye(d // 2) * turns[:, None]  # x -> turn x, as a real matrix on rows
            of_key = np.block([[diagonal.real, diagonal.imag], [-diagonal.imag, diagonal.real]])
        of_query = np.linalg.inv(of_key).transpose(0, 2, 1)
        return Heads(
            np.einsum("AKGd,Kde->AKGe", heads.query_units(), of_query).reshape(heads.query.shape),
            np.einsum("AKd,Kde->AKe", heads.key, of_key),
            np.einsum("AKd,Kde->AKe", heads.value, of_value),
            np.einsum("Kde,KGeD->KGdD", np.linalg.inv(of_value), heads.out_units()).reshape(heads.out.shape),
        )

    return rebase


@pytest.fixture(scope="session")
def copied():
    """A function (heads, units of a group) -> heads whose groups each have the keys and values of their first unit."""

    def copy(heads, size):
        firsts = np.repeat(np.arange(0, heads.num_kv_heads, size), size)
        return heads._replace(key=heads.key[:, firsts], value=heads.value[:, firsts])

    return copy


@pytest.fixture(scope="session")
def score_error():
    """A function (old heads, new heads, moments, rotary) -> `E[(s - s')²]` over queries and keys drawn apart.

    With RoPE for positions so far apart that each frequency's angle may be any; without, keys less their mean.
    """

    def parts(heads, rotary):
        query = np.moveaxis(heads.query, 1, 0)  # [H, A, d]
        key = np.repeat(np.moveaxis(heads.key, 1, 0), len(query) // heads.num_kv_heads, axis=0)
        if not rotary:
            return (query @ key.transpose(0, 2, 1))[None]
        d = query.shape[-1]
        query, key = (x[..., : d // 2] + 1j * x[..., d // 2 :] for x in (query, key))
        return np.einsum("HAi,HBi->iHAB", query.conj(), key)

    def error(old, new, moments, rotary):
        difference = parts(old, rotary) - parts(new, rotary)
        keys = moments.key_value
        if not rotary:
            keys = keys - np.outer(keys[-1], keys[-1])
        return np.einsum("AC,iHCB,BE,iHAE->", moments.query, difference, keys, difference.conj(), optimize=True).real

    return error


GROUPED = dict(num_heads=8, head_dim=8)
CASES = {  # 4 key/value heads everywhere: multi-head, and as grouped ones of two query heads
    "t5": models.size("t5_1_1_mini"),
    "t5, grouped": models.replace(
        models.size("t5_1_1_mini"),
        encoder_self_kv_heads=4,
        decoder_self_kv_heads=4,
        cross_kv_heads=4,
        relative_bias_per_layer=True,
        **GROUPED,
    ),
    "llama": models.size("llama_mini"),
    "qwen2, grouped": models.replace(
        models.size("llama_mini"), decoder_self_kv_heads=4, qkv_bias=True, sliding_window=6, **GROUPED
    ),
    "qwen3": models.replace(models.size("llama_mini"), qk_norm=True),
}


@pytest.fixture(scope="session")
def teacher(random_model):
    """A function (name of a case) -> a random model whose attention is far from uniform."""
    return lambda case: jax.tree.map(np.asarray, random_model(CASES[case]))


@pytest.fixture(scope="session")
def rows():
    """Two batches as the loader makes them, for either family: packed documents, and padding."""
    rng = np.random.default_rng(0)

    def segments(lengths, width):
        return np.stack([np.repeat([1, 2, 0], [one, two, width - one - two]) for one, two in lengths]).astype(np.int32)

    batches = []
    for _ in range(2):
        tokens = rng.integers(2, 256, (2, 4, 16)).astype(np.int32)
        batch = {
            "decoder_inputs": tokens[0, :, :12],
            "targets_segments": segments([(6, 6), (5, 4), (12, 0), (9, 0)], 12),
            "inputs": tokens[1],
            "inputs_segments": segments([(8, 8), (9, 4), (16, 0), (13, 0)], 16),
        }
        batches.append(batch)
    return batches


def _layers(model, side):
    """Layers of a side, whatever the stacks."""
    return [
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], stack)
        for stack in getattr(model, side)
        for i in range(len(jax.tree.leaves(stack)[0]))
    ]


def _with_layers(model, change):
    """The model with each layer changed, in one stack a side; `change(layer, side, number)`."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for side in walk.sides(model.config):
        layers = [change(layer, side, number) for number, layer in enumerate(_layers(model, side))]
        setattr(model, side, nnx.List([jax.tree.map(lambda *leaves: np.stack(leaves), *layers)]))
    return model


@pytest.fixture(scope="session")
def with_heads():
    """A function (model, change) -> the model with `change(heads, site, number)` in each attention."""

    def make(model, change):
        def change_layer(layer, side, number):
            for site, name in walk.sides(model.config)[side].items():
                attention = getattr(layer, name)
                heads = change(read_heads(attention), site, number)
                layer = with_attention(layer, name, write_heads(attention, heads))
            return layer

        return _with_layers(model, change_layer)

    return make


@pytest.fixture(scope="session")
def logits(rows):
    """A function (model) -> logits of all targets of `rows`, [tokens, V].

    Shared heads are written out for each query head: models of any number of them are one program.
    """
    apply = jax.jit(models.apply)

    def make(model):
        H = model.config.num_heads

        def repeated(layer, side, number):
            for name in walk.sides(model.config)[side].values():
                attention = getattr(layer, name)
                layer = with_attention(layer, name, jax.tree.map(lambda leaf: leaf, attention))
                attention = getattr(layer, name)
                for part in ("key", "value", "key_bias", "value_bias"):
                    if hasattr(attention, part):
                        array = getattr(attention, part)
                        copies = H // array.shape[-2]
                        setattr(attention, part, array.replace(np.repeat(np.asarray(array[...]), copies, axis=-2)))
            return layer

        full = _with_layers(model, repeated)
        sites = models.FAMILIES[models.family_of(model.config)].sites
        full.config = models.replace(model.config, **{f"{site}_kv_heads": H for site in sites})
        return np.concatenate([np.asarray(apply(full, batch))[batch["targets_segments"] > 0] for batch in rows])

    return make
