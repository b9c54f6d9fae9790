"""A checkpoint with an adapter merged into it, tensor by tensor, is what merging in memory gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import checkpoints, models
from gqa.adapters import lora
from gqa.checkpoints import hf, peft

CHOICES = dict(param_dtype="float32", dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
CONFIG = lora.LoRAConfig(("self_attention.*", "mlp.down"), rank=2, alpha=4.0, dropout_rate=0.0, rank_stabilised=False)


@pytest.mark.parametrize(("size", "base"), [("llama_mini", None), ("t5_1_1_mini", None), ("llama_mini", "nf4")])
def test_merged_folder(random_model, tmp_path, call, capsys, size, base):
    model = random_model(models.size(size))
    hf.save(model, tmp_path / "base", dtype="float32")
    rng = np.random.default_rng(1)
    adapters = lora.create(model, CONFIG, jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), adapters)
    layers = lora.by_layer(model, adapters)
    peft.save(tmp_path / "adapter", model.config, layers, peft.Settings(2, 4.0, 0.0, False), None)
    arguments = [f"--checkpoint={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}"]
    arguments += [f"--base={base}"] if base else []
    assert call("merge", *arguments, f"--output={tmp_path / 'merged'}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"merged {len(layers)} kernels of rank 2; wrote {tmp_path / 'merged'}"
    )
    assert call("inspect", f"--checkpoint={tmp_path / 'merged'}") == 0
    assert capsys.readouterr().out.endswith(f"\n  merge of {tmp_path / 'base'}: the same key/value heads\n")
    found = checkpoints.load(tmp_path / "merged", **CHOICES)
    expected = lora.merge(checkpoints.load(tmp_path / "base", weights=base, **CHOICES), adapters, CONFIG)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), found, expected)


def test_an_adapter_of_another_model(random_model, tmp_path, call, capsys):
    model = random_model(models.size("llama_mini"))
    hf.save(model, tmp_path / "base", dtype="float32")
    narrow = random_model(models.replace(models.size("llama_mini"), d_ff=80))
    layers = lora.by_layer(narrow, lora.create(narrow, CONFIG, jax.random.key(0)))
    peft.save(tmp_path / "adapter", narrow.config, layers, peft.Settings(2, 4.0, 0.0, False), None)
    arguments = [f"--checkpoint={tmp_path / 'base'}", f"--adapter={tmp_path / 'adapter'}"]
    assert call("merge", *arguments, f"--output={tmp_path / 'merged'}") == 2
    assert capsys.readouterr().err == (
        f"error: the adapter in {tmp_path / 'adapter'} is of another model: base_model.model.model.layers.0.mlp."
        "down_proj.lora_A.weight has shape [2, 80]; expected [2, 96]\n"
    )
    assert not (tmp_path / "merged").exists()
