"""Adapters in and out of the `peft` library: the same logits on both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import models
from gqa.adapters import lora
from gqa.checkpoints import hf, peft
from gqa.errors import InputError

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

# peft asks transformers for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = lora.LoRAConfig(("*",), rank=3, alpha=12.0, dropout_rate=0.0, rank_stabilised=True)
SETTINGS = peft.Settings(3, 12.0, 0.0, True)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 9))


@pytest.fixture(scope="module")
def model(random_model):
    sizes = dict(vocab_size=96, d_model=32, num_heads=4, head_dim=8, d_ff=48, num_layers=2, decoder_self_kv_heads=2)
    return random_model(models.replace(models.size("llama_mini"), **sizes))


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "base"
    hf.save(model, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def adapters(model):
    rng = np.random.default_rng(1)
    fresh = lora.create(model, CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32), fresh)


def logits_of_peft(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


def test_our_adapter_in_peft_and_back(model, base, adapters, tmp_path):
    peft.save(tmp_path / "adapter", model.config, lora.by_layer(model, adapters), SETTINGS, str(base))
    ours = np.asarray(jax.jit(lambda model: model(TOKENS))(lora.attach(model, adapters, CONFIG)))
    np.testing.assert_allclose(logits_of_peft(base, tmp_path / "adapter"), ours, atol=1e-4 * np.abs(ours).max())
    layers, settings = peft.load(tmp_path / "adapter", model.config)
    assert settings == SETTINGS
    jax.tree.map(np.testing.assert_array_equal, lora.from_layers(model, CONFIG, layers), adapters)
    with pytest.raises(InputError, match="exists already; choose a new folder"):
        peft.save(tmp_path / "adapter", model.config, lora.by_layer(model, adapters), SETTINGS, None)


def test_their_adapter_in_ours(model, base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    theirs = get_peft_model(theirs, wanted).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    layers, settings = peft.load(tmp_path / "adapter", model.config)
    config = lora.LoRAConfig(("self_attention.query", "self_attention.value", "self_attention.out"), *settings)
    assert config.scale == 2
    merged = lora.merge(model, lora.from_layers(model, config, layers), config)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(
        jax.jit(lambda model: model(TOKENS))(merged), expected, atol=1e-4 * np.abs(expected).max()
    )


def test_adapters_that_are_refused(model, adapters, tmp_path):
    folder = tmp_path / "adapter"
    peft.save(folder, model.config, lora.by_layer(model, adapters), SETTINGS, None)
    with pytest.raises(InputError, match=r"has no adapter_config\.json; expected an adapter that peft saved"):
        peft.load(tmp_path, model.config)
    wider = models.replace(model.config, d_model=40)
    with pytest.raises(InputError, match=r"is of another model: base_model\.model\.model\.layers\.0\.mlp\.down_proj"):
        peft.load(folder, wider)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.lora_A\.weight, which is no linear map"):
        peft.load(folder, models.replace(model.config, num_layers=1))
    raw = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; expected LORA"),
        ({"use_dora": True}, "has use_dora=True; expected False"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'; expected True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication=.*; expected None"),
        ({"r": "8"}, "has r='8'"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(raw | change))
        with pytest.raises(InputError, match=message):
            peft.load(folder, model.config)
