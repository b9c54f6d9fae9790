"""Preferences as objectives of the one loop: DPO against a reference, and the ranking loss of a reward model."""

import dataclasses
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gqa import files, models
from gqa.data import loader
from gqa.data.conversations import RATINGS
from gqa.data.corpus import SPLITS
from gqa.errors import InputError
from gqa.models.reward import RewardModel
from gqa.objectives.dpo import LOSSES, Pair, dpo
from gqa.objectives.language_model import Sums
from gqa.objectives.log_probs import segment_sums, target_log_probs
from gqa.objectives.reward import ranking_loss
from gqa.training.state import Batch, digest, place_batch

REFERENCES = ("cached", "live")
REFERENCE = "reference"  # name of the reference's log-probabilities in a batch, [B, 2 max_pairs]


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation; the reference is the checkpoint that the run starts from."""

    beta: float  # how dear it is to leave the reference (OpenBezoar: 0.1)
    loss: str  # sigmoid (DPO eq. 7) or ipo
    label_smoothing: float  # share of labels taken to be wrong (cDPO); 0: none
    length_normalised: bool  # log-probabilities over the number of a response's tokens
    reference: str  # cached: scored once, kept beside the records; live: a second model stays in memory

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise InputError(f"dpo.beta={self.beta}; expected a number above 0, such as 0.1")
        for name, value, choices in (("loss", self.loss, LOSSES), ("reference", self.reference, REFERENCES)):
            if value not in choices:
                raise InputError(f"dpo.{name}={value!r}; expected one of {', '.join(choices)}")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss == "ipo"):
            raise InputError(
                f"dpo.label_smoothing={self.label_smoothing} with loss {self.loss}; expected [0, 0.5), with ipo 0"
            )


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A reward model: the checkpoint that the run starts from, with a head for scores."""

    margins: tuple[float, ...]  # by rating, from the least distinct (Llama 2 table 27); all 0: no margin

    def __post_init__(self):
        if len(self.margins) != len(RATINGS) or not all(0 <= margin < math.inf for margin in self.margins):
            raise InputError(
                f"reward.margins={self.margins}; expected {len(RATINGS)} numbers of at least 0, "
                f"for {', '.join(RATINGS)}"
            )


def dpo_loss(config: DPOConfig, dropout: bool) -> Callable[[models.Model, Mapping, jax.Array, jax.Array], Sums]:
    """DPO's loss, summed over pairs; the batch holds what `Reference` added to it."""

    def loss_fn(model, batch, key, step):
        sums, lengths = response_log_probs(model, batch, key if dropout else None)
        found = dpo(
            _pair(sums),
            _pair(batch[REFERENCE]),
            beta=config.beta,
            loss=config.loss,
            label_smoothing=config.label_smoothing,
            lengths=_pair(lengths) if config.length_normalised else None,
        )
        weights_BP = (batch["pairs"] > 0).astype(jnp.float32)
        named = {
            "margin": found.margin,
            "chosen_reward": found.rewards.chosen,
            "rejected_reward": found.rewards.rejected,
            "chosen_log_prob": sums[:, 0::2],
        }
        return _sums(found.loss, found.correct, weights_BP, named)

    return loss_fn


def reward_loss(config: RewardConfig, dropout: bool) -> Callable[[RewardModel, Mapping, jax.Array, jax.Array], Sums]:
    """The ranking loss with a margin by rating, summed over pairs; accuracy overall and of each rating."""

    def loss_fn(model, batch, key, step):
        scores = _pair(response_scores(model, batch, key if dropout else None))
        ratings_BP = batch["ratings"]
        margins_BP = jnp.array((0.0, *config.margins))[ratings_BP]
        weights_BP = (batch["pairs"] > 0).astype(jnp.float32)
        correct_BP = (scores.chosen > scores.rejected).astype(jnp.float32)
        losses_BP = ranking_loss(scores.chosen, scores.rejected, margins_BP)
        named = {"margin": scores.chosen - scores.rejected, "chosen_score": scores.chosen}
        sums = _sums(losses_BP, correct_BP, weights_BP, named)
        for number, rating in enumerate(RATINGS, start=1):
            of_rating_BP = weights_BP * (ratings_BP == number)
            name = "accuracy_" + rating.split(" /")[0].replace(" ", "_")
            sums.named[name] = (jnp.sum(correct_BP * of_rating_BP), jnp.sum(of_rating_BP))
        return sums

    return loss_fn


def response_log_probs(model: models.Model, batch: Mapping, dropout_key=None) -> tuple[jax.Array, jax.Array]:
    """Sum of the log-probabilities of each packed response's trained tokens, and their number: `[B, 2 max_pairs]`."""
    num_segments = 2 * batch["pairs"].shape[1]
    log_probs_BT = target_log_probs(models.apply(model, batch, dropout_key), batch["targets"])
    weights_BT = batch["loss_weights"]
    return tuple(
        segment_sums(values_BT, batch["targets_segments"], num_segments)
        for values_BT in (log_probs_BT * weights_BT, weights_BT)
    )


def response_scores(model: RewardModel, batch: Mapping, dropout_key=None) -> jax.Array:
    """Each packed response's score, read at its last token: `[B, 2 max_pairs]`."""
    segments_BT = batch["targets_segments"]
    is_last_BT = segments_BT != jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    scores_BT = jnp.where(is_last_BT, model(batch, dropout_key), 0.0)
    return segment_sums(scores_BT, segments_BT, 2 * batch["pairs"].shape[1])


class Reference:
    """Adds to a batch of pairs the reference model's log-probabilities of both responses."""

    def __init__(self, config: DPOConfig, model: models.Model, records: Path, batch_size: int, mesh: Mesh):
        """`batch_size` and `mesh`: how the records are scored where they are cached, unless that lies beside them."""
        self._say = jax.jit(lambda model, batch: response_log_probs(model, batch)[0])
        self._live = config.reference == "live"
        if not self._live and jax.process_count() > 1:
            raise InputError(f"dpo.reference={config.reference} is for one process; nearest: live")
        self._model, self._cached = model, None
        self._where = (records, batch_size, mesh)

    def __call__(self, split: str, batch: Mapping, placed: Batch) -> Batch:
        """`placed` with the reference's log-probabilities; `batch` is the same batch on the host."""
        if self._live:
            return {**placed, REFERENCE: self._say(self._model, placed)}
        if self._cached is None:
            self._cached = self._read_or_score(self._model, *self._where)
            self._model = None  # no second model beside the one that is trained
        numbers_BP = batch["pairs"]
        both = self._cached[split][numbers_BP].reshape(len(numbers_BP), -1)
        return {**placed, REFERENCE: jax.device_put(both, placed["targets"].sharding)}

    def _read_or_score(self, model, records: Path, batch_size: int, mesh: Mesh) -> dict[str, np.ndarray]:
        path = Path(records) / f"reference-{digest(model)[:16]}.npz"
        if path.is_file():
            try:
                with np.load(path, allow_pickle=False) as file:
                    return {split: file[split] for split in SPLITS}
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} is damaged ({error}); delete it") from error
        scored = {}
        for split in SPLITS:
            batches = loader.ordered_batches(records, split, batch_size)
            numbers, log_probs = [], []
            for step in tqdm(range(len(batches)), desc=f"reference, {split}", unit="batch", delay=1):
                batch = batches(step)
                numbers.append(batch["pairs"])
                with jax.set_mesh(mesh):
                    log_probs.append(jax.device_get(self._say(model, place_batch(mesh, batch))))
            numbers = np.concatenate(numbers).reshape(-1)
            scored[split] = np.zeros((numbers.max() + 1, 2), np.float32)
            scored[split][numbers] = np.concatenate(log_probs).reshape(-1, 2)
            scored[split][0] = 0.0  # number 0 is no pair
        with files.whole(path, shared=True) as unfinished:
            np.savez(unfinished, **scored)
        return scored


def _pair(values_BN: jax.Array) -> Pair:
    return Pair(values_BN[:, 0::2], values_BN[:, 1::2])


def _sums(losses_BP, correct_BP, weights_BP, named: Mapping[str, jax.Array]) -> Sums:
    total = jnp.sum(weights_BP)
    return Sums(
        loss_sum=jnp.sum(losses_BP * weights_BP),
        z_loss_sum=jnp.zeros(()),
        correct_sum=jnp.sum(correct_BP * weights_BP),
        weight_sum=total,
        added_sum=jnp.zeros(()),
        named={name: (jnp.sum(values_BP * weights_BP), total) for name, values_BP in named.items()},
    )
