"""Repeated heads stand next to each other, where their query heads look for them."""

import numpy as np
import pytest

from gqa import models
from gqa.convert.repeat import repeat_lazily

CONFIG = models.replace(models.size("llama_mini"), decoder_self_kv_heads=(2, 1), qkv_bias=True)


@pytest.fixture
def read():
    """Parameters whose every value is the number of its key/value head."""
    shapes = {"key": (3, -1, 2), "value": (3, -1, 2), "key_bias": (-1, 2), "value_bias": (-1, 2)}

    def read(path: str) -> np.ndarray:
        _, layer, *_, name = path.split(".")
        if name not in shapes:
            return np.arange(8.0).reshape(4, 2)
        heads = np.arange(CONFIG.kv_heads("decoder_self")[int(layer)])
        return np.broadcast_to(heads[:, None], [len(heads) if n == -1 else n for n in shapes[name]])

    return read


def test_heads_by_layer(read):
    config, repeated = repeat_lazily(CONFIG, read, {"decoder_self": 4})
    assert config == models.replace(CONFIG, decoder_self_kv_heads=4)
    for layer, expected in ((0, [0, 0, 1, 1]), (1, [0, 0, 0, 0])):
        for name in ("key", "value", "key_bias", "value_bias"):
            found = repeated(f"decoder.{layer}.self_attention.{name}")
            assert found.shape == (*((3,) if found.ndim == 3 else ()), 4, 2)
            assert (found == np.asarray(expected)[:, None]).all(), (layer, name)


def test_the_rest_stays(read):
    _, repeated = repeat_lazily(CONFIG, read, {"decoder_self": (2, 2)})
    for path in ("self_attention.query_bias", "self_attention.key_norm.scale", "mlp.down", "self_attention.key"):
        path = f"decoder.0.{path}"
        np.testing.assert_array_equal(repeated(path), read(path))
    assert repeated("decoder.1.self_attention.key").shape == (3, 2, 2)
