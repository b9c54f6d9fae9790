"""Shared heads made by the calibrated methods are ordinary grouped-query attention to transformers: the same logits."""

import jax
import numpy as np
import pytest
import torch
import transformers

from gqa import checkpoints, models
from gqa.checkpoints import hf

RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd+group", {}),
        ("procrustes+renorm", dict(qkv_bias=True)),
        ("svd_values+group", dict(qk_norm=True)),
    ],
)
def test_decoders(method, options, tmp_path, random_model, call, assert_close):
    model = random_model(models.replace(models.size("llama_mini"), vocab_size=50, **options))
    hf.save(model, tmp_path / "source", dtype="float32")
    arguments = (
        f"--source={tmp_path / 'source'}",
        f"--output={tmp_path / 'new'}",
        "--kv_heads=2",
        f"--method={method}",
    )
    assert call("convert", *arguments) == 0
    assert call("export", f"--checkpoint={tmp_path / 'new'}", f"--output={tmp_path / 'stock'}") == 0
    converted = checkpoints.load(tmp_path / "new", **RUN)
    assert converted.config == models.replace(model.config, decoder_self_kv_heads=2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    tokens = np.random.default_rng(1).integers(1, 49, (2, 9))
    logits = jax.jit(lambda model: model(tokens))(converted)
    assert_close(logits, reference(torch.tensor(tokens)).logits.detach(), 1e-4, "logits")


def test_t5(tmp_path, random_model, call, assert_close):
    """Exported, heads are written several times, and the bias table's columns are in the order of the groups."""
    model = random_model(models.replace(models.size("t5_1_1_mini"), vocab_size=50))
    hf.save(model, tmp_path / "source", dtype="float32")
    arguments = (
        f"--source={tmp_path / 'source'}",
        f"--output={tmp_path / 'new'}",
        "--kv_heads=2",
        "--method=svd+group",
    )
    assert call("convert", *arguments) == 0
    assert call("export", f"--checkpoint={tmp_path / 'new'}", f"--output={tmp_path / 'stock'}") == 0
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock").eval()
    inputs, targets = (np.random.default_rng(seed).integers(1, 49, (2, 9)) for seed in (1, 2))
    logits = jax.jit(lambda model: model(inputs, targets))(checkpoints.load(tmp_path / "new", **RUN))
    theirs = reference(input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(targets)).logits
    assert_close(logits, theirs.detach(), 1e-4, "logits")
