import numpy as np
import pytest

from gqa.decode.buckets import padding_share

# Tokens of the inputs: median and spread (of the logarithm) as published document lengths have them, cut at what the
# paper reads (GQA §3.1).
SUMMARISATION = {
    "cnn_dailymail": (900, 0.5, 512),
    "arxiv": (7500, 0.7, 2048),
    "pubmed": (3600, 0.7, 2048),
    "media_sum": (1700, 0.8, 2048),
    "multi_news": (2000, 0.8, 2048),
}


def test_padding_share():
    assert padding_share([16, 16, 16, 16], 2) == 0
    assert padding_share([16, 20, 8, 24], 2) == 1 - 68 / (2 * 16 + 2 * 24)  # 8 and 16 together, 20 and 24 together
    assert padding_share([16, 16, 16], 2) == 1 - 48 / 64  # a batch has as many rows as any other
    assert padding_share([], 2) == 0


@pytest.mark.parametrize("task", SUMMARISATION)
def test_little_of_what_is_read_is_padding(task):
    median, spread, longest = SUMMARISATION[task]
    lengths = np.random.default_rng(0).lognormal(np.log(median), spread, 2000).astype(int).clip(8, longest).tolist()
    assert padding_share(lengths, 32) < 0.15
    assert padding_share(lengths, 1) < 0.15
