"""The table of axes, and training on eight devices against one; run by itself, this file is the eight devices' part."""

import json
import logging
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from gqa import models
from gqa.data import loader
from gqa.errors import InputError
from gqa.sharding import MESH_AXES, MeshConfig, logical_axes, make_mesh, partition_spec
from gqa.training import config as run_config
from gqa.training import optimizer as optimizers
from gqa.training.loop import language_model_loss
from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles faster
STEPS = 10
MESHES = {  # name -> data, fsdp, tensor
    "one": (1, 1, 1),
    "data8": (8, 1, 1),
    "fsdp8": (1, 8, 1),
    "data2_tensor4": (2, 1, 4),
    "data2_fsdp2_tensor2": (2, 2, 2),
}
# Key/value heads below, equal to and above the tensor degree 4, of 8 query heads; T5 wide enough for Adafactor to
# factor its moments. At the full rate, Adafactor would make a large update of a gradient's rounding noise near zero.
OVERRIDES = {
    "t5": {
        "model.changes.d_model": 128,
        "model.changes.head_dim": 16,
        "model.changes.d_ff": 128,
        "model.changes.encoder_self_kv_heads": 8,
        "model.changes.decoder_self_kv_heads": 4,
        "model.changes.cross_kv_heads": 1,
        "optimizer.learning_rate": 0.1,
    },
    "llama": {
        "model.changes.num_layers": 3,
        "model.changes.decoder_self_kv_heads": (8, 4, 1),
        "optimizer": dict(name="adamw", schedule="constant", learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-5),
    },
}


@pytest.mark.parametrize(
    ("mesh", "axes", "shape", "spec"),
    [
        ((2, 2, 2), ("embed", "heads", "head_dim"), (32, 8, 4), ("fsdp", "tensor", None)),
        ((2, 2, 2), ("embed", "heads", "head_dim"), (3, 32, 8, 4), (None, "fsdp", "tensor", None)),  # stacked
        ((2, 2, 2), ("vocab", "embed"), (256, 32), ("tensor", "fsdp")),
        ((2, 2, 2), ("batch", "length"), (8, 16), (("data", "fsdp"), None)),
        ((1, 2, 4), ("batch", "length"), (8, 16), ("fsdp", None)),
        ((1, 1, 4), ("embed", "kv_heads", "head_dim"), (32, 8, 4), (None, "tensor", None)),
        ((1, 1, 4), ("embed", "kv_heads", "head_dim"), (32, 4, 4), (None, "tensor", None)),
        ((1, 1, 4), ("embed", "kv_heads", "head_dim"), (32, 2, 4), (None, None, None)),  # K below the tensor degree
        ((1, 1, 4), (None, "vocab"), (8, 147), (None, None)),
    ],
)
def test_the_table(mesh, axes, shape, spec):
    assert partition_spec(AbstractMesh(mesh, MESH_AXES), axes, shape) == PartitionSpec(*spec)


def test_a_replicated_dimension_is_logged_once(caplog):
    mesh = AbstractMesh((1, 1, 5), MESH_AXES)
    for _ in range(3):
        partition_spec(mesh, ("embed", "kv_heads", "head_dim"), (32, 2, 4))
    assert caplog.messages == ["kv_heads=2 is not divisible by mesh axes tensor=5: replicated"]


@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 1, 1), 1, (1, 1, 1)), ((1, 4, -1), 4, (1, 4, 1))],
)
def test_sizes_of_a_mesh(sizes, num_devices, expected):
    assert MeshConfig(*sizes).sizes(num_devices) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), "mesh data=2 x fsdp=2 x tensor=1 needs 4 device(s), found 8; set one size to -1"),
        ((-1, 3, 1), "mesh data=-1 x fsdp=3 x tensor=1 does not fit 8 device(s): 3 does not divide it; nearest: 2"),
        ((-1, -1, 1), "mesh data=-1 x fsdp=-1 x tensor=1: sizes are positive, at most one is -1 (the rest of …)"),
        ((0, 1, 8), "mesh data=0 x fsdp=1 x tensor=8: sizes are positive, at most one is -1 (the rest of …)"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(InputError) as caught:
        MeshConfig(*sizes).sizes(8)
    assert str(caught.value) == message.replace("…", "the devices")


@pytest.fixture(scope="module")
def eight_devices(tiny_config, run_python):
    """family -> mesh -> what `train` says, and the lines of the log; all from one process with eight devices."""
    configs = {family: tiny_config(family, overrides) for family, overrides in OVERRIDES.items()}
    process = run_python(__file__, json.dumps(configs), XLA_FLAGS=FLAGS)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_eight_devices_learn_as_one(eight_devices, family, mesh):
    one, many = eight_devices[family]["one"], eight_devices[family][mesh]
    assert len(one["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 0.2
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert many["num_devices"] == 8


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_one_program_and_no_copies(eight_devices, family, mesh):
    result = eight_devices[family][mesh]
    assert result["programs"] == 1
    assert result["state_moved"] == []
    assert result["buffers_kept"] == []


@pytest.mark.parametrize(
    ("mesh", "shards"),
    [
        # T5: query [L=2, D=128, H=8, d=16], its moments' rows [L, D] and columns [L, H, d], gate [L, D, F=128],
        # embedding [V=256, D]. Llama: value [L=1, D=32, K, d=4] with K = 8, 4, 1, and Adam's moments like it.
        (
            "fsdp8",
            [[2, 16, 8, 16], [2, 16], [2, 8, 16], [2, 16, 128], [256, 16], [1, 4, 8, 4], [1, 4, 4, 4], [1, 4, 1, 4]],
        ),
        (
            "data2_tensor4",
            [
                [2, 128, 2, 16],
                [2, 128],
                [2, 2, 16],
                [2, 128, 32],
                [64, 128],
                [1, 32, 2, 4],
                [1, 32, 1, 4],
                [1, 32, 1, 4],
            ],
        ),
        (
            "data2_fsdp2_tensor2",
            [[2, 64, 4, 16], [2, 64], [2, 4, 16], [2, 64, 64], [128, 64], [1, 16, 4, 4], [1, 16, 2, 4], [1, 16, 1, 4]],
        ),
    ],
)
def test_parameters_and_moments_are_born_sharded(eight_devices, mesh, shards):
    t5, llama = (eight_devices[family][mesh]["shards"] for family in ("t5", "llama"))
    query = ".encoder[0].self_attention.query.value"
    values = [f".decoder[{i}].self_attention.value.value" for i in range(3)]
    assert [
        t5[f".model{query}"],
        t5[f".optimizer[0].row[{query!r}]"],
        t5[f".optimizer[0].column[{query!r}]"],
        t5[".model.encoder[0].mlp.gate.value"],
        t5[".model.embedding.value"],
        *(llama[f".model{value}"] for value in values),
    ] == shards
    for moment in ("mu", "nu"):
        assert [llama[f".optimizer[0].{moment}[{value!r}]"] for value in values] == shards[-3:]


def test_what_is_replicated_is_logged_once(eight_devices):
    log = eight_devices["log"]
    assert sorted(line for line in log if line.startswith("kv_heads")) == [
        "kv_heads=1 is not divisible by mesh axes tensor=2: replicated",
        "kv_heads=1 is not divisible by mesh axes tensor=4: replicated",
    ]
    assert len(log) == len(set(log))


def train(raw: dict, sizes: tuple[int, int, int]) -> dict:
    """Ten steps on a mesh of `sizes`: losses, shapes of the parts on the first device, and what jit did."""
    config = run_config.parse(raw | {"mesh": dict(zip(MESH_AXES, sizes, strict=True))})
    architecture = config.model.architecture()
    num_devices = sizes[0] * sizes[1] * sizes[2]
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
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
    return dict(
        losses=losses,
        num_devices=len(state.step.sharding.device_set),
        programs=step_fn._cache_size(),
        shards=shards,
        state_moved=sorted(state_moved),
        buffers_kept=sorted(buffers_kept),
    )


def shard_shapes(state) -> dict:
    """Shape of each array's part on the first device."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf.addressable_shards[0].data.shape for path, leaf in leaves}


def main() -> None:
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("gqa").addHandler(handler)
    configs = json.loads(sys.argv[1])
    for config in configs.values():
        changes = config["model"]["changes"]
        changes |= {name: tuple(value) for name, value in changes.items() if isinstance(value, list)}
    results = {family: {name: train(raw, sizes) for name, sizes in MESHES.items()} for family, raw in configs.items()}
    print(json.dumps(results | {"log": log}))


if __name__ == "__main__":
    main()
