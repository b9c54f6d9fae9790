"""The table of axes, and eight devices against one; run by itself, this file is the eight devices' part.

`XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/test_sharding.py CONFIG_AS_JSON MESH …`
"""

import dataclasses
import json
import logging
import math
import os
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from gqa import models
from gqa.data import loader
from gqa.decode import generate
from gqa.errors import InputError
from gqa.sharding import MESH_AXES, MeshConfig, logical_axes, make_mesh, partition_spec
from gqa.training import config as run_config
from gqa.training import optimizer as optimizers
from gqa.training.loop import language_model_loss
from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch

FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
STEPS = 6
MESHES = {
    "one": dict(),
    "slice2_fsdp2_tensor2": dict(slice=2, fsdp=2, tensor=2),
    "data2_sequence2_tensor2": dict(data=2, sequence=2, tensor=2),
    "data8": dict(data=8),
    "fsdp8": dict(fsdp=8),
    "tensor8": dict(tensor=8),
    "data2_tensor4": dict(data=2, tensor=4),
    "slice2_data2_sequence2": dict(slice=2, data=2, sequence=2),
}
CORE = {"t5": "slice2_fsdp2_tensor2", "llama": "data2_sequence2_tensor2"}
# Key/value heads below, equal to and above the tensor degree 2, of 8 query heads; T5 wide enough for Adafactor to
# factor its moments. At the full rate, Adafactor would make a large update of a gradient's rounding noise near zero.
OVERRIDES = {
    "t5": {
        "model.changes.d_model": 128,
        "model.changes.head_dim": 16,
        "model.changes.d_ff": 128,
        "model.changes.encoder_self_kv_heads": 8,
        "model.changes.decoder_self_kv_heads": 2,
        "model.changes.cross_kv_heads": 1,
        "optimizer.learning_rate": 0.1,
    },
    "llama": {
        "model.changes.num_layers": 3,
        "model.changes.decoder_self_kv_heads": (8, 2, 1),
        "optimizer": dict(name="adamw", schedule="constant", learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-5),
    },
}


def abstract_mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


@pytest.mark.parametrize(
    ("mesh", "axes", "shape", "spec"),
    [
        (dict(fsdp=2, tensor=2), ("embed", "heads", "head_dim"), (32, 8, 4), ("fsdp", "tensor", None)),
        (dict(fsdp=2, tensor=2), ("embed", "heads", "head_dim"), (3, 32, 8, 4), (None, "fsdp", "tensor", None)),
        (dict(fsdp=2, tensor=2), ("vocab", "embed"), (256, 32), ("tensor", "fsdp")),
        (dict(data=2, fsdp=2), ("batch", "length"), (8, 16), (("data", "fsdp"), None)),
        (dict(fsdp=2, tensor=4), ("batch", "length"), (8, 16), ("fsdp", None)),
        # Parameters are the same on all slices, which cut the batch.
        (dict(slice=2, fsdp=2), ("embed", "mlp"), (32, 64), ("fsdp", None)),
        (dict(slice=2, fsdp=2), ("batch", "length", "activation"), (8, 16, 32), (("slice", "fsdp"), None, None)),
        (dict(sequence=4), ("batch", "length", "activation"), (8, 16, 32), (None, "sequence", None)),
        (dict(sequence=4), ("batch", "length", "activation"), (8, 18, 32), (None, None, None)),
        (dict(sequence=4, tensor=2), ("batch", "kv_heads", "kv_length", "head_dim"), (8, 2, 16, 4), (None, "tensor")),
        (dict(tensor=4), ("embed", "kv_heads", "head_dim"), (32, 8, 4), (None, "tensor", None)),
        (dict(tensor=4), ("embed", "kv_heads", "head_dim"), (32, 4, 4), (None, "tensor", None)),
        (dict(tensor=4), ("embed", "kv_heads", "head_dim"), (32, 2, 4), (None, None, None)),  # K below the degree
        (dict(tensor=4), (None, "vocab"), (8, 147), (None, None)),
    ],
)
def test_the_table(mesh, axes, shape, spec):
    found = partition_spec(abstract_mesh(**mesh), axes, shape)
    assert found == PartitionSpec(*spec, *(None,) * (len(shape) - len(spec)))


def test_a_replicated_dimension_is_logged_once(caplog):
    for _ in range(3):
        partition_spec(abstract_mesh(tensor=5), ("embed", "kv_heads", "head_dim"), (32, 2, 4))
    assert caplog.messages == ["kv_heads=2 is not divisible by mesh axes tensor=5: replicated"]


@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [
        (dict(data=-1, fsdp=1, tensor=1), 8, (1, 8, 1, 1, 1)),
        (dict(data=2, fsdp=-1, tensor=2), 8, (1, 2, 2, 1, 2)),
        (dict(data=1, fsdp=1, tensor=1), 1, (1, 1, 1, 1, 1)),
        (dict(data=1, fsdp=-1, tensor=2, slice=2, sequence=2), 16, (2, 1, 2, 2, 2)),
    ],
)
def test_sizes_of_a_mesh(sizes, num_devices, expected):
    assert MeshConfig(**sizes).sizes(num_devices) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), "mesh data=2 x fsdp=2 x tensor=1 needs 4 device(s), found 8; nearest: data=4 x fsdp=2 x tensor=1"),
        (
            (3, 1, 3),
            "mesh data=3 x fsdp=1 x tensor=3 needs 9 device(s), found 8; nearest: data=2 x fsdp=1 x tensor=4",
        ),
        (
            (2, 1, 1, 2),
            "mesh slice=2 x data=2 x fsdp=1 x tensor=1 needs 4 device(s), found 8; "
            "nearest: slice=2 x data=4 x fsdp=1 x tensor=1",
        ),
        ((-1, 3, 1), "mesh data=-1 x fsdp=3 x tensor=1 does not fit 8 device(s): 3 does not divide it; nearest: 2"),
        ((-1, -1, 1), "mesh data=-1 x fsdp=-1 x tensor=1: sizes are positive, at most one is -1 (the rest of …)"),
        ((0, 1, 8), "mesh data=0 x fsdp=1 x tensor=8: sizes are positive, at most one is -1 (the rest of …)"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(InputError) as caught:
        MeshConfig(*sizes).sizes(8)
    assert str(caught.value) == message.replace("…", "the devices")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU v5e slice of 2 x 2 chips, as far as laying out a mesh looks at it."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def slice_index(self) -> int:
        return self.id // 4

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 2, self.id % 4 // 2, 0

    @property
    def process_index(self) -> int:
        return self.slice_index


def test_slices_are_the_outermost_axis():
    """Whatever the order of the devices: no axis but `slice` leaves its pod's own network."""
    devices = [Chip(i) for i in (5, 0, 7, 2, 4, 1, 6, 3)]
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=-1, slice=2), devices)
    assert mesh.devices.shape == (2, 1, 2, 1, 2)
    assert [{device.slice_index for device in pod.flat} for pod in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match=r"mesh\.slice=1, but the devices are in 2 slice\(s\); set mesh\.slice=2"):
        make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), devices)


@pytest.fixture(scope="module")
def eight_devices(tiny_config, run_python):
    """A function (family, mesh) -> what `train` says of it, and of one device; a process for each pair, once."""
    results = {}

    def get(family: str, mesh: str) -> tuple[dict, dict]:
        if (family, mesh) not in results:
            names = [mesh] if (family, "one") in results else ["one", mesh]
            process = run_python(__file__, json.dumps(tiny_config(family, OVERRIDES[family])), *names, XLA_FLAGS=FLAGS)
            assert process.returncode == 0, process.stderr
            # What XLA says of a tensor that it copies to all devices because a constraint is missing.
            assert "full rematerialization" not in process.stderr
            found = json.loads(process.stdout)
            results.update({(family, name): found[name] for name in names})
        return results[family, "one"], results[family, mesh]

    return get


EIGHT = [
    pytest.param(family, mesh, marks=[] if CORE[family] == mesh else pytest.mark.full)
    for family in CORE
    for mesh in MESHES
    if mesh != "one"
]


@pytest.mark.parametrize(("family", "mesh"), EIGHT)
def test_eight_devices_learn_as_one(eight_devices, family, mesh):
    one, many = eight_devices(family, mesh)
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 0.1
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert (one["num_devices"], many["num_devices"]) == (1, 8)


@pytest.mark.parametrize(("family", "mesh"), EIGHT)
def test_one_program_and_no_copies(eight_devices, family, mesh):
    for result in eight_devices(family, mesh):
        assert result["programs"] == 1
        assert result["state_moved"] == []
        assert result["buffers_kept"] == []


@pytest.mark.parametrize(("family", "mesh"), EIGHT)
def test_eight_devices_decode_as_one(eight_devices, family, mesh):
    one, many = eight_devices(family, mesh)
    assert np.shape(one["tokens"]) == (8, 4) and len({tuple(row) for row in one["tokens"]}) > 1
    assert many["tokens"] == one["tokens"]


def test_parameters_moments_and_caches_are_born_sharded(eight_devices):
    """Shapes of the first device's part, under slice=2, fsdp=2, tensor=2, and data=2, sequence=2, tensor=2."""
    t5, llama = (eight_devices(family, mesh)[1]["shards"] for family, mesh in CORE.items())
    query = ".encoder[0].self_attention.query.value"  # [L=2, D=128, H=8, d=16]
    assert t5[f".model{query}"] == [2, 64, 4, 16]
    assert t5[f".optimizer[0].row[{query!r}]"] == [2, 64]
    assert t5[f".optimizer[0].column[{query!r}]"] == [2, 4, 16]
    assert t5[".model.encoder[0].mlp.gate.value"] == [2, 64, 64]  # [L, D, F=128]
    assert t5[".model.embedding.value"] == [128, 64]  # [V=256, D]
    # [L, B=8, K, T, d]: self-attention K=2 for 4 tokens, cross-attention K=1 for an input of 32.
    assert t5[".self_attention[0].key"] == [2, 2, 1, 4, 16]
    assert t5[".cross_attention[0].value"] == [2, 2, 1, 32, 16]
    for i, (K, part) in enumerate([(8, 4), (2, 1), (1, 1)]):
        value = f".decoder[{i}].self_attention.value.value"  # [L=1, D=32, K, d=4]
        assert llama[f".model{value}"] == [1, 32, part, 4], K
        assert llama[f".optimizer[0].mu[{value!r}]"] == llama[f".optimizer[0].nu[{value!r}]"] == [1, 32, part, 4]
        assert llama[f".self_attention[{i}].key"] == [1, 4, part, 35, 4]  # a prompt of 32 and 4 tokens but the last


def test_what_is_replicated_is_logged_once(eight_devices):
    log = eight_devices("t5", CORE["t5"])[1]["log"]
    assert [line for line in log if line.startswith("kv_heads")] == [
        "kv_heads=1 is not divisible by mesh axes tensor=2: replicated"
    ]
    assert len(log) == len(set(log))


def train(raw: dict, sizes: dict[str, int]) -> dict:
    """Some steps on a mesh, then greedy decoding: losses, shapes of the parts on the first device, and what jit did."""
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("gqa").addHandler(handler)
    config = run_config.parse(raw | {"mesh": dict(data=1, fsdp=1, tensor=1) | sizes})
    architecture = config.model.architecture()
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes.values())])
    abstract_model = models.abstract(architecture)
    optimizer = optimizers.optimizer(config.optimizer, 0, logical_axes(abstract_model))
    step_fn = make_train_step(
        language_model_loss(config.train.z_loss, dropout=False),
        optimizer,
        optimizers.schedule(config.optimizer),
        accumulation=1,
        seed=config.train.seed,
    )
    batches = loader.train_batches(config.records, config.train.batch_size, config.train.seed)
    with jax.set_mesh(mesh):
        like = abstract_state(abstract_model, optimizer, mesh)
        state = initial_state(lambda: models.create(architecture, jax.random.key(0)), optimizer, like)
        step_fn = jit_train_step(step_fn, like)
        shards = shard_shapes(state)
        placements = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.sharding, state))
        losses, buffers_kept, state_moved = [], set(), set()
        for step in range(STEPS):
            batch = place_batch(mesh, batches(step))
            with jax.transfer_guard("disallow"):
                before, (state, metrics) = state, step_fn(state, batch)
            leaves = jax.tree_util.tree_leaves_with_path(before)
            buffers_kept |= {jax.tree_util.keystr(path) for path, leaf in leaves if not leaf.is_deleted()}
            for (path, leaf), placement in zip(jax.tree_util.tree_leaves_with_path(state), placements, strict=True):
                if leaf.sharding != placement:
                    state_moved.add(f"{jax.tree_util.keystr(path)}: {placement} to {leaf.sharding}")
            losses.append(float(metrics["loss"]))
        inputs = batches(0)["inputs" if "inputs" in batch else "targets"]
        decoding = generate.prefill(state.model, inputs, None, max_new_tokens=4)
        shards |= shard_shapes(decoding.cache)
        tokens = generate.decode(state.model, decoding, 4, eos_ids=[]).tokens_BN.tolist()
    return dict(
        losses=losses,
        num_devices=len(state.step.sharding.device_set),
        programs=step_fn._cache_size(),
        shards=shards,
        state_moved=sorted(state_moved),
        buffers_kept=sorted(buffers_kept),
        tokens=tokens,
        log=log,
    )


def shard_shapes(state) -> dict:
    """Shape of each array's part on the first device."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf.addressable_shards[0].data.shape for path, leaf in leaves}


def main() -> None:
    config, *names = sys.argv[1:]
    raw = json.loads(config)
    changes = raw["model"]["changes"]
    changes |= {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
    print(json.dumps({name: train(raw, MESHES[name]) for name in names}))


if __name__ == "__main__":
    main()
