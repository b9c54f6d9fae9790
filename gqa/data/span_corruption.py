"""T5's span corruption (Raffel et al. 2020, §3.1.4), after `t5.data.preprocessors` of t5 0.9.4, in numpy.

Some spans of the tokens are noise. In the inputs each noise span is replaced by one sentinel; the targets are the noise
spans, each after the sentinel that stands for it. Both end with EOS:

    tokens   Thank you for inviting me to your party last week
    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets  <extra_id_0> for inviting <extra_id_1> last </s>
"""

import functools

import numpy as np

NOISE_DENSITY = 0.15  # share of tokens that are noise, T5 §3.1.4
MEAN_NOISE_SPAN_LENGTH = 3.0  # tokens, T5 §3.1.4


@functools.cache
def noise_counts(num_tokens: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """Number of noise tokens and of noise spans in `num_tokens` tokens: at least one of each, for any 2 tokens."""
    # float32, as TensorFlow rounds it: the two differ where the product lies at a half.
    num_noise_tokens = int(np.round(np.float32(num_tokens) * np.float32(noise_density)))
    num_noise_tokens = min(max(num_noise_tokens, 1), num_tokens - 1)
    num_noise_spans = int(np.round(np.float32(num_noise_tokens) / np.float32(mean_noise_span_length)))
    return num_noise_tokens, max(num_noise_spans, 1)


def inputs_targets_lengths(num_tokens: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """Length of the inputs and of the targets made of `num_tokens` tokens: sentinels and one EOS each included."""
    num_noise_tokens, num_noise_spans = noise_counts(num_tokens, noise_density, mean_noise_span_length)
    return num_tokens - num_noise_tokens + num_noise_spans + 1, num_noise_tokens + num_noise_spans + 1


def tokens_length(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> int:
    """Most tokens whose inputs fit `inputs_length`: 568 for T5's 512 (`random_spans_helper`).

    Raises `ValueError` where not even two tokens fit.
    """
    num_tokens = 2
    if inputs_targets_lengths(num_tokens, noise_density, mean_noise_span_length)[0] > inputs_length:
        raise ValueError(f"inputs_length={inputs_length} holds no corrupted span; expected 3 or more")
    while inputs_targets_lengths(num_tokens + 1, noise_density, mean_noise_span_length)[0] <= inputs_length:
        num_tokens += 1
    return num_tokens


def random_spans_noise_mask(
    num_tokens: int, noise_density: float, mean_noise_span_length: float, rng: np.random.Generator
) -> np.ndarray:
    """Mask bool[num_tokens] of random noise spans, every choice equally likely.

    Non-noise and noise spans alternate, beginning with non-noise: the last token is always noise.
    """
    num_noise_tokens, num_noise_spans = noise_counts(num_tokens, noise_density, mean_noise_span_length)
    noise = _random_segmentation(num_noise_tokens, num_noise_spans, rng)
    nonnoise = _random_segmentation(num_tokens - num_noise_tokens, num_noise_spans, rng)
    return np.repeat(np.tile([False, True], num_noise_spans), np.stack([nonnoise, noise], axis=1).reshape(-1))


def noise_span_to_unique_sentinel(tokens: np.ndarray, noise_mask: np.ndarray, first_sentinel: int) -> np.ndarray:
    """`tokens` with the i-th run of noise replaced by the id `first_sentinel - i`."""
    previous_is_noise = np.concatenate([[False], noise_mask[:-1]])
    first_noise = noise_mask & ~previous_is_noise
    sentinels = first_sentinel + 1 - np.cumsum(first_noise)
    return np.where(first_noise, sentinels, tokens)[~(noise_mask & previous_is_noise)]


def nonnoise_span_to_unique_sentinel(tokens: np.ndarray, noise_mask: np.ndarray, first_sentinel: int) -> np.ndarray:
    """`tokens` with the i-th run of non-noise replaced by the id `first_sentinel - i`."""
    return noise_span_to_unique_sentinel(tokens, ~noise_mask, first_sentinel)


def _random_segmentation(num_items: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths int[num_segments] of a random partition of `num_items` into non-empty segments."""
    first_in_segment = rng.permutation(np.arange(1, num_items) < num_segments)
    ends = np.append(np.flatnonzero(first_in_segment) + 1, num_items)
    ends[1:] -= ends[:-1].copy()
    return ends
