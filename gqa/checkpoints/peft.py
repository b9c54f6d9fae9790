"""LoRA adapters in the format of the `peft` library: `adapter_model.safetensors` and `adapter_config.json`.

Their `lora_A` is our `down`, their `lora_B` our `up`, each a matrix of torch's linear maps. An adapter is given as a
mapping of a layer's kernel, as the tables of checkpoints name it, to its `(down [in…, r], up [r, out…])`.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gqa import models
from gqa.checkpoints import hf, writer
from gqa.checkpoints.hf_config import read_json
from gqa.checkpoints.source import some
from gqa.checkpoints.table import Transform, parameters
from gqa.checkpoints.tensor import open_safetensors
from gqa.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASKS = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
# Settings of theirs that change what an adapter computes, and what each must be for ours to compute it.
_UNSUPPORTED = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "trainable_token_indices": ([], None),
    # Starts at which the base's own kernels change.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
    **dict.fromkeys(
        "alora_invocation_tokens arrow_config corda_config kasa_config layer_replication lora_ga_config "
        "monteclora_config use_bdlora use_qalora".split(),
        (None, False, [], {}),
    ),
}


class Settings(NamedTuple):
    """What `adapter_config.json` says beside the kernels."""

    rank: int
    alpha: float
    dropout_rate: float
    rank_stabilised: bool


def save(
    directory: Path,
    config: models.ModelConfig,
    adapter: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Settings,
    base: str | None,
) -> None:
    """Writes an adapter to a new `directory`, which appears only when it is complete.

    `base` is the name or folder of the model that it adapts, written for whoever loads it. Raises `InputError` when the
    directory exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory} exists already; choose a new folder")
    names = {row.path: (name.removesuffix(".weight"), row.transform) for name, row in hf.table(config).items()}
    entries = []
    for path, (down, up) in adapter.items():
        name, transform = names[path]
        for side, array, inputs in (("A", down, transform.input_axes), ("B", up, 1)):
            matrix = Transform("out_in", inputs).to_theirs(np.asarray(array, np.float32))
            entry = writer.Entry(f"{_PREFIX}{name}.lora_{side}.weight", matrix.shape, lambda matrix=matrix: matrix)
            entries.append(entry)
    entries.sort(key=lambda entry: entry.name)
    raw = {
        "peft_type": "LORA",
        "task_type": _TASKS[models.family_of(config)],
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout_rate,
        "use_rslora": settings.rank_stabilised,
        "target_modules": sorted({names[path][0].rpartition(".")[2] for path in adapter}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        with (temporary / WEIGHTS).open("wb") as file:
            file.write(writer.safetensors_header(entries, np.dtype(np.float32)))
            for entry in entries:
                file.write(np.ascontiguousarray(entry.make()).tobytes())
            file.flush()
            os.fsync(file.fileno())
        (temporary / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
        temporary.chmod(0o755)  # mkdtemp's folder is private
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(directory: Path, config: models.ModelConfig) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Settings]:
    """The adapter in a folder, in our layout, and its settings.

    Raises `InputError` for a folder that is none, for kinds other than plain LoRA, and where names or shapes are not
    those of a model of `config`.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise InputError(f"{directory} has no {name}; expected an adapter that peft saved")
    raw = read_json(directory / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{directory / CONFIG} has peft_type {raw.get('peft_type')!r}; expected LORA")
    for name, allowed in _UNSUPPORTED.items():
        if raw.get(name) not in allowed:
            raise InputError(f"{directory / CONFIG} has {name}={raw[name]!r}; expected {allowed[0]!r}")
    settings = _settings(raw, directory / CONFIG)
    names = {name.removesuffix(".weight"): row for name, row in hf.table(config).items()}
    shapes = {
        path: parameter.layer_shape for parameter in parameters(models.abstract(config)) for path in parameter.paths
    }
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in open_safetensors(directory / WEIGHTS).items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        row = names.get(match[1]) if match else None
        if row is None or row.transform.layout != "out_in":
            raise InputError(f"{directory / WEIGHTS} has {name}, which is no linear map of the model")
        shape, n = shapes[row.path], row.transform.input_axes
        ours = (*shape[:n], settings.rank) if match[2] == "A" else (settings.rank, *shape[n:])
        transform = Transform("out_in", n if match[2] == "A" else 1)
        if tensor.shape != transform.their_shape(ours):
            raise InputError(
                f"the adapter in {directory} is of another model: {name} has shape {list(tensor.shape)}; "
                f"expected {list(transform.their_shape(ours))}"
            )
        found.setdefault(row.path, {})[match[2]] = transform.to_ours(tensor.read().astype(np.float32), ours)
    single = sorted(path for path, pair in found.items() if len(pair) < 2)
    if single or not found:
        raise InputError(f"{directory / WEIGHTS} lacks one of lora_A and lora_B of {some(single) or 'every kernel'}")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}, settings


def _settings(raw: Mapping, path: Path) -> Settings:
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    good = type(rank) is int and 0 < rank < 100_000 and isinstance(alpha, int | float) and alpha > 0
    if not good or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{path} has r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r}; expected numbers")
    return Settings(rank, float(alpha), float(dropout), bool(raw.get("use_rslora")))
