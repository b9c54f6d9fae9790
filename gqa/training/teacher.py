"""Distillation in the loop: what the teacher says of each batch, live or kept by step, and the loss that uses it."""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gqa import files, models
from gqa.errors import InputError
from gqa.models.observe import attention_outputs
from gqa.objectives.distillation import TopK, attention_error, attention_sizes, kl_to_teacher, top_k
from gqa.objectives.language_model import Sums, cross_entropy
from gqa.training.config import DistillationConfig, RunConfig
from gqa.training.state import digest

IDS, LOG_PROBS, BATCH = "teacher_ids", "teacher_log_probs", "batch"
ATTENTION, SIZES = "teacher_attention_", "teacher_sizes_"  # and a site


def distillation_loss(
    config: DistillationConfig, z_loss: float, dropout: bool
) -> Callable[[models.Model, Mapping, jax.Array, jax.Array], Sums]:
    """Cross-entropy of the text, the divergence from the teacher and the error of attention outputs, each weighted.

    The batch holds what `Teacher` added to it. `loss_sum` stays the text's, so that runs compare.
    """

    def loss_fn(model, batch, key, step):
        dropout_key = key if dropout else None
        teacher_attention, sizes = (
            {name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)}
            for prefix in (ATTENTION, SIZES)
        )
        if teacher_attention:
            logits_BTV, outputs = attention_outputs(model, batch, dropout_key)
        else:
            logits_BTV, outputs = models.apply(model, batch, dropout_key), {}
        weights = batch["loss_weights"]
        sums = cross_entropy(logits_BTV, batch["targets"], weights, z_loss)
        added = (config.text_weight - 1.0) * sums.loss_sum
        if config.kl_weight:
            added += config.kl_weight * kl_to_teacher(logits_BTV, TopK(batch[IDS], batch[LOG_PROBS]), weights)
        if teacher_attention:
            added += config.attention_weight * attention_error(outputs, teacher_attention, sizes, weights)
        return sums._replace(added_sum=added)

    return loss_fn


class Teacher:
    """Adds to a batch on the devices what the teacher says of it; reads that from the cache where it is there."""

    def __init__(
        self, run: RunConfig, model: models.Model, architecture: models.ModelConfig, corpus: Mapping[str, str]
    ):
        """`architecture` is the student's, `corpus` the digests of the text; the teacher and the cache must fit."""
        self._config, self._model = run.distillation, model
        family = models.family_of(architecture)
        for what, theirs, ours in (
            ("family", models.family_of(model.config), family),
            ("vocabulary size", model.config.vocab_size, architecture.vocab_size),
        ):
            if theirs != ours:
                raise InputError(f"distillation.teacher has {what} {theirs}, the model {ours}; expected the same")
        self._sites = [site for site in models.FAMILIES[family].sites if site != "encoder_self"]
        sizes = [(each.d_model, len(each.kv_heads("decoder_self"))) for each in (model.config, architecture)]
        if self._config.attention_weight > 0 and sizes[0] != sizes[1]:
            raise InputError(
                f"distillation.attention_weight={self._config.attention_weight} compares layer by layer: the teacher "
                f"has width and layers {sizes[0]}, the model {sizes[1]}; set it to 0"
            )
        if self._config.top_k is not None and self._config.top_k > architecture.vocab_size:
            raise InputError(
                f"distillation.top_k={self._config.top_k}; expected at most the vocabulary's {architecture.vocab_size}"
            )
        self._k = self._config.top_k or architecture.vocab_size
        self._say = jax.jit(self._said)
        self._cache = None
        if self._config.cache is not None:
            if jax.process_count() > 1:
                raise InputError("distillation.cache is for one process; leave it out")
            identity = {
                "teacher": digest(model),
                "corpus": dict(corpus),
                "seed": run.train.seed,
                "batch_size": run.train.batch_size,
                "top_k": self._k,
            }
            self._cache = _Cache(Path(self._config.cache), identity)

    def __call__(self, step: int, batch: Mapping) -> Mapping:
        """The batch of `step` with the teacher's arrays."""
        of_batch = _digest_of_batch(batch) if self._cache else None
        said = self._cache.read(step, of_batch) if self._cache else None
        if said is None:
            said = self._say(self._model, batch)
            if self._cache:
                self._cache.write(step, of_batch, jax.device_get(said))
        else:
            said = jax.device_put(said, batch["targets"].sharding)
        return {**batch, **said}

    def _said(self, model, batch) -> dict[str, jax.Array]:
        said = {}
        if self._config.attention_weight > 0:
            logits_BTV, outputs = attention_outputs(model, batch)
            for site in self._sites:
                said[ATTENTION + site] = jnp.stack(outputs[site], axis=1)
                said[SIZES + site] = attention_sizes(said[ATTENTION + site], batch["loss_weights"])
        else:
            logits_BTV = models.apply(model, batch)
        if self._config.kl_weight > 0:
            said[IDS], said[LOG_PROBS] = top_k(logits_BTV, self._k)
        return said


def _digest_of_batch(batch: Mapping[str, jax.Array]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(jax.device_get(dict(batch)).items()):
        found.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


class _Cache:
    """A file of arrays for each step, complete or not there."""

    def __init__(self, folder: Path, identity: Mapping):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        description = folder / "identity.json"
        text = json.dumps(identity, indent=2, sort_keys=True) + "\n"
        if not description.exists():
            files.write_text(description, text, shared=True)
        elif description.read_text(encoding="utf-8", errors="replace") != text:
            raise InputError(
                f"distillation.cache={folder} is of another teacher, text, seed, batch_size or top_k; choose another"
            )

    def read(self, step: int, of_batch: str) -> dict[str, np.ndarray] | None:
        path = self._folder / f"{step:08}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                kept, arrays = str(file[BATCH]), {name: file[name] for name in (IDS, LOG_PROBS)}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}); delete it") from error
        if kept != of_batch:
            raise InputError(f"{path} is of another batch: other lengths, vocabulary or mixture; choose another folder")
        return arrays

    def write(self, step: int, of_batch: str, arrays: Mapping[str, np.ndarray]) -> None:
        path = self._folder / f"{step:08}.npz"
        with files.whole(path, shared=True) as unfinished:
            np.savez(unfinished, **{BATCH: of_batch}, **arrays)
