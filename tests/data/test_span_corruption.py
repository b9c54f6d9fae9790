import numpy as np
import pytest

from gqa.data import span_corruption
from gqa.data.span_corruption import (
    inputs_targets_lengths,
    noise_span_to_unique_sentinel,
    nonnoise_span_to_unique_sentinel,
    random_spans_noise_mask,
    tokens_length,
)

NOISE = (0.15, 3.0)


@pytest.mark.parametrize(
    # Figures of random_spans_helper and of the noise arithmetic of t5 0.9.4 (t5/data/preprocessors.py).
    ("inputs_length", "num_tokens", "targets_length"),
    [(64, 70, 14), (114, 126, 26), (128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)],
)
def test_lengths_are_those_of_t5(inputs_length, num_tokens, targets_length):
    assert tokens_length(inputs_length, *NOISE) == num_tokens
    assert inputs_targets_lengths(num_tokens, *NOISE) == (inputs_length, targets_length)


def test_a_product_at_a_half_is_rounded_as_in_float32():
    # 190 * 0.15 is 28.499999999999996 in float64 and 28.500002 in the float32 in which TensorFlow draws the mask.
    assert span_corruption.noise_counts(190, *NOISE) == (29, 10)


def test_spans_become_sentinels():
    tokens = np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    np.testing.assert_array_equal(noise_span_to_unique_sentinel(tokens, mask, 99), [11, 12, 99, 15, 16, 17, 18, 98, 20])
    np.testing.assert_array_equal(nonnoise_span_to_unique_sentinel(tokens, mask, 99), [99, 13, 14, 98, 19, 97])


@pytest.mark.parametrize("num_tokens", [2, 3, 4, 10, 29, 30, 141, 190, 568])
def test_mask_has_the_spans_and_density_it_promises(num_tokens):
    num_noise_tokens, num_noise_spans = span_corruption.noise_counts(num_tokens, *NOISE)
    for seed in range(20):
        mask = random_spans_noise_mask(num_tokens, *NOISE, np.random.default_rng(seed))
        assert mask.shape == (num_tokens,)
        assert mask.sum() == num_noise_tokens
        assert (np.diff(mask.astype(int), prepend=0) == 1).sum() == num_noise_spans
        assert not mask[0] and mask[-1]


def test_all_masks_are_equally_likely():
    # 20 tokens at density 0.3, spans of 3: 6 noise tokens in 2 spans, 14 others in 2: 5 * 13 masks.
    rng = np.random.default_rng(0)
    masks = [random_spans_noise_mask(20, 0.3, 3.0, rng).tobytes() for _ in range(6500)]
    counts = np.unique(masks, return_counts=True)[1]
    assert len(counts) == 65
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    assert chi_squared < 105  # 64 degrees of freedom: 0.1 % of uniform draws exceed it


def test_inputs_and_targets_give_the_tokens_back():
    tokens = np.random.default_rng(0).integers(3, 3996, 568)
    mask = random_spans_noise_mask(568, *NOISE, np.random.default_rng(1))
    inputs = noise_span_to_unique_sentinel(tokens, mask, 4095)
    targets = nonnoise_span_to_unique_sentinel(tokens, mask, 4095)
    # targets begin with sentinel 0, the inputs' first span ends before it
    spans, sentinel = {}, None
    for token in targets:
        if token >= 3996:
            spans[sentinel := token] = []
        else:
            spans[sentinel].append(token)
    rebuilt = [token for item in inputs for token in (spans[item] if item >= 3996 else [item])]
    np.testing.assert_array_equal(rebuilt, tokens)


def test_too_short_inputs_are_refused():
    with pytest.raises(ValueError, match="inputs_length=2"):
        tokens_length(2, *NOISE)
