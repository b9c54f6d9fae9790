"""Going back to a checkpoint when training has gone astray."""

import collections

import jax
import numpy as np

from gqa.checkpoints.store import Store
from gqa.errors import InputError
from gqa.training.state import TrainState

_TIMES = 3  # back to one step before the run is given up


class RollBacks:
    """Takes a run back to its newest checkpoint before a step, to go on from there with batches it has not seen.

    The same batches would lead to the same end: the state gets the index of the next new one, and the learning rate
    and random keys of the steps that are taken again.
    """

    def __init__(self, store: Store, like: TrainState):
        self._store, self._like = store, like
        self._counts: collections.Counter[int] = collections.Counter()

    def back(self, until: int, batch_index: int) -> tuple[int, TrainState]:
        """The newest intact step up to `until`, later ones removed, and its state with `batch_index` as next batch.

        Raises `InputError` when there is none, or when the run came back to it too often.
        """
        self._store.wait()
        found = self._store.restore_newest(self._like, until)
        if found is None:
            raise InputError(f"updates are left out after step {until}, and no checkpoint is before them; {_ADVICE}")
        step, state = found
        self._counts[step] += 1
        if self._counts[step] > _TIMES:
            raise InputError(f"updates are left out after {_TIMES} roll-backs to step {step} too; {_ADVICE}")
        self._store.discard_after(step)
        return step, state._replace(batch=jax.device_put(np.int32(batch_index), self._like.batch.sharding))


_ADVICE = "lower the learning rate, or raise train.skip_above"
