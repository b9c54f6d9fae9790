"""A reward model's folder: the decoder as any checkpoint of the Hugging Face layout, its head in a file beside it."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gqa import checkpoints
from gqa.checkpoints import hf, writer
from gqa.checkpoints.tensor import open_safetensors
from gqa.errors import InputError
from gqa.models.reward import RewardModel

HEAD = "reward_head.safetensors"
NAME = "score.weight"  # as transformers' classifiers call it, [1, D]


def save(
    model: RewardModel,
    directory: Path,
    *,
    token_ids: Mapping[str, int | list[int]] | None = None,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes a reward model in float32 to a new `directory`; arguments and errors as of `hf.save`."""
    head = np.asarray(jax.device_get(model.head[...]), np.float32)[None]
    entry = writer.Entry(NAME, head.shape, lambda: head)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / HEAD
        file.write_bytes(writer.safetensors_header([entry], head.dtype) + head.tobytes())
        extra_files = [*extra_files, file]
        hf.save(model.backbone, directory, dtype="float32", token_ids=token_ids, extra_files=extra_files)


def load(directory: Path, *, mesh: Mesh | None = None, **run_choices) -> RewardModel:
    """The reward model in `directory`; arguments and errors as of `gqa.checkpoints.load`."""
    directory = Path(directory)
    if directory.is_dir() and not (directory / HEAD).is_file():
        raise InputError(f"{directory} has no {HEAD}; expected a reward model that gqa.train wrote")
    backbone = checkpoints.load(directory, mesh=mesh, **run_choices)
    tensors = open_safetensors(directory / HEAD)
    width = backbone.config.d_model
    if list(tensors) != [NAME] or tensors[NAME].shape != (1, width):
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise InputError(f"{directory / HEAD} holds {found}; expected {NAME} of shape {[1, width]}")
    head = jnp.asarray(tensors[NAME].read()[0], backbone.config.param_dtype)
    return RewardModel(backbone, nnx.Param(head, axes=("embed",)))
