"""LoRA on stacked, scanned, grouped models: what it computes, what it trains, what it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.adapters import lora
from gqa.adapters.lora import LoRAConfig
from gqa.errors import InputError
from gqa.models.quantize import dequantize_layers, quantize_layers

ATTENTION = ("self_attention.*",)
ALL = ("*",)


def settings(**changes) -> LoRAConfig:
    return LoRAConfig(**dict(kernels=ALL, rank=3, alpha=6.0, dropout_rate=0.0, rank_stabilised=False) | changes)


@pytest.fixture(scope="module")
def model(random_model):
    """Three layers in two stacks: K is 2, 2 and 1."""
    config = models.replace(
        models.size("llama_mini"),
        vocab_size=64,
        d_model=32,
        head_dim=8,
        d_ff=48,
        num_layers=3,
        decoder_self_kv_heads=(2, 2, 1),
    )
    return random_model(config)


@pytest.fixture(scope="module")
def adapters(model):
    """None of them zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32),
        lora.create(model, settings(), jax.random.key(0)),
    )


TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 64, (2, 7)))


@jax.jit
def logits(model):
    return model(TOKENS)


def test_fresh_adapters_change_nothing(model):
    fresh = lora.create(model, settings(), jax.random.key(0))
    np.testing.assert_allclose(logits(lora.attach(model, fresh, settings())), logits(model), rtol=1e-5, atol=1e-5)
    down = fresh["decoder.0.self_attention.out"]["down"][...]
    assert down.shape == (2, 4, 8, 3) and 0.9 * 32**-0.5 < jnp.abs(down).max() < 32**-0.5


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_merged_equals_unmerged(model, adapters, rank_stabilised):
    config = settings(rank_stabilised=rank_stabilised)
    attached, merged = lora.attach(model, adapters, config), lora.merge(model, adapters, config)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    found, expected = logits(attached), logits(merged)
    assert float(jnp.abs(expected - logits(model)).max()) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    # The definition, on one kernel: W + alpha / r · A B, or alpha / sqrt(r).
    down, up = (adapters["decoder.0.self_attention.query"][name][...] for name in ("down", "up"))
    scale = 6 / 3**0.5 if rank_stabilised else 2
    expected = model.decoder[0].self_attention.query[...] + scale * jnp.einsum("LDr,LrHd->LDHd", down, up)
    np.testing.assert_allclose(merged.decoder[0].self_attention.query[...], expected, atol=1e-5)


def test_qlora(model, adapters):
    """Beside 4 bits, of a scanned model whose layers differ in K: the merged model computes the same, as floats."""
    config = settings(base="nf4")

    @jax.jit
    def bases(model):
        quantized = quantize_layers(model, "nf4")
        return quantized, dequantize_layers(quantized), lora.merge(quantized, adapters, config)

    @jax.jit
    def gradient_and_outputs(adapters, model):
        def loss(adapters):
            found = lora.attach(model, adapters, config)(TOKENS)
            return jnp.sum(jnp.square(found)), found

        return jax.grad(loss, has_aux=True)(adapters)

    quantized, as_floats, merged = bases(model)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    gradient, found = gradient_and_outputs(adapters, quantized)
    expected = logits(merged)
    assert float(jnp.abs(expected - logits(lora.merge(model, adapters, config))).max()) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    # The gradient is of the adapters alone, and what it is beside floats of the same values.
    beside_floats, _ = gradient_and_outputs(adapters, as_floats)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(beside_floats), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))


def test_unrolled_and_layer_by_layer_equal_scanned(model, adapters):
    attached = lora.attach(model, adapters, settings())
    np.testing.assert_allclose(logits(attached.unstacked()), logits(attached), rtol=1e-4, atol=1e-4)


def test_many_rows_take_the_sum_of_the_kernels(model, adapters, monkeypatch):
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 64, (3, 40)))

    @jax.jit
    def losses_and_gradients(adapters, model):
        return jax.value_and_grad(
            lambda adapters, model: jnp.mean(lora.attach(model, adapters, settings())(tokens) ** 2), argnums=(0, 1)
        )(adapters, model)

    calls, summed = [], lora._summed
    monkeypatch.setattr(lora, "_summed", lambda *arguments: calls.append(arguments) or summed(*arguments))
    found = losses_and_gradients(adapters, model)
    assert calls and len(calls) % (2 * 7) == 0  # all kernels of two stacks
    monkeypatch.setattr(lora.LoRAKernel, "_is_cheaper_summed", lambda *_: False)
    jax.clear_caches()
    expected = losses_and_gradients(adapters, model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected)


def test_the_gradient_is_of_the_adapters_alone(model, adapters):
    def loss(adapters, model):
        return jnp.sum(jnp.square(lora.attach(model, adapters, settings())(TOKENS)))

    gradients = jax.jit(jax.grad(loss))(adapters, model)
    assert jax.tree.structure(gradients) == jax.tree.structure(adapters)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))


def test_dropout_is_of_what_the_adapters_read(model, adapters):
    config = settings(dropout_rate=0.5)
    forward = jax.jit(lambda key: lora.attach(model, adapters, config, key)(TOKENS))
    one, again, other = (forward(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 0.01
    fresh = lora.create(model, config, jax.random.key(0))
    attached = lora.attach(model, fresh, config, jax.random.key(0))
    np.testing.assert_allclose(logits(attached), logits(model), rtol=1e-5, atol=1e-5)


def test_patterns_choose_kernels(model):
    chosen = lora.create(model, settings(kernels=("self_attention.query", "*.down")), jax.random.key(0))
    assert sorted(chosen) == [
        "decoder.0.mlp.down",
        "decoder.0.self_attention.query",
        "decoder.1.mlp.down",
        "decoder.1.self_attention.query",
    ]
    with pytest.raises(
        InputError, match=r"'q_proj' names no kernel; expected some of mlp.down, mlp.gate, mlp.up, self_"
    ):
        lora.create(model, settings(kernels=("q_proj",)), jax.random.key(0))


def test_trainable_share_of_llama_2_7b():
    """Rank 8: 0.12 % on attention, 0.30 % on all linear maps."""
    model = models.abstract(models.size("llama_2_7b"))
    total = models.num_parameters(model)
    shares = [lora.num_trainable(model, settings(kernels=kernels, rank=8)) / total for kernels in (ATTENTION, ALL)]
    assert [round(100 * share, 2) for share in shares] == [0.12, 0.30]
    # 32 layers of 8 · (4096 + 4096) for each of q, k, v, o, and of 8 · (4096 + 11008) for each of gate, up, down.
    assert [round(share * total) for share in shares] == [32 * 4 * 8 * 8192, 32 * 8 * (4 * 8192 + 3 * 15104)]


def test_layers_and_back(model, adapters):
    layers = lora.by_layer(model, adapters)
    assert layers["decoder.2.self_attention.key"][1].shape == (3, 1, 8)
    np.testing.assert_array_equal(layers["decoder.1.mlp.gate"][0], adapters["decoder.0.mlp.gate"]["down"][...][1])
    back = lora.from_layers(model, settings(), layers)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    missing = {path: pair for path, pair in layers.items() if path != "decoder.1.mlp.up"}
    with pytest.raises(InputError, match=r"nothing for decoder\.1\.mlp\.up"):
        lora.from_layers(model, settings(), missing)
    with pytest.raises(InputError, match=r"has decoder\.0\.self_attention\.key, which the model or its patterns lack"):
        lora.from_layers(model, settings(kernels=("mlp.*",)), layers)
    wrong = layers | {"decoder.2.mlp.up": (np.zeros((31, 3)), np.zeros((3, 48)))}
    with pytest.raises(InputError, match=r"another model: decoder\.2\.mlp\.up has down \[31, 3\], expected \[32, 3\]"):
        lora.from_layers(model, settings(), wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank=0; expected at least 1"),
        ({"alpha": 0.0}, "adapter.alpha=0.0; expected"),
        ({"alpha": float("nan")}, "adapter.alpha=nan; expected"),
        ({"dropout_rate": 1.0}, "adapter.dropout_rate=1.0; expected"),
        ({"kernels": ()}, "adapter.kernels is empty"),
        ({"base": "fp4"}, "adapter.base='fp4'; expected None or one of int8, int4, nf4"),
    ],
)
def test_settings_that_are_none(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)
