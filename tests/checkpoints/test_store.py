"""The store of training states: bit for bit, whatever becomes of the state meanwhile."""

import errno
import os
import random
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa.checkpoints import store as store_module
from gqa.checkpoints.store import Store, retained
from gqa.errors import InputError
from tests.reliability import mutilations


def state_of(seed: int) -> dict:
    """One array of each kind that a state has."""
    rng = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "kernel": jnp.asarray(rng.normal(size=(2, 256, 128)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16),
        "moments": ({"['a'].row": jnp.asarray(rng.normal(size=7), jnp.float32)}, None, []),
    }


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def test_a_state_comes_back(tmp_path):
    with Store(tmp_path / "checkpoints", keep=2) as store:
        assert store.latest_step() is None
        store.save(3, state_of(3))
        store.save(5, state_of(5))
        store.wait()
    with Store(tmp_path / "checkpoints", keep=2) as store:
        assert store.latest_step() == 5
        for step in (3, 5):
            restored = store.restore(step, abstract(state_of(0)))
            assert_equal(restored, state_of(step))
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_the_newest_stay(tmp_path):
    with Store(tmp_path, keep=2) as store:
        for step in (1, 2, 3, 4):
            store.save(step, state_of(step))
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_what_a_kill_left_beyond_those_that_stay_goes_once_the_newest_is_restored(tmp_path, monkeypatch):
    folders = (tmp_path / "steps", tmp_path / "mirror")

    def left():
        return [sorted(os.listdir(folder)) for folder in folders]

    with monkeypatch.context() as patch, Store(folders[0], keep=2, mirror=folders[1]) as store:
        patch.setattr(Store, "_thin", lambda *_: None)  # killed before it
        for step in (1, 2, 3, 4, 5):
            store.save(step, state_of(step))
    assert left() == 2 * [["1", "2", "3", "4", "5"]]
    with Store(folders[0], keep=2, mirror=folders[1]) as store:
        assert store.restore_newest(abstract(state_of(0)))[0] == 5
        store.thin({2: 0.5, 3: 0.7})
    assert left() == 2 * [["2", "4", "5"]]
    for folder in folders:
        (folder / "5" / "SHA256SUMS").unlink()
    with Store(folders[0], keep=1, mirror=folders[1]) as store:
        assert store.restore_newest(abstract(state_of(0)))[0] == 4
        store.thin({})
    assert left() == 2 * [["2", "4", "5"]], "the damaged one stands for none that is intact"


def test_a_step_is_on_the_disk_before_older_ones_go(tmp_path, monkeypatch):
    """As a power failure needs it: files and folders, then the name of the step, then the older step's end."""
    events, rename = [], Path.rename
    monkeypatch.setattr(store_module, "sync", lambda path: events.append(path))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append(target), rename(self, target)))
    with Store(tmp_path, keep=1) as store:
        store.save(1, state_of(1))
        store.wait()
        events.clear()
        store.save(2, state_of(2))
    named, gone = events.index(tmp_path / "2"), events.index(tmp_path / "1.unwanted")
    synced = {path.relative_to(tmp_path / "2.unfinished").as_posix() for path in events[:named]}
    assert synced == {".", *(path.relative_to(tmp_path / "2").as_posix() for path in (tmp_path / "2").rglob("*"))}
    assert tmp_path in events[named:gone]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """On a CPU the host's copy of an array may be the array itself, which the next step overwrites."""
    step_fn = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    with Store(tmp_path, keep=4) as store:
        for step in (1, 2, 3):
            state = state_of(step)
            store.save(step, state)
            state = step_fn(state)
            assert int(state["step"]) == -1
        store.wait()
        for step in (1, 2, 3):
            assert_equal(store.restore(step, abstract(state_of(0))), state_of(step))


@pytest.mark.parametrize("next_step", [2, 3])
def test_an_unfinished_checkpoint_is_none(tmp_path, next_step):
    """What a kill left of step 2 is neither found nor kept, whether or not step 2 is ever saved again."""
    with Store(tmp_path, keep=2) as store:
        store.save(1, state_of(1))
    (tmp_path / "2.unfinished").mkdir()
    (tmp_path / "2.unfinished" / "part").write_bytes(b"half")
    with Store(tmp_path, keep=2) as store:
        assert store.latest_step() == 1
        store.save(next_step, state_of(next_step))
        store.wait()
        assert_equal(store.restore(next_step, abstract(state_of(0))), state_of(next_step))
    assert sorted(os.listdir(tmp_path)) == ["1", str(next_step)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": jnp.zeros((2, 256, 64))}, "['kernel'] has shape (2, 256, 128), expected (2, 256, 64)"),
        ({"scale": jnp.zeros(4)}, "['scale'] has shape None, expected (4,)"),
        ({"half": None}, "['half'] has shape (3, 5), expected None"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    with Store(tmp_path, keep=1) as store:
        store.save(7, state_of(7))
        store.wait()
        with pytest.raises(InputError) as caught:
            store.restore(7, abstract(state_of(7) | change))
    assert str(caught.value) == f"checkpoint of step 7 is of another model: {message}"


def save_steps(folder: Path, *steps: int, **options) -> None:
    with Store(folder, keep=4, **options) as store:
        for step in steps:
            store.save(step, state_of(step), facts={"seconds": 2.0 * step})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in mutilations.files_of(folder)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_steps(folder, 1, 2)
    return folder


def test_what_was_told_about_a_step(two_steps):
    with Store(two_steps, keep=2) as store:
        assert store.restore_newest(abstract(state_of(0)))[0] == 2
        assert store.facts(2)["seconds"] == 4.0
        assert store.facts(1)["time"] <= store.facts(2)["time"]


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(8, 50))])
def test_a_damaged_step_is_skipped_with_one_line(two_steps, tmp_path, capfd, seed):
    """Anywhere: bytes flipped, cut, added, swapped, files deleted and renamed, the sums' own included."""
    folder = shutil.copytree(two_steps, tmp_path / "checkpoints")
    before = contents(folder / "2")
    rng = random.Random(seed)
    what = rng.choice(mutilations.ANYWHERE)(rng, folder / "2")
    expected = 2 if contents(folder / "2") == before else 1
    with Store(folder, keep=2) as store:
        step, state = store.restore_newest(abstract(state_of(0)))
        lines = capfd.readouterr().err.splitlines()
        assert step == expected, what
        assert_equal(state, state_of(step))
        if step == 1:
            assert len(lines) == 1, lines
            assert lines[0].startswith(f"warning: checkpoint of step 2 damaged ({folder}/2"), lines
            assert lines[0].endswith("; going on from step 1")
            # The next save, of whatever step, leaves nothing of it.
            store.save(3, state_of(3))
            store.wait()
            assert store.steps() == [1, 3]
        else:
            assert not lines


def test_stray_files_are_no_damage(two_steps, tmp_path, capfd):
    """Of a desktop in a step; with a step's name, a half-made and an unwanted one's beside them."""
    folder = shutil.copytree(two_steps, tmp_path / "checkpoints")
    for name in ("2/.DS_Store", "2/default/._manifest.ocdbt", "3", "7", "9.unfinished", "1.unwanted"):
        (folder / name).write_text("stray")
    with Store(folder, keep=1) as store:
        assert store.steps() == [1, 2]
        assert store.restore_newest(abstract(state_of(0)))[0] == 2
        (folder / "3.unfinished").write_text("stray")
        store.save(3, state_of(3))
        store.wait()
        assert_equal(store.restore(3, abstract(state_of(0))), state_of(3))
    assert sorted(os.listdir(folder)) == ["3", "7"]
    assert capfd.readouterr().err == ""


def test_what_cannot_be_removed_ends_no_run(tmp_path, capfd, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with Store(tmp_path, keep=1) as store:
        store.save(1, state_of(1))
        store.save(2, state_of(2))
    line = f"warning: {tmp_path}/1.unwanted could not be removed: Permission denied\n"
    assert capfd.readouterr().err == line
    with Store(tmp_path, keep=1) as store:
        assert store.steps() == [2]
    assert capfd.readouterr().err == line


def test_no_step_is_intact(two_steps, tmp_path, capfd):
    folder = shutil.copytree(two_steps, tmp_path / "checkpoints")
    for step in (1, 2):
        (folder / str(step) / "save.json").unlink()
    with Store(folder, keep=2) as store, pytest.raises(InputError) as caught:
        store.restore_newest(abstract(state_of(0)))
    assert str(caught.value) == (
        f"checkpoints of step 2, 1 damaged ({folder}/2/save.json is missing); there is no other: bring back a copy, "
        "or choose a new folder"
    )
    assert capfd.readouterr().err == ""


def test_which_steps_stay():
    """Saved at minutes 0, 10, 20, …: the newest, the best, one every 25 minutes."""
    steps, times = range(1, 9), {step: 600.0 * (step - 1) for step in range(1, 9)}
    assert retained(steps, 2, times, None, {}) == {7, 8}
    assert retained(steps, 2, times, None, {0: 0.1, 3: 2.0, 5: 1.5, 6: 1.5}) == {5, 7, 8}
    assert retained(steps, 1, times, 25.0, {}) == {1, 4, 7, 8}
    assert retained([2, 5], 1, {5: 0.0}, 25.0, {2: float("nan")}) == {5}


def test_the_best_stays(tmp_path):
    with Store(tmp_path, keep=1) as store:
        for step, losses in ((1, {1: 3.0}), (2, {1: 3.0, 2: 2.0}), (3, {1: 3.0, 2: 2.0, 3: 2.5}), (4, {2: 2.0})):
            store.save(step, state_of(step), losses=losses)
        store.wait()
        assert store.steps() == [2, 4]


def test_a_mirror_gives_back_what_is_lost_or_damaged(tmp_path, capfd):
    folder, mirror = tmp_path / "checkpoints", tmp_path / "mirror"
    save_steps(folder, 1, 2, mirror=mirror)
    assert contents(folder) == contents(mirror)
    (folder / "2" / "SHA256SUMS").unlink()
    with Store(folder, keep=4, mirror=mirror) as store:
        step, state = store.restore_newest(abstract(state_of(0)))
    assert step == 2 and contents(folder) == contents(mirror)
    assert_equal(state, state_of(2))
    assert capfd.readouterr().err == f"warning: {folder}/2 has no SHA256SUMS; its copy in {mirror} is used\n"
    shutil.rmtree(folder)
    (mirror / "2" / "default" / "manifest.ocdbt").write_bytes(b"half")
    with Store(folder, keep=4, mirror=mirror) as store:
        step, state = store.restore_newest(abstract(state_of(0)))
    assert step == 1
    assert_equal(state, state_of(1))


def test_a_mirror_does_not_keep_a_damaged_step_for_an_intact_one(tmp_path, capfd):
    folder, mirror = tmp_path / "checkpoints", tmp_path / "mirror"
    save_steps(folder, 1, 3, mirror=mirror)
    (mirror / "3" / "default" / "manifest.ocdbt").write_bytes(b"half")
    for save in (2, None):
        shutil.rmtree(folder)
        with Store(folder, keep=1, mirror=mirror) as store:
            step, _ = store.restore_newest(abstract(state_of(0)))
            assert step == (1 if save else 2)
            if save:
                store.save(save, state_of(save))
                store.wait()
                assert sorted(os.listdir(mirror)) == ["2"]


# TensorStore calls back into an event loop that Orbax closed when the first of several writes failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("limit", [0, 100_000, 500_000])
def test_a_disk_that_fills_up_during_a_save(tmp_path, capsys, limit):
    """Files cannot grow beyond a limit: none of them, the arrays', the one that is written after these."""
    folder, large = tmp_path / "checkpoints", tmp_path / "large"
    large.write_bytes(bytes(1_000_000))
    save_steps(folder, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(folder, keep=4) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            store.save(2, state_of(2), files=[large])
            store.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # On a busy machine the last of TensorStore's writes may follow the folder's removal; the next start ends it.
        assert set(os.listdir(folder)) - {"2.unfinished"} == {"1"}
        store.save(3, state_of(3))
        store.wait()
        for step in (1, 3):
            assert_equal(store.restore(step, abstract(state_of(0))), state_of(step))
    with Store(folder, keep=4) as store:
        assert set(os.listdir(folder)) == {"1", "3"}
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: checkpoint of step 2 could not be saved: File too large; the run goes on, older ones stay"
    ]


def test_later_steps_are_discarded(tmp_path):
    with Store(tmp_path / "checkpoints", keep=4, mirror=tmp_path / "mirror") as store:
        for step in (1, 2, 3):
            store.save(step, state_of(step))
        store.discard_after(1)
        assert store.steps() == [1]
