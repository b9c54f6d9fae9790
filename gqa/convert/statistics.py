"""Calibration: the second moments of what each attention reads, in one pass over text; saved and used again.

Everything that the methods need of keys, queries and values follows from them and the weights (`heads.Moments`).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from gqa import files, models
from gqa.convert.heads import Moments
from gqa.convert.walk import LoadLayer, Stream, check_finite, num_all_layers, num_layers, sides
from gqa.errors import InputError

ENCODED = "encoder.outputs"  # what every cross-attention's keys and values read
ENOUGH = 4  # tokens for each dimension of the inputs, below which moments are said to be few


class Statistics:
    """Moments by the path of an attention, `decoder.3.cross_attention`; kept packed in float32, summed in float64."""

    def __init__(self, arrays: Mapping[str, np.ndarray], tokens: Mapping[str, int]):
        self._arrays, self._tokens = dict(arrays), dict(tokens)
        self._rows, self._encoded = None, None

    def moments(self, path: str) -> Moments:
        """Of one attention; raises `InputError` where these statistics were collected for other sites."""
        if f"{path}.query" not in self._arrays:
            raise InputError(f"the statistics have no moments of {path}; collect them for the sites to convert")
        query = unpacked(self._arrays[f"{path}.query"])
        of_encoded = path.endswith("cross_attention") and ENCODED in self._arrays
        return Moments(query, unpacked(self._arrays[ENCODED]) if of_encoded else query, self._tokens[path])

    def encoded(self, batches: Sequence[Mapping] | None) -> list | None:
        """The encoder's outputs, if these are the very rows that the statistics were collected on just now."""
        return self._encoded if batches is not None and batches is self._rows else None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(array.nbytes for array in self._arrays.values())

    def few(self) -> str | None:
        """A warning where there are too few tokens for the dimension, else None."""
        path = min(self._tokens, key=self._tokens.get)
        tokens, width = self._tokens[path], _side(self._arrays[f"{path}.query"]) - 1
        if tokens >= ENOUGH * width:
            return None
        return (
            f"{path} was calibrated on {tokens} tokens for a width of {width}; expected {ENOUGH * width} or more: "
            "give more text or rows"
            + ("" if tokens >= width else ", or none: weights alone say more than so few tokens")
        )

    def save(self, path: str | os.PathLike, fingerprint: str) -> None:
        """Writes one safetensors file, which appears complete; `fingerprint` says whose statistics these are."""
        path = Path(path)
        digest = _digest(self._arrays, self._tokens)
        metadata = {"fingerprint": fingerprint, "tokens": json.dumps(self._tokens), "digest": digest}
        with files.whole(path) as unfinished:
            save_file(self._arrays, unfinished, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, fingerprint: str) -> "Statistics":
        """Reads what `save` wrote; raises `InputError` for a damaged file and for another model's statistics."""
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
            arrays = load_file(path)
            tokens = json.loads(metadata["tokens"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path} holds no statistics of calibration: {error}") from error
        if metadata.get("fingerprint") != fingerprint:
            raise InputError(
                f"{path} holds the statistics of another checkpoint, text, number of rows, seed or choice of sites; "
                "delete it or name another file"
            )
        if metadata.get("digest") != _digest(arrays, tokens):
            raise InputError(f"{path} is damaged; delete it, and the statistics are collected again")
        if any(array.shape != _packed_shape(_side(array)) for array in arrays.values()):
            raise InputError(f"{path} is of an earlier version; delete it, and the statistics are collected again")
        return cls(arrays, tokens)


def packed(symmetric: np.ndarray) -> np.ndarray:
    """A symmetric matrix `[n, n]` in half the memory: `[n, (n + 1) / 2]` for an odd n, else `[n + 1, n / 2]`.

    The left half is kept whole; the lower right corner's triangle lies where the left half repeats itself, as in
    LAPACK's rectangular full packed format.
    """
    n = len(symmetric)
    rectangle = np.empty(_packed_shape(n), symmetric.dtype)
    left = rectangle.shape[1]
    rectangle[-n:] = symmetric[:, :left]
    np.copyto(_corner(rectangle), symmetric[left:, left:], where=np.tri(n - left, dtype=bool).T)
    return rectangle


def unpacked(rectangle: np.ndarray) -> np.ndarray:
    """The symmetric matrix that `packed` made `rectangle` of."""
    n, left = _side(rectangle), rectangle.shape[1]
    symmetric = np.empty((n, n), rectangle.dtype)
    symmetric[:left, :left] = _mirrored(rectangle[-n:][:left])
    symmetric[left:, :left] = rectangle[-n:][left:]
    symmetric[:left, left:] = symmetric[left:, :left].T
    symmetric[left:, left:] = _mirrored(_corner(rectangle).T)
    return symmetric


def _packed_shape(n: int) -> tuple[int, int]:
    return n + 1 - n % 2, (n + 1) // 2


def _side(rectangle: np.ndarray) -> int:
    """n of the `[n, n]` that is packed in `rectangle`."""
    rows, columns = rectangle.shape
    return rows - (rows > 2 * columns)


def _corner(rectangle: np.ndarray) -> np.ndarray:
    """Where the upper triangle of the lower right corner lies in a packed matrix."""
    left = rectangle.shape[1]
    size = _side(rectangle) - left
    return rectangle[:size, left - size :]


def _mirrored(lower: np.ndarray) -> np.ndarray:
    """The symmetric matrix of a lower triangle."""
    return np.where(np.tri(len(lower), dtype=bool), lower, lower.T)


def fingerprint(shell: models.Model, load_layer: LoadLayer) -> str:
    """A digest that tells checkpoints apart: of the architecture and all parameters, one layer in memory at a time."""
    digest = hashlib.sha256(repr(shell.config).encode())

    def add(module) -> None:
        for leaf in jax.tree.leaves(module):
            digest.update(np.ascontiguousarray(leaf).tobytes())

    add(shell)
    with tqdm(total=num_all_layers(shell.config), desc="fingerprint", unit="layer", delay=1) as bar:
        for side in sides(shell.config):
            for number in range(num_layers(shell.config, side)):
                add(load_layer(side, number))
                bar.update()
    return digest.hexdigest()


def _digest(arrays: Mapping[str, np.ndarray], tokens: Mapping[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(tokens, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def collect(shell: models.Model, load_layer: LoadLayer, batches: Sequence[Mapping], sites: Sequence[str]) -> Statistics:
    """The moments of every attention at `sites`, in one pass of the model over the rows of `batches`.

    Args:
      shell: the model without layers (`walk.shell_of`).
      load_layer: gives its layers, each asked for once, in order.
      batches: arrays by name, as `gqa.data.loader` makes them.
      sites: such as decoder_self, cross.

    Raises `InputError` without a token, and, naming the layer, where activations are not finite.
    """
    if not batches:
        raise InputError("there is no calibration text; give one row of it or more")
    present = sides(shell.config)
    arrays: dict[str, np.ndarray] = {}
    tokens: dict[str, int] = {}
    encoded = None
    with tqdm(total=num_all_layers(shell.config), desc="calibrate", unit="layer", delay=1) as bar:
        for side, attentions in present.items():
            stream = Stream(shell, side, batches, encoded)
            wanted = {site: name for site, name in attentions.items() if site in sites}
            of_encoded = stream.encoded_sums() if "cross" in wanted else None
            for number in range(num_layers(shell.config, side)):
                found = stream.observe(load_layer(side, number), tuple(wanted.values()))
                for site, query in zip(wanted, found, strict=True):
                    path = models.site_path(site, number)
                    key_value = of_encoded if site == "cross" else query
                    for sums in (query, key_value):
                        check_finite(sums, f"what {path} reads: its activations on the calibration text")
                    tokens[path] = int(min(query[-1, -1], key_value[-1, -1]))
                    if not tokens[path]:
                        raise InputError(f"{path} reads no token of the calibration text; give more text or rows")
                    arrays[f"{path}.query"] = packed((query / query[-1, -1]).astype(np.float32))
                    if site == "cross" and ENCODED not in arrays:
                        arrays[ENCODED] = packed((key_value / key_value[-1, -1]).astype(np.float32))
                bar.update()
            encoded = stream.encoded() if side == "encoder" else encoded
    statistics = Statistics(arrays, tokens)
    statistics._rows, statistics._encoded = batches, encoded
    return statistics


def assumed(shell: models.Model, layer, site: str, name: str) -> Moments:
    """Moments where there is no text: inputs without correlation, of the sizes that the norm before them gives."""

    def moments(norm) -> np.ndarray:
        return np.diag(np.append(np.square(np.asarray(norm.scale[...], np.float64)), 1.0))

    query = moments(getattr(layer, f"{name}_norm"))
    return Moments(query, moments(shell.encoder_norm) if site == "cross" else query, tokens=0)
