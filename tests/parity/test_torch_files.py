"""Hugging Face folders with PyTorch's `.bin` files, one or several, against transformers' T5 and Llama."""

import jax
import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from gqa import checkpoints

RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0, scan_layers=True)
LLAMA = dict(
    vocab_size=30,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
T5 = dict(vocab_size=30, d_model=16, d_kv=4, d_ff=12, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA | dict(tie_word_embeddings=False)),
    "tied llama": (LlamaForCausalLM, LlamaConfig, LLAMA | dict(tie_word_embeddings=True)),
    "t5": (T5ForConditionalGeneration, T5Config, T5 | dict(tie_word_embeddings=False)),
    "tied t5": (T5ForConditionalGeneration, T5Config, T5 | dict(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_from_one_and_several_files(name, tmp_path, assert_close):
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    reference = model_class(config_class(**settings)).eval()
    weights = dict(reference.state_dict())
    if "t5" in name:
        shared = {key for key, tensor in weights.items() if tensor.data_ptr() == weights["shared.weight"].data_ptr()}
        assert {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} <= shared
    # Buffers as old versions wrote them.
    if "llama" in name:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    weights["position_ids"] = torch.arange(5)[None]
    weights["mask"] = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    single, several = tmp_path / "single", tmp_path / "several"
    for folder, size in ((single, 10**9), (several, 4000)):
        folder.mkdir()
        reference.config.save_pretrained(folder)
        save_torch_state_dict(weights, folder, safe_serialization=False, max_shard_size=size)
    assert [file.name for file in single.glob("*.bin*")] == ["pytorch_model.bin"]
    assert len(list(several.glob("pytorch_model-*.bin"))) > 2

    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(2, 30, (2, 9)), rng.integers(2, 30, (2, 6))
    if "t5" in name:
        theirs = dict(input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(targets))
        forward = jax.jit(lambda model: model(inputs, targets))
    else:
        theirs = dict(input_ids=torch.tensor(inputs))
        forward = jax.jit(lambda model: model(inputs))
    expected = reference(**theirs).logits.detach()
    for folder in (single, several):
        assert_close(forward(checkpoints.load(folder, **RUN)), expected, 1e-4, folder.name)
