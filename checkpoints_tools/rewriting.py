"""What convert and export share: a checkpoint opened to be written anew, tensor by tensor, with its provenance."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from gqa import checkpoints, models
from gqa.checkpoints import hf, hf_config
from gqa.checkpoints.sums import hashing_in_background
from gqa.checkpoints.table import parameters
from gqa.checkpoints.tensor import Tensor
from gqa.errors import InputError

PROVENANCE = "provenance.json"
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "safetensors")


class Source:
    """A checkpoint of any format, opened from its headers: architecture, stored dtype, parameters when asked for.

    Raises `InputError`, before any work, for a folder that is none and for a provenance that is no JSON object.
    """

    def __init__(self, directory: str):
        self._given = directory
        self.directory = Path(directory)
        choices = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none")
        self.contents = checkpoints.read(self.directory, dropout_rate=_dropout_rate(self.directory), **choices)
        file = self.directory / PROVENANCE
        self.provenance = hf_config.read_json(file) if file.is_file() else None
        self.config = self.contents.config
        self.abstract = models.abstract(self.config)
        self._shapes = {path: each.layer_shape for each in parameters(self.abstract) for path in each.paths}

    @property
    def dtype(self) -> str:
        """The narrowest of the dtypes that can be saved which holds every tensor without loss (of float64 apart)."""
        narrow = all(tensor.dtype == ml_dtypes.bfloat16 for tensor, _ in self.contents.tensors.values())
        return "bfloat16" if narrow else "float32"

    def read(self, path: str) -> np.ndarray:
        """One parameter of one layer by its path in our layout; says on stderr where it is not finite."""
        tensor, transform = self.contents.tensors[path]
        array = tensor.read()
        _warn_of_non_finite(tensor, array)
        return transform.to_ours(array, self._shapes[path])

    def write(
        self,
        output: Path,
        config: models.ModelConfig,
        read: Callable[[str], np.ndarray],
        dtype: str,
        choice: Mapping[str, Any],
        *,
        by_layer: bool = False,
    ) -> None:
        """Writes a new checkpoint made of this one, as `hf.write`: with its tokenizer files, sums and provenance.

        Tensors are written in the order in which the source holds them, which may hold one kind of all layers
        together; `by_layer`: one layer after the other.

        `choice` is what the command was told: it goes into the provenance, and an interrupted write goes on only
        where the choice and the weights are the same.
        """
        contents = self.contents
        choice = {
            **choice,
            "dtype": dtype,
            "kv_heads": {
                site: {"before": self.config.kv_heads(site), "after": config.kv_heads(site)}
                for site in models.FAMILIES[models.family_of(config)].sites
            },
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("gqa", *LIBRARIES)},
        }

        def other_files(sums: dict[str, str]) -> dict[str, bytes | Path]:
            provenance = {
                "command": shlex.join(["python", "-m", f"checkpoints_tools.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
                "source": {"path": self._given, "sha256": source_sums.result()},
                **choice,
                "sha256": dict(sums),
            }
            if self.provenance is not None:
                provenance["source_provenance"] = self.provenance
            copied = {file.name: file for file in contents.companions}
            return {PROVENANCE: (json.dumps(provenance, indent=2) + "\n").encode(), **copied}

        weights = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in contents.weight_files}
        identity = {"source": str(self.directory.absolute()), "weights": weights, **choice}
        order = () if by_layer else list(contents.tensors)
        with hashing_in_background(self.directory, contents.weight_files) as source_sums:
            hf.write(config, read, output, dtype, contents.token_ids, other_files, identity, order)


def check_output(output: Path, dtype: str | None) -> None:
    """Raises `InputError` for an output that is there already and a dtype that cannot be saved, before any work."""
    if output.name == "..":
        raise InputError(f"--output={output} ends in ..; expected the name of a new directory")
    if output.exists():
        raise InputError(f"--output={output} exists already; name a new directory")
    nearest = next(parent for parent in output.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise InputError(f"--output={output}: {nearest} is no directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--output={output}: nothing can be made in {nearest}")
    if dtype not in (None, *hf.SAVED_DTYPES):
        raise InputError(f"--dtype={dtype} is unknown; expected one of {', '.join(hf.SAVED_DTYPES)}")


def _dropout_rate(source: Path) -> float:
    rate = hf_config.read_json(source / hf.CONFIG).get("dropout_rate") if (source / hf.CONFIG).is_file() else None
    return float(rate) if isinstance(rate, int | float) and 0 <= rate < 1 else 0.0


def _warn_of_non_finite(tensor: Tensor, array: np.ndarray) -> None:
    flat = array.reshape(-1)
    if array.dtype == np.float32:
        with np.errstate(all="ignore"):
            finite = np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all()  # the product is 20 times faster
    elif array.dtype == ml_dtypes.bfloat16:
        finite = not ((flat.view(np.uint16) & 0x7F80) == 0x7F80).any()  # all bits of the exponent
    else:
        finite = np.isfinite(flat).all()
    if not finite:
        tqdm.write(f"warning: {tensor.name} of {tensor.file} holds NaN or infinite values", file=sys.stderr)
