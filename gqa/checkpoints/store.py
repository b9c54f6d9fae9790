"""Our own store of training states: Orbax, asynchronous, atomic, one folder a step."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from gqa.errors import InputError


class Store:
    """Checkpoints of a run under `directory/<step>/`; the newest `keep` of them stay.

    A state is any pytree of arrays; it is stored as a flat dictionary keyed by `jax.tree_util.keystr`, so that a
    checkpoint can be read without the classes that made it.
    """

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # what a kill during a save left behind
        )
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(), options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state) -> None:
        """Copies `state` off the device and writes it in the background; it appears atomically."""
        self._manager.save(step, args=ocp.args.StandardSave(_flat(state)), force=True)

    def restore(self, step: int, like):
        """The state of `step`, shaped, typed and placed as `like` (arrays or `ShapeDtypeStruct`s with shardings).

        Raises `InputError` when the checkpoint holds another model.
        """
        wanted = _flat(like)
        expected = {key: tuple(leaf.shape) for key, leaf in wanted.items()}
        found = {key: tuple(leaf.shape) for key, leaf in self._manager.item_metadata(step).items()}
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                raise InputError(
                    f"checkpoint of step {step} is of another model: {key} has shape {found.get(key)}, "
                    f"expected {expected.get(key)}"
                )
        flat = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in wanted])

    def wait(self) -> None:
        """Returns when everything is on disk; raises what a background write raised."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        """Waits and releases the background threads."""
        self._manager.close()


def _flat(tree) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
