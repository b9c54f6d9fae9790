"""Exported folders in transformers: the same logits and the same greedy text; back again the same bits."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers

from gqa import checkpoints, models
from gqa.checkpoints import hf
from gqa.decode.generate import generate

RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
NEW_TOKENS = 12
DECODERS = {
    "llama": dict(decoder_self_kv_heads=2),
    "llama, layers differ": dict(decoder_self_kv_heads=(2, 1)),
    "mistral": dict(decoder_self_kv_heads=2, sliding_window=3),
    "qwen2": dict(decoder_self_kv_heads=1, qkv_bias=True, tied_logits=True),
}


def saved(model, folder, call):
    """The model's own folder, and what is exported of it."""
    hf.save(model, folder / "ours", dtype="float32")
    assert call("export", f"--checkpoint={folder / 'ours'}", f"--output={folder / 'stock'}") == 0
    return folder / "ours", folder / "stock"


def generated_by(reference, tokens):
    """All of the most likely `NEW_TOKENS` tokens: none ends a text."""
    reference.generation_config.eos_token_id = None
    mask = torch.ones(tokens.shape, dtype=torch.long)
    return reference.generate(
        torch.tensor(tokens), attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
    ).tolist()


def check_round_trip(ours, stock, folder, call, kv_heads):
    """Pooled back, what transformers itself wrote is the source again, bit for bit."""
    arguments = (f"--source={stock}", f"--output={folder / 'again'}", "--method=mean", *kv_heads)
    assert call("convert", *arguments) == 0
    again, source = (checkpoints.load(place, **RUN) for place in (folder / "again", ours))
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(source), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama, layers differ", "qwen2") else pytest.param(name, marks=pytest.mark.full)
        for name in DECODERS
    ],
)
def test_decoders(name, tmp_path, random_model, call, assert_close):
    config = models.replace(models.size("llama_mini"), vocab_size=50, **DECODERS[name])
    model = random_model(config)
    ours, stock = saved(model, tmp_path, call)
    reference = transformers.AutoModelForCausalLM.from_pretrained(stock).eval()
    assert reference.config.model_type == name.split(",")[0]
    tokens = np.random.default_rng(1).integers(1, 49, (2, 9))
    logits = jax.jit(lambda model: model(tokens))(model)
    assert_close(logits, reference(torch.tensor(tokens)).logits.detach(), 1e-4, "logits")
    found = generate(model.unstacked(), tokens, None, max_new_tokens=NEW_TOKENS, eos_ids=()).tokens_BN
    assert [[*row, *new] for row, new in zip(tokens.tolist(), found.tolist(), strict=True)] == generated_by(
        reference, tokens
    )

    reference.save_pretrained(tmp_path / "theirs")
    per_layer = ",".join(map(str, config.kv_heads("decoder_self")))
    check_round_trip(ours, tmp_path / "theirs", tmp_path, call, [f"--kv_heads={per_layer}"])


@pytest.mark.parametrize("tied", [False, True])
def test_t5(tied, tmp_path, random_model, call, assert_close):
    heads = dict(encoder_self_kv_heads=2, decoder_self_kv_heads=(2, 1), cross_kv_heads=(1, 4))
    model = random_model(models.replace(models.size("t5_1_1_mini"), vocab_size=50, tied_logits=tied, **heads))
    ours, stock = saved(model, tmp_path, call)
    assert "num_key_value_heads" not in json.loads((stock / "config.json").read_text())
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(stock).eval()
    inputs, targets = (np.random.default_rng(seed).integers(1, 49, (2, 9)) for seed in (1, 2))
    logits = jax.jit(lambda model: model(inputs, targets))(model)
    theirs = reference(input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(targets)).logits
    assert_close(logits, theirs.detach(), 1e-4, "logits")
    found = generate(model.unstacked(), inputs, None, max_new_tokens=NEW_TOKENS, eos_ids=()).tokens_BN
    assert [[0, *row] for row in found.tolist()] == generated_by(reference, inputs)

    reference.save_pretrained(tmp_path / "theirs")
    kv_heads = ["--kv_heads=encoder_self=2", "--kv_heads=decoder_self=2,1", "--kv_heads=cross=1,4"]
    check_round_trip(ours, tmp_path / "theirs", tmp_path, call, kv_heads)
