"""What tests of training share: a tiny vocabulary, corpus and records, tiny runs, and processes of their own."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

# The tests spend their time on compiling small programs: without LLVM's optimisations the same programs take half of
# it, and with fusions emitted as plain LLVM IR instead of through MLIR, a third of that.
# Set before JAX starts, here and for the processes that tests start.
_UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{_UNOPTIMISED} {os.environ.get('XLA_FLAGS', '')}".rstrip()
# Bars come after a second of work, so on a slow machine only: messages are compared to the letter without them.
os.environ["TQDM_DISABLE"] = "1"

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tensorstore
from jax.experimental.compilation_cache import compilation_cache as compilation_cache_module

from gqa import models
from gqa.command_line import run as run_command
from gqa.data.prepare import PrepareSpec, prepare
from gqa.training import config as run_config

ROOT = Path(__file__).parents[1]
TASKS = {"t5": "span_corruption", "llama": "causal_lm"}
ARCHITECTURES = {
    "t5": dict(
        d_model=32,
        num_heads=8,
        head_dim=4,
        d_ff=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        encoder_self_kv_heads=8,
        decoder_self_kv_heads=2,
        cross_kv_heads=2,
    ),
    "llama": dict(d_model=32, num_heads=8, head_dim=4, d_ff=64, num_layers=2, decoder_self_kv_heads=2),
}

# Files of a minute or more, the longest first.
SLOW = """
    reliability/test_kill training/test_posttraining decode/test_speculative test_sharding training/test_loop
    experiments/test_timing posttraining/test_ppo reliability/test_device_counts reliability/test_processes
    adapters/test_lora experiments/test_conversion_methods test_plan experiments/test_sweep test_train
""".split()


def pytest_collection_modifyitems(items):
    """Long files first: else two workers end with one waiting for the other's last file."""
    order = {ROOT / "tests" / f"{name}.py": number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path, len(SLOW)))


@pytest.fixture(scope="session")
def optimised() -> dict:
    """Compiler options that undo the flags above, for programs that run longer than they compile."""
    return {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
        "xla_cpu_use_fusion_emitters": True,
    }


@pytest.fixture
def call(monkeypatch):
    """A function (name in checkpoints_tools, arguments) that runs the command and returns its exit code."""

    def call(tool: str, *arguments) -> int:
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(importlib.import_module(f"checkpoints_tools.{tool}").main)
        return exit.value.code or 0

    return call


@pytest.fixture(scope="session")
def random_model():
    """A function (architecture) -> a model of large random weights: a mix-up of heads shows, and nothing compiles."""

    def make(config: models.ModelConfig) -> models.Model:
        rng = np.random.default_rng(0)
        return jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.2 if leaf.ndim > 2 else 0.8, leaf.shape), leaf.dtype),
            models.abstract(config),
        )

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder of 60 small Python files of different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        lines = [f"def function_{i}_{j}(x):\n    return x * {j} + {i}\n" for j in range(1 + 7 * i % 13)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory) -> Path:
    """A SentencePiece file of single characters: fewer than 80 pieces, and with the sentinels fewer than 180 ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["def function_0123456789(x):", "return x * y + z", "abcdefghijklmnopqrstuvwxyz"]),
        model_writer=model,
        model_type="char",
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("vocabulary") / "characters.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tiny_records(tiny_spec, tmp_path_factory):
    """task -> a folder of its records, made once: a few hundred rows of 32 tokens."""
    folders = {}

    def get(task: str) -> Path:
        if task not in folders:
            folders[task] = tmp_path_factory.mktemp("records") / task
            prepare(PrepareSpec(**tiny_spec(task)), folders[task])
        return folders[task]

    return get


@pytest.fixture(scope="session")
def tiny_spec(tiny_corpus, tiny_vocabulary):
    """task -> the `data` section of a config, as a dict."""

    def get(task: str) -> dict:
        return dict(
            task=task,
            source=str(tiny_corpus),
            vocabulary=str(tiny_vocabulary),
            inputs_length=32,
            targets_length=None,
        )

    return get


@pytest.fixture(scope="session")
def tiny_config(tiny_spec, tiny_records):
    """A function (family, dotted overrides) -> the dictionary of a run of a model of 2 or 2+2 layers, 20 steps."""

    def make(family: str, overrides: dict | None = None) -> dict:
        config = dict(
            model=dict(
                size={"t5": "t5_1_1_mini", "llama": "llama_mini"}[family],
                changes=dict(ARCHITECTURES[family]),
                checkpoint=None,
                dropout_rate=0.0,
                dtype="float32",
                param_dtype="float32",
                scan_layers=True,
                remat="none",
            ),
            data=tiny_spec(TASKS[family]),
            records=str(tiny_records(TASKS[family])),
            optimizer=dict(
                name="adafactor",
                schedule="rsqrt",
                learning_rate=1.0,
                warmup_steps=100,
                decay_rate=0.8,
                clipping_threshold=1.0,
                multiply_by_parameter_scale=True,
            ),
            train=dict(
                steps=20,
                batch_size=8,
                accumulation=1,
                seed=0,
                z_loss=1e-4,
                log_every=1,
                eval_every=10,
                eval_examples=8,
                save_every=5,
                keep=2,
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            uptrain=None,
        )
        for key, value in (overrides or {}).items():
            *sections, name = key.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[name] = value
        return config

    return make


@pytest.fixture(scope="session")
def tiny_run(tiny_config):
    """A function (family, dotted overrides) -> the validated run."""
    return lambda family, overrides=None: run_config.parse(tiny_config(family, overrides))


@pytest.fixture(scope="session")
def config_file(tiny_config, tmp_path_factory):
    """A function (family, dotted overrides) -> the path of a config file that says so."""

    def write(family: str, overrides: dict | None = None) -> Path:
        path = tmp_path_factory.mktemp("configs") / "tiny.py"
        path.write_text(
            "from ml_collections import ConfigDict\n\n\n"
            f"def get_config():\n    return ConfigDict({tiny_config(family, overrides)!r})\n"
        )
        return path

    return write


# Hugging Face's name in a layer -> Meta's, and the axis along which its files have parts; None: whole in each.
META_NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


@pytest.fixture(scope="session")
def save_as_meta():
    """A function that writes a Llama's Hugging Face folder in Meta's layout with torch.save.

    Its arguments: source, new folder, number of files, axis along which the embedding is split, other entries of
    params.json.
    """
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file

    def save(source: Path, directory: Path, shards: int, embedding_axis: int = 1, **params) -> None:
        raw = json.loads((source / "config.json").read_text())
        names = {"model.embed_tokens": ("tok_embeddings", embedding_axis), "model.norm": ("norm", None)}
        names["lm_head"] = ("output", 0)
        heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
        for number in range(raw["num_hidden_layers"]):
            for theirs, (name, axis) in META_NAMES.items():
                names[f"model.layers.{number}.{theirs}"] = (f"layers.{number}.{name}", axis)
        files = [{"rope.freqs": torch.ones(raw["head_dim"] // 2)} for _ in range(shards)]
        for key, tensor in load_file(source / "model.safetensors").items():
            theirs = key.removesuffix(".weight")
            name, axis = names[theirs]
            if kind := heads.get(theirs.split(".")[-1]):
                # The published conversion's permutation, undone.
                rows, width = tensor.shape
                tensor = tensor.view(kind, 2, rows // kind // 2, width).transpose(1, 2).reshape(rows, width)
            parts = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
            for file, part in zip(files, parts, strict=True):
                file[f"{name}.weight"] = part.clone(memory_format=torch.contiguous_format)
        directory.mkdir()
        for number, file in enumerate(files):
            torch.save(file, directory / f"consolidated.{number:02}.pth")
        sizes = dict(
            dim=raw["hidden_size"],
            n_layers=raw["num_hidden_layers"],
            n_heads=raw["num_attention_heads"],
            n_kv_heads=raw["num_key_value_heads"],
            norm_eps=raw["rms_norm_eps"],
            vocab_size=-1,
            rope_theta=raw["rope_parameters"]["rope_theta"],
        )
        (directory / "params.json").write_text(json.dumps(sizes | params))

    return save


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory) -> Path:
    """Where processes, and tests with `compilation_cache`, share compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compilation_cache(compiled_folder):
    """Compiled programs outlive the function that was jitted: for tests that train several times."""
    settings = {
        "jax_compilation_cache_dir": str(compiled_folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def set_all(values: dict) -> None:
        compilation_cache_module.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)

    set_all(settings)
    yield
    set_all(before)


@pytest.fixture(scope="session")
def run_python(compiled_folder):
    """A function (arguments of Python, environment) -> the finished process."""

    def run(*arguments, **environment: str) -> subprocess.CompletedProcess:
        shared = {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled_folder),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's remarks about the machine
        }
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | shared | environment,
            capture_output=True,
            text=True,
        )

    return run


T5X_LAYERS = {  # number of transformers' sublayer -> T5X's names of it and of its norm
    "encoder": {"0": ("attention", "attention"), "1": ("mlp", "mlp")},
    "decoder": {
        "0": ("self_attention", "self_attention"),
        "1": ("encoder_decoder_attention", "cross_attention"),
        "2": ("mlp", "mlp"),
    },
}
T5X_KINDS = {"q": "query", "k": "key", "v": "value", "o": "out", "wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}


def _t5x_name(name: str) -> tuple[str, bool]:
    """T5X's name for a tensor of transformers' T5, and whether it is transposed."""
    if name in ("shared.weight", "lm_head.weight"):
        return ("token_embedder/embedding", False) if name[0] == "s" else ("decoder/logits_dense/kernel", True)
    side, *rest = name.split(".")
    if rest == ["final_layer_norm", "weight"]:
        return f"{side}/{side}_norm/scale", False
    _, block, _, layer, *rest = rest
    name, norm = T5X_LAYERS[side][layer]
    if rest[0] == "layer_norm":
        return f"{side}/layers_{block}/pre_{norm}_layer_norm/scale", False
    if rest[1] == "relative_attention_bias":
        return f"{side}/layers_{block}/relpos_bias/rel_embedding", True
    return f"{side}/layers_{block}/{name}/{T5X_KINDS[rest[1]]}/kernel", True


def _t5x_scanned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, list] = {}
    for name, array in arrays.items():
        found.setdefault(re.sub(r"(encoder|decoder)/layers_\d+/", r"\1/\1/", name), []).append(array)
    return {
        name: np.stack(a, 1) if re.match("(encoder/en|decoder/de)coder/", name) else a[0] for name, a in found.items()
    }


@pytest.fixture(scope="session")
def write_t5x():
    """A function that writes a T5X checkpoint with Flax's and TensorStore's own writers.

    Args:
      directory: the new folder.
      tensors: transformers' T5 by its own names, in the order of the layers.
      scanned: stack the layers on the second axis.
      head_dim: kernels get one axis for heads and one for their width; `None`: one for both.
      dtype, compressor, separator: of the zarr folders; arrays are in 2 or more chunks along every axis but the layers.
      layer_chunk: layers in a chunk.
      inline: all arrays in the msgpack; else vectors only.
      old_specs: the specs' form of 2021, in a bucket, and an optimizer state beside the weights.

    Returns:
      What was written, by T5X's names.
    """

    def write(
        directory: Path,
        tensors: dict[str, np.ndarray],
        *,
        scanned=False,
        head_dim=None,
        dtype="float32",
        compressor="gzip",
        separator=".",
        layer_chunk=100,
        inline=False,
        old_specs=False,
    ) -> dict[str, np.ndarray]:
        named = {
            name: (array.T if flip else array) for key, array in tensors.items() for name, flip in [_t5x_name(key)]
        }
        if head_dim:
            for name, array in named.items():
                if re.search("(query|key|value)/kernel", name):
                    named[name] = array.reshape(array.shape[0], -1, head_dim)
                elif "out/kernel" in name:
                    named[name] = array.reshape(-1, head_dim, array.shape[1])
        for name in list(named):  # one table for the stack, if the layers after the first have none
            side = name.split("/")[0]
            if "rel_embedding" in name and f"{side}/layers_1/relpos_bias/rel_embedding" not in named:
                named[f"{side}/relpos_bias/rel_embedding"] = named.pop(name)
        named = _t5x_scanned(named) if scanned else named
        named = {
            name: np.ascontiguousarray(array, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
            for name, array in named.items()
        }

        def leaf(name: str, array: np.ndarray):
            if inline or (array.ndim == 1 and "encoder" not in name):
                return array
            chunks = [-(-size // 2) for size in array.shape]
            if re.match("target/(encoder/en|decoder/de)coder/", name):
                chunks[1] = min(layer_chunk, array.shape[1])
            metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": compressor and {"id": compressor}}
            metadata["dimension_separator"] = separator
            spec = {"driver": "zarr", "dtype": dtype, "metadata": metadata}
            folder = name.replace("/", ".")
            kvstore = {"driver": "file", "path": str(directory / folder)}
            tensorstore.open(spec | {"kvstore": kvstore}, create=True).result().write(array).result()
            if old_specs:
                return spec | {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": folder}
            return spec | {"kvstore": {"driver": "gfile", "path": f"{folder}/"}}

        directory.mkdir(parents=True, exist_ok=True)
        optimizer: dict = {"target": {}}
        if old_specs:
            moment = leaf("state/param_states/token_embedder/embedding/v", np.ones((4, 4), dtype))
            optimizer["state"] = {"step": np.int32(7), "param_states": {"embedding": {"v": moment}, "m": np.ones(3)}}
        for name, array in named.items():
            *parents, last = name.split("/")
            tree = optimizer["target"]
            for parent in parents:
                tree = tree.setdefault(parent, {})
            tree[last] = leaf(f"target/{name}", array)
        content = flax.serialization.msgpack_serialize({"version": 3, "optimizer": optimizer})
        (directory / "checkpoint").write_bytes(content)
        return named

    return write
