"""What the comparisons with transformers on torch share."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
else:  # the `parity` extra is not installed
    collect_ignore_glob = ["test_*.py"]


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
def jitter_norms():
    """A function that replaces the norms' scales, which are all one after initialisation, so that a mix-up shows."""

    def jitter(reference) -> None:
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                if parameter.ndim == 1:
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
