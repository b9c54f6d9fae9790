import re

import jax
import numpy as np
import pytest

from gqa import models
from gqa.convert import walk
from gqa.convert.heads import read_heads
from gqa.convert.statistics import Statistics, assumed, collect, fingerprint, packed, unpacked
from gqa.convert.svd import complex_moments
from gqa.errors import InputError

SITES = {"t5": ("encoder_self", "decoder_self", "cross"), "llama": ("decoder_self",)}


def measured(model, rows, sites=None):
    return collect(walk.shell_of(model), walk.layers_of(model), rows, sites or SITES[models.family_of(model.config)])


def assert_equal(found, expected, model, **tolerance):
    for site in SITES[models.family_of(model.config)]:
        for number in range(2):
            one, two = (each.moments(models.site_path(site, number)) for each in (found, expected))
            assert one.tokens == two.tokens
            for left, right in zip((one.query, one.key_value), (two.query, two.key_value), strict=True):
                np.testing.assert_allclose(left, right, **tolerance)


def normalised(x, norm, epsilon):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * np.asarray(norm.scale[...], np.float64)


def real_tokens(rows, tokens, segments):
    return np.concatenate([batch[tokens][batch[segments] > 0] for batch in rows])


@pytest.mark.parametrize("case", ["t5", "llama"])
def test_moments_of_the_first_layer(case, teacher, rows):
    """Of what each site reads: norms of embedded tokens, and for cross-attention's keys the encoder's outputs."""
    model, epsilon = teacher(case), {"t5": 1e-6, "llama": 1e-5}[case]
    statistics = measured(model, rows)
    embedding, layer = np.asarray(model.embedding[...], np.float64), walk.layers_of(model)("decoder", 0)
    tokens = real_tokens(rows, "decoder_inputs", "targets_segments")
    x = normalised(embedding[tokens], layer.self_attention_norm, epsilon)
    inputs = {"decoder.0.self_attention": (x, x)}
    if case == "t5":
        encoder_layer = walk.layers_of(model)("encoder", 0)
        x = embedding[real_tokens(rows, "inputs", "inputs_segments")]
        inputs["encoder.0.self_attention"] = (normalised(x, encoder_layer.self_attention_norm, epsilon),) * 2
        encode = jax.jit(lambda model, batch: model.encode(batch["inputs"], batch["inputs_segments"]))
        encoded = [np.asarray(encode(model, batch))[batch["inputs_segments"] > 0] for batch in rows]
        inputs["decoder.0.cross_attention"] = (None, np.concatenate(encoded))
    for path, both in inputs.items():
        moments = statistics.moments(path)
        attention = getattr(walk.layers_of(model)(path.split(".")[0], 0), path.split(".")[-1])
        heads = read_heads(attention)
        for x, found in zip(both, (moments.query, moments.key_value), strict=True):
            if x is not None:
                x = np.append(x, np.ones((len(x), 1)), axis=1)
                np.testing.assert_allclose(found, x.T @ x / len(x), atol=1e-5, err_msg=path)
        # What the methods make of them is what the attention's own projections give.
        key, value = (
            np.asarray(each, np.float64) for each in attention.project_key_value(both[1][None].astype(np.float32))
        )
        flat_key, flat_value = (each[0].transpose(1, 0, 2).reshape(len(both[1]), -1) for each in (key, value))
        np.testing.assert_allclose(moments.of_values(heads), flat_value.T @ flat_value / len(flat_value), atol=1e-4)
        np.testing.assert_allclose(moments.of_keys(heads, centred=True), np.cov(flat_key.T, bias=True), atol=1e-4)
        z = key[0, ..., :8] + 1j * key[0, ..., 8:]
        np.testing.assert_allclose(
            complex_moments(heads, moments), np.einsum("gSi,hSi->igh", z, z.conj()) / z.shape[1], atol=1e-4
        )
    counts = {path: statistics.moments(path).tokens for path in inputs}
    targets = len(tokens)
    assert counts["decoder.0.self_attention"] == targets == 2 * (12 + 9 + 12 + 9)
    assert counts.get("decoder.0.cross_attention", targets) == targets  # fewer than inputs


@pytest.mark.parametrize("case", ["t5", "llama"])
def test_padding_counts_for_nothing(case, teacher, rows):
    model, rng = teacher(case), np.random.default_rng(0)
    others = [dict(batch) for batch in rows]
    for batch in others:
        for tokens, segments in (("decoder_inputs", "targets_segments"), ("inputs", "inputs_segments")):
            noise = rng.integers(2, 256, batch[tokens].shape).astype(np.int32)
            assert (batch[segments] == 0).any()
            batch[tokens] = np.where(batch[segments] == 0, noise, batch[tokens])
    assert_equal(measured(model, others), measured(model, rows), model, rtol=0, atol=0)


def test_rows_may_come_in_any_batches(teacher, rows):
    model = teacher("llama")
    one = {name: np.concatenate([batch[name] for batch in reversed(rows)]) for name in rows[0]}
    assert_equal(measured(model, [one]), measured(model, rows), model, atol=1e-5)


def test_saved_and_loaded(teacher, rows, tmp_path):
    model, file = teacher("t5"), tmp_path / "moments.safetensors"
    statistics = measured(model, rows)
    statistics.save(file, "of this model")
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]
    assert_equal(Statistics.load(file, "of this model"), statistics, model, rtol=0)
    with pytest.raises(
        InputError, match=f"^{re.escape(str(file))} holds the statistics of another checkpoint, text, number "
    ):
        Statistics.load(file, "of another model")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-1000] ^= 64
    for content in (whole[:-8], whole[:100], b"", b"text", bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(
            InputError, match=f"^{re.escape(str(file))} (holds no statistics of calibration|is damaged)"
        ):
            Statistics.load(file, "of this model")
    with pytest.raises(InputError, match="holds no statistics of calibration: No such file"):
        Statistics.load(tmp_path / "nothing", "of this model")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 64, 65])
def test_symmetric_matrices_take_half(n):
    matrix = np.random.default_rng(n).normal(size=(n, n)).astype(np.float32)
    matrix += matrix.T
    half = packed(matrix)
    assert half.size == n * (n + 1) // 2
    np.testing.assert_array_equal(unpacked(half), matrix)


def test_files_of_whole_matrices_are_refused(teacher, rows, tmp_path):
    statistics = measured(teacher("llama"), rows)
    whole = {name: unpacked(array) for name, array in statistics._arrays.items()}
    Statistics(whole, statistics._tokens).save(tmp_path / "moments.safetensors", "of this model")
    with pytest.raises(InputError, match=r"moments\.safetensors is of an earlier version; delete it"):
        Statistics.load(tmp_path / "moments.safetensors", "of this model")


def test_fingerprints_tell_checkpoints_apart(teacher, with_heads, random_model):
    model, deep = teacher("llama"), random_model(models.replace(models.size("llama_mini"), num_layers=3))

    def fingerprint_of(model):
        return fingerprint(walk.shell_of(model), walk.layers_of(model))

    other = with_heads(model, lambda heads, site, number: heads._replace(key=heads.key * 2))
    config = jax.tree.map(lambda leaf: leaf, model)
    config.config = models.replace(model.config, rope_theta=20.0)
    found = {fingerprint_of(each) for each in (model, teacher("llama"), other, config, teacher("t5"))}
    assert len(found) == 4
    for base, site, layer in (
        (deep, "decoder_self", 1),
        (teacher("t5"), "encoder_self", 0),
        (model, "decoder_self", 1),
    ):

        def change(heads, at, number, site=site, layer=layer):
            return heads._replace(value=heads.value * 2) if (at, number) == (site, layer) else heads

        assert fingerprint_of(with_heads(base, lambda heads, *_: heads)) == fingerprint_of(base)
        assert fingerprint_of(with_heads(base, change)) != fingerprint_of(base)


def test_too_few_tokens_are_said(teacher, rows):
    model = teacher("llama")
    statistics = measured(model, rows)
    assert statistics.few() == (
        "decoder.0.self_attention was calibrated on 84 tokens for a width of 64; expected 256 or more: "
        "give more text or rows"
    )
    assert measured(model, rows * 4).few() is None


def test_sites_that_were_not_collected_are_refused(teacher, rows):
    statistics = measured(teacher("t5"), rows, sites=["cross"])
    with pytest.raises(InputError, match=r"^the statistics have no moments of decoder\.0\.self_attention; collect "):
        statistics.moments("decoder.0.self_attention")


def test_text_without_tokens_is_refused(teacher, rows):
    empty = [{name: np.zeros_like(array) for name, array in batch.items()} for batch in rows]
    message = r"^decoder\.0\.self_attention reads no token of the calibration text; give more text or rows$"
    with pytest.raises(InputError, match=message):
        measured(teacher("llama"), empty)
    with pytest.raises(InputError, match=r"^there is no calibration text; give one row of it or more$"):
        measured(teacher("llama"), [])


def test_activations_that_are_not_numbers_are_named(teacher, rows):
    model = teacher("t5")
    (stack,) = model.decoder
    gate = np.array(stack.mlp.gate[...])
    gate[0, 3, 5] = np.inf
    stack.mlp.gate = stack.mlp.gate.replace(gate)
    message = (
        r"^what decoder\.1\.self_attention reads: its activations on the calibration text are NaN or infinite; "
        "check the checkpoint's weights$"
    )
    with pytest.raises(InputError, match=message):
        measured(model, rows)


def test_without_text_inputs_are_what_norms_give(teacher):
    model = teacher("t5")
    layer = walk.layers_of(model)("decoder", 1)
    moments = assumed(walk.shell_of(model), layer, "cross", "cross_attention")
    for found, norm in ((moments.query, layer.cross_attention_norm), (moments.key_value, model.encoder_norm)):
        scale = np.asarray(norm.scale[...])
        x = scale * np.random.default_rng(0).choice([-1, 1], (20_000, 64))
        x = np.append(x, np.ones((len(x), 1)), axis=1)
        np.testing.assert_allclose(found, x.T @ x / len(x), atol=0.2)
