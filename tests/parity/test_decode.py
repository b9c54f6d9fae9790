"""Decoding against transformers' `generate`, token for token: 50 random prompts, half of them padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gqa import models
from gqa.checkpoints import hf
from gqa.decode.beam import beam_search
from gqa.decode.generate import PAD_ID, generate
from gqa.models import replace, site_attention

B, S, N, W = 50, 12, 12, 3
NUM_HEADS = 8
EOS_IDS = [3, 17]
SIZES = dict(vocab_size=120, d_model=48, num_heads=NUM_HEADS, head_dim=6, norm_epsilon=1e-5)


def with_repeated_heads(network):
    """The multi-head T5 that computes the same: each key/value head once for every query head of its group."""
    network = jax.tree.map(lambda leaf: leaf, network)
    for site in ("decoder_self", "cross"):
        for attention in site_attention(network, site):
            for name in ("key", "value"):
                kernel = getattr(attention, name)
                groups = NUM_HEADS // kernel.shape[-2]
                repeated = jax.tree.map(lambda leaf, groups=groups: jnp.repeat(leaf, groups, axis=-2), kernel)
                setattr(attention, name, repeated)
    network.config = replace(network.config, decoder_self_kv_heads=NUM_HEADS, cross_kv_heads=NUM_HEADS)
    return network


# Multi-head with the long counts.
CASES = [
    pytest.param((name, K), marks=[pytest.mark.full] * (K == NUM_HEADS))
    for name in ("t5_1_1_mini", "llama_mini")
    for K in (8, 2, 1)
]


@pytest.fixture(params=CASES, ids=str)
def pair(request, tmp_path):
    """A random model of ours and the same one of transformers."""
    name, K = request.param
    sites = {"decoder_self_kv_heads": K}
    if name == "t5_1_1_mini":
        sites |= {"cross_kv_heads": K, "encoder_self_kv_heads": NUM_HEADS}
    config = replace(models.size(name), **SIZES, **sites)
    network = models.create(config, jax.random.key(K))
    if name == "t5_1_1_mini":
        hf.save(with_repeated_heads(network), tmp_path / "hf", dtype="float32")
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    else:
        # Attention far from uniform.
        network = jax.tree.map(lambda leaf: 2.5 * leaf if leaf.ndim > 2 else leaf, network)
        hf.save(network, tmp_path / "hf", dtype="float32")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    return network.unstacked(), theirs.eval()


def cut_at_eos(rows):
    """Tokens up to and with the first EOS of each row: what follows is a matter of taste."""
    ends = [next((i + 1 for i, token in enumerate(row) if token in EOS_IDS), len(row)) for row in rows]
    return [list(map(int, row[:end])) for row, end in zip(rows, ends, strict=True)]


def generate_with(theirs, inputs, lengths, **settings):
    """transformers' new tokens, and beams' scores: T5's inputs are padded on the right, Llama's prompts on the left."""
    encoder_decoder = theirs.config.is_encoder_decoder
    real = np.arange(S) < lengths[:, None]
    if not encoder_decoder:
        inputs = np.stack([np.roll(row, S - length) for row, length in zip(inputs, lengths, strict=True)])
        real = real[:, ::-1]
    with torch.no_grad():
        output = theirs.generate(
            torch.tensor(np.where(real, inputs, PAD_ID)),
            attention_mask=torch.tensor(real.astype(np.int64)),
            max_new_tokens=N,
            do_sample=False,
            eos_token_id=EOS_IDS,
            pad_token_id=PAD_ID,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    tokens = output.sequences.numpy()[:, 1 if encoder_decoder else S :]
    return cut_at_eos(tokens), output.get("sequences_scores")


def test_greedy_and_beam_search_equal_transformers(pair):
    ours, theirs = pair
    rng = np.random.default_rng(0)
    inputs = rng.integers(4, 120, (B, S)).astype(np.int32)
    lengths = np.where(np.arange(B) < B // 2, S, rng.integers(1, S, B)).astype(np.int32)

    state = generate(ours, inputs, lengths, max_new_tokens=N, eos_ids=EOS_IDS)
    expected, _ = generate_with(theirs, inputs, lengths, num_beams=1)
    assert cut_at_eos(np.asarray(state.tokens_BN)) == expected
    assert state.counts_B.tolist() == list(map(len, expected))
    assert len({tuple(row) for row in expected}) > 40, "rows should differ for the test to mean something"
    assert 0 < sum(len(row) < N for row in expected) < B, "some rows should end early"

    for penalty in (1.0, -1.5):
        found = beam_search(
            ours, inputs, lengths, max_new_tokens=N, eos_ids=EOS_IDS, num_beams=W, length_penalty=penalty
        )
        expected, scores = generate_with(
            theirs, inputs, lengths, num_beams=W, num_return_sequences=W, length_penalty=penalty
        )
        assert cut_at_eos(np.asarray(found.tokens_BWN).reshape(B * W, N)) == expected
        assert found.counts_BW.reshape(-1).tolist() == list(map(len, expected))
        np.testing.assert_allclose(found.scores_BW.reshape(-1), scores, rtol=1e-4, atol=1e-4)
