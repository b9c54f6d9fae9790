"""What the comparisons with transformers on torch share."""

import importlib.util
import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import checkpoints
from gqa.checkpoints import hf
from gqa.models.heads import divisors
from gqa.objectives.language_model import cross_entropy

if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
else:  # the `parity` extra is not installed
    collect_ignore_glob = ["test_*.py"]


RUN = dict(dtype="float32", param_dtype="float32", remat="none", dropout_rate=0.0)


@pytest.fixture
def assert_close():
    """A function that compares arrays: the norm of the difference and each element, relative to the expected array."""

    def check(found, expected, tolerance: float, what: str) -> None:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape, what
        error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)
        assert error <= tolerance, f"{what}: relative error {error:.2e}"
        np.testing.assert_allclose(
            found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(), err_msg=what
        )

    return check


@pytest.fixture
def jitter_vectors():
    """A function that replaces norms' scales and biases, which start as ones and zeros, so that a mix-up shows."""

    def jitter(reference) -> None:
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_()
                elif parameter.ndim == 1:
                    assert "norm" in name
                    parameter.uniform_(0.5, 1.5)

    return jitter


@pytest.fixture
def reference_loss():
    """A function for the mean cross-entropy over the targets that are not masked."""

    def loss(logits, targets, real):
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (losses * real).sum() / real.sum()

    return loss


@pytest.fixture
def decoder_case(tmp_path, jitter_vectors):
    """A function (class of transformers, seed, other settings) -> a random decoder, its folder and a padded batch."""

    def make(config_class, seed: int, **settings) -> SimpleNamespace:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        num_heads = rng.choice([2, 4, 6, 8])
        sizes = dict(
            vocab_size=rng.randint(20, 60),
            hidden_size=num_heads * rng.choice([2, 4, 6]),
            intermediate_size=rng.choice([12, 20]),
            num_hidden_layers=rng.randint(1, 3),
            num_attention_heads=num_heads,
            num_key_value_heads={0: num_heads, 1: 1}.get(seed) or rng.choice(divisors(num_heads)),
            rms_norm_eps=rng.choice([1e-5, 1e-6]),
            tie_word_embeddings=seed % 3 == 2,
            # Large enough for attention to be far from uniform.
            initializer_range=0.4,
        )
        config = config_class(**sizes | settings)
        config._attn_implementation = "eager"
        reference = transformers.AutoModelForCausalLM.from_config(config).eval()
        jitter_vectors(reference)
        reference.save_pretrained(tmp_path / "stock")

        B, T = 3, rng.choice([7, 13, 22])
        tokens, targets = (np.random.default_rng(seed + i).integers(2, config.vocab_size, (B, T)) for i in range(2))
        segments = (np.arange(T) < np.array([[T], [T - 2], [1]])).astype(np.int32)
        return SimpleNamespace(
            reference=reference, directory=tmp_path / "stock", tokens=tokens, targets=targets, segments=segments
        )

    return make


@pytest.fixture
def check_decoder_gradients(assert_close, reference_loss):
    """A function (case, scan_layers): logits, loss and all gradients are the reference's."""

    def check(case, scan_layers: bool) -> None:
        model = checkpoints.load(case.directory, scan_layers=scan_layers, **RUN)

        @jax.jit
        def loss_and_gradients(model):
            def loss(model):
                logits = model(jnp.asarray(case.tokens), decoder_segments_BT=case.segments)
                sums = cross_entropy(logits, case.targets, case.segments, 0.0)
                return sums.loss_sum / sums.weight_sum, logits

            return jax.value_and_grad(loss, has_aux=True)(model)

        (loss, logits), gradients = loss_and_gradients(model)
        expected_logits = case.reference(
            input_ids=torch.tensor(case.tokens), attention_mask=torch.tensor(case.segments)
        ).logits
        expected_loss = reference_loss(expected_logits, torch.tensor(case.targets), torch.tensor(case.segments))
        expected_loss.backward()

        real = case.segments == 1
        assert_close(np.asarray(logits)[real], expected_logits.detach().numpy()[real], 1e-4, "logits")
        assert_close(loss, expected_loss.item(), 1e-4, "loss")
        found = dict(hf.named_tensors(gradients))
        expected = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient, 1e-4, name)

    return check


@pytest.fixture
def check_decoder_cache(assert_close):
    """A function (case): decoding with a cache gives the logits of the whole sequence, which are the reference's."""

    def check(case) -> None:
        stacked = checkpoints.load(case.directory, scan_layers=True, **RUN)
        B, T = case.tokens.shape
        full = jax.jit(lambda model: model(case.tokens))(stacked)
        assert_close(full, case.reference(input_ids=torch.tensor(case.tokens)).logits.detach(), 1e-4, "full forward")
        step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
        for model, chunk in ((stacked, 1), (stacked, 3), (stacked.unstacked(), 1)):
            cache, logits = model.init_cache(B, T + 2), []
            for first in range(0, T, chunk):
                chunk_logits, cache = step(model, case.tokens[:, first : first + chunk], cache)
                logits.append(chunk_logits)
            assert int(cache.index) == T
            assert_close(np.concatenate(logits, axis=1), full, 1e-5, f"chunks of {chunk}")

    return check


@pytest.fixture
def check_decoder_saved(tmp_path, assert_close):
    """A function (case) -> the stock model read from what `hf.save` wrote: of the reference's class and logits."""

    def check(case):
        hf.save(checkpoints.load(case.directory, scan_layers=True, **RUN), tmp_path / "saved", dtype="float32")
        reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
        assert type(reread) is type(case.reference)
        tokens = torch.tensor(case.tokens)
        assert_close(reread(tokens).logits.detach(), case.reference(tokens).logits.detach(), 1e-5, "logits")
        assert reread.config.rope_parameters == case.reference.config.rope_parameters
        return reread

    return check
