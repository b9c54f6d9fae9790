"""The way back: key/value heads written several times, for readers that know fewer numbers of them; the same function.

Query head `h` reads key/value head `h // (H / K)`: K heads, each repeated next to itself, compute what they computed.
Pooling the copies by `mean` or `first` gives the heads back bit for bit.
"""

from collections.abc import Callable, Mapping

import numpy as np

from gqa import models
from gqa.models.heads import KVHeads

# Of an attention, the parameters with an axis of key/value heads, the last but one.
_REPEATED = ("key", "value", "key_bias", "value_bias")


def repeat_lazily(
    config: models.ModelConfig, read: Callable[[str], np.ndarray], kv_heads: Mapping[str, KVHeads]
) -> tuple[models.ModelConfig, Callable[[str], np.ndarray]]:
    """A model with `kv_heads` key/value heads at the named sites, multiples of the present ones, made when asked for.

    Args:
      config: of the model.
      read: gives a parameter of one layer by its path, `decoder.3.self_attention.key`, in our layout.
      kv_heads: site -> its new number of key/value heads, one for all layers or one per layer.

    Returns:
      The new configuration, and the new model's `read`.
    """
    new_config = models.replace(config, **{f"{site}_kv_heads": number for site, number in kv_heads.items()})
    copies = {}  # path of an attention -> copies of each head
    for site in kv_heads:
        for layer, (old, new) in enumerate(zip(config.kv_heads(site), new_config.kv_heads(site), strict=True)):
            assert new % old == 0, (site, layer, old, new)
            copies[models.site_path(site, layer)] = new // old

    def read_repeated(path: str) -> np.ndarray:
        attention, _, name = path.rpartition(".")
        number = copies.get(attention, 1) if name in _REPEATED else 1
        return np.repeat(read(path), number, axis=-2) if number > 1 else read(path)

    return new_config, read_repeated
