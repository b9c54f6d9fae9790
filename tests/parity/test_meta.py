"""Meta's Llama folders against transformers' Llama with the same weights, from any number of files."""

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from gqa import checkpoints
from gqa.nn.position import RopeScaling

RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0, scan_layers=True)
LLAMA31 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
def test_logits_from_one_two_and_four_files(num_kv_heads, scaled, decoder_case, save_as_meta, assert_close, tmp_path):
    settings = dict(
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=4,
        vocab_size=24,
        num_hidden_layers=2,
        # The second pair of a head turns once in 4,400 positions, where the scaling begins.
        rope_parameters={"rope_theta": 500000.0, **(LLAMA31 if scaled else {"rope_type": "default"})},
        tie_word_embeddings=False,
    )
    case = decoder_case(LlamaConfig, num_kv_heads, **settings)
    tokens = np.random.default_rng(0).integers(0, 24, (2, 100))
    expected = case.reference(torch.tensor(tokens)).logits.detach()
    forward = jax.jit(lambda model: model(tokens))
    params = {"use_scaled_rope": True} if scaled else {}
    for shards in (1, 2, 4):
        # Llama 3 splits the rows of the embedding, those before its columns.
        save_as_meta(case.directory, tmp_path / str(shards), shards, 0 if scaled else 1, **params)
        model = checkpoints.load(tmp_path / str(shards), **RUN)
        assert model.config.kv_heads("decoder_self") == (num_kv_heads,) * 2
        assert model.config.rope_scaling == (RopeScaling(8.0, 1.0, 4.0, 8192) if scaled else None)
        assert_close(forward(model), expected, 1e-4, f"{shards} files")
