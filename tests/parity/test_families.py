"""Public models by name, at small sizes: what their own configurations set, read as transformers reads it."""

import jax
import numpy as np
import pytest
import torch
import transformers

from gqa import checkpoints

RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0, scan_layers=True)
T5 = dict(d_model=16, d_kv=4, d_ff=20, num_heads=4, num_layers=2, vocab_size=40, feed_forward_proj="gated-gelu")
LLAMA = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
LLAMA |= dict(initializer_range=0.4, torch_dtype="float32")
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
# Name -> class of transformers, what tells the family from its relatives.
FAMILIES = {
    "T5 v1.1, LM-adapted": ("T5", T5 | dict(tie_word_embeddings=False)),
    "FLAN-T5": ("T5", T5 | dict(tie_word_embeddings=False, n_positions=512, output_past=True)),
    "mT5": ("MT5", T5 | dict(tie_word_embeddings=False, tokenizer_class="T5Tokenizer", vocab_size=60)),
    # A deep encoder, and bytes with 3 special tokens and 125 sentinels before them.
    "ByT5": ("T5", T5 | dict(num_layers=3, num_decoder_layers=1, vocab_size=384, tie_word_embeddings=False)),
    "Llama 1, OpenLLaMA": ("Llama", LLAMA | dict(rms_norm_eps=1e-6, max_position_embeddings=2048, pad_token_id=0)),
    "Llama 2 70B": ("Llama", LLAMA | dict(num_key_value_heads=1, rms_norm_eps=1e-5)),
    "TinyLlama": ("Llama", LLAMA | dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
    "Llama 3.1": (
        "Llama",
        LLAMA | dict(num_key_value_heads=2, rope_parameters=LLAMA3 | dict(factor=8.0, rope_theta=500000.0)),
    ),
    "Llama 3.2": (
        "Llama",
        LLAMA
        | dict(num_key_value_heads=2, tie_word_embeddings=True)
        | dict(rope_parameters=LLAMA3 | dict(factor=32.0, rope_theta=500000.0)),
    ),
    "Mistral": ("Mistral", LLAMA | dict(num_key_value_heads=2, sliding_window=4)),
    "Qwen2": ("Qwen2", LLAMA | dict(num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "Qwen3": ("Qwen3", LLAMA | dict(num_key_value_heads=2, head_dim=16)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, tmp_path, jitter_vectors, assert_close):
    kind, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    config._attn_implementation = "eager"
    encoder_decoder = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    reference = auto.from_config(config).eval()
    jitter_vectors(reference)
    if encoder_decoder and reference.lm_head.weight is reference.shared.weight:
        # The published ones have logits of their own.
        reference.lm_head.weight = torch.nn.Parameter(torch.randn_like(reference.shared.weight) * config.d_model**-0.5)
    reference.save_pretrained(tmp_path / "model")
    model = checkpoints.load(tmp_path / "model", **RUN)
    inputs, tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 2, 11))
    if encoder_decoder:
        found = jax.jit(lambda model: model(inputs, tokens))(model)
        expected = reference(input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(tokens)).logits
    else:
        found = jax.jit(lambda model: model(tokens))(model)
        expected = reference(input_ids=torch.tensor(tokens)).logits
    assert_close(found, expected.detach(), 1e-4, "logits")
