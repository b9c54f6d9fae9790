"""Exported folders hold the same model; what transformers makes of them is in tests/parity/test_export.py."""

import hashlib
import json

import numpy as np
import pytest

from gqa import checkpoints, models
from gqa.checkpoints import hf
from gqa.checkpoints.tensor import open_safetensors

CHOICES = dict(param_dtype="float32", dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
COMPACT_T5 = dict(encoder_self_kv_heads=4, decoder_self_kv_heads=(2, 1), cross_kv_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_model):
    """A function (size, dtype, changes) -> the folder of a random model with a vocabulary and a provenance."""

    def make(size: str, dtype: str = "float32", **changes):
        folder = tmp_path_factory.mktemp("checkpoints")
        for name in (
            "spiece.model",
            "tokenizer.json",
            "generation_config.json",
            "reward_head.safetensors",
            "provenance.json",
        ):
            (folder / name).write_text(json.dumps({"name": name}))
        model = random_model(models.replace(models.size(size), **changes))
        ids = {"pad_token_id": 3, "eos_token_id": 7}
        hf.save(model, folder / "model", dtype=dtype, extra_files=folder.glob("*.*"), token_ids=ids)
        return folder / "model"

    return make


@pytest.fixture(scope="module")
def t5(folder):
    return folder("t5_1_1_mini", **COMPACT_T5)


def test_stock_t5(t5, tmp_path, call, capsys):
    output = tmp_path / "stock"
    arguments = [f"--checkpoint={t5}", f"--output={output}", "--format=hf"]
    assert call("export", *arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "encoder_self: 4 key/value heads",
        "decoder_self: 2,1 key/value heads, written as 4",
        "cross: 2 key/value heads, written as 4",
        f"wrote {output}",
    ]
    config = json.loads((output / "config.json").read_text())
    assert "num_key_value_heads" not in config
    assert (config["pad_token_id"], config["eos_token_id"]) == (3, 7)
    found, source = (open_safetensors(place / "model.safetensors") for place in (output, t5))
    for name, tensor in source.items():
        kind = name.split(".")[-2]
        heads = tensor.read().reshape(-1, 16, 64) if kind in ("k", "v") else None
        expected = tensor.read() if heads is None else heads.repeat(4 // len(heads), axis=0).reshape(64, 64)
        np.testing.assert_array_equal(found[name].read(), expected, err_msg=name)
    assert found.keys() == source.keys()

    for name in ("spiece.model", "tokenizer.json", "generation_config.json", "reward_head.safetensors"):
        assert (output / name).read_bytes() == (t5 / name).read_bytes()
    sums = dict(reversed(line.split("  ")) for line in (output / "SHA256SUMS").read_text().splitlines())
    files = {path.name for path in output.iterdir()}
    assert sums.keys() == files - {"SHA256SUMS"}
    assert all(hashlib.sha256((output / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    provenance = json.loads((output / "provenance.json").read_text())
    assert provenance["command"] == " ".join(["python -m checkpoints_tools.export", *arguments])
    assert (provenance["format"], provenance["layout"], provenance["dtype"]) == ("hf", "stock", "float32")
    assert provenance["kv_heads"]["decoder_self"] == {"before": [2, 1], "after": [4, 4]}
    assert provenance["source"]["sha256"]["model.safetensors"]
    assert provenance["source_provenance"] == {"name": "provenance.json"}


@pytest.mark.parametrize("size", ["t5_1_1_mini", "llama_mini"])
def test_repeated_heads_pool_back_bit_for_bit(size, folder, tmp_path, call, assert_equal):
    if size == "llama_mini":
        source = folder(size, "bfloat16", decoder_self_kv_heads=(2, 1), qkv_bias=True)
        heads = ["--kv_heads=2,1"]
    else:
        source, heads = folder(size, "bfloat16", **COMPACT_T5), ["--kv_heads=decoder_self=2,1", "--kv_heads=cross=2"]
    for layout in ("stock", "compact"):
        assert call("export", f"--checkpoint={source}", f"--output={tmp_path / layout}", f"--layout={layout}") == 0
    back = (f"--source={tmp_path / 'stock'}", f"--output={tmp_path / 'back'}")
    assert call("convert", *back, "--method=mean", *heads) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("compact", "back")]
    assert weights[0] == weights[1] == (source / "model.safetensors").read_bytes()
    assert_equal(checkpoints.load(tmp_path / "back", **CHOICES), checkpoints.load(source, **CHOICES))


def test_llama_layers_get_one_common_number(folder, tmp_path, call, capsys):
    source = folder("llama_mini", num_heads=12, num_layers=3, decoder_self_kv_heads=(2, 3, 1))
    assert call("export", f"--checkpoint={source}", f"--output={tmp_path / 'stock'}", "--dtype=bfloat16") == 0
    assert "decoder_self: 2,3,1 key/value heads, written as 6" in capsys.readouterr().out
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["dtype"]) == (6, "bfloat16")
    # A grouped model without such layers stays as it is.
    grouped = folder("llama_mini", decoder_self_kv_heads=2)
    assert call("export", f"--checkpoint={grouped}", f"--output={tmp_path / 'grouped'}") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "grouped" / name).read_bytes() == (grouped / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "onnx"}, "--format=onnx is unknown; expected one of hf"),
        ({"layout": "dense"}, "--layout=dense is unknown; expected one of stock, compact"),
        ({"dtype": "int8"}, "--dtype=int8 is unknown; expected one of float32, bfloat16"),
        ({"output": "{source}"}, "--output={source} exists already; name a new directory"),
        ({"checkpoint": "{tmp}/nothing"}, "{tmp}/nothing is not a directory; expected a checkpoint's"),
        ({"layuot": "stock"}, "unknown option --layuot; nearest: --layout"),
    ],
)
def test_bad_input(t5, tmp_path, call, capsys, changes, message):
    changes = {name: value.format(tmp=tmp_path, source=t5) for name, value in changes.items()}
    arguments = {"checkpoint": t5, "output": tmp_path / "out"} | changes
    assert call("export", *(f"--{name}={value}" for name, value in arguments.items())) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp=tmp_path, source=t5)}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_bias_table_per_layer_is_for_compact_only(folder, tmp_path, call, capsys, assert_equal):
    source = folder("t5_1_1_mini", relative_bias_per_layer=True, decoder_self_kv_heads=2)
    arguments = (f"--checkpoint={source}", f"--output={tmp_path / 'out'}")
    assert call("export", *arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {source} has a relative-bias table per layer, stock T5 one for all layers; use --layout=compact\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert call("export", *arguments, "--layout=compact") == 0
    assert_equal(checkpoints.load(tmp_path / "out", **CHOICES), checkpoints.load(source, **CHOICES))


def test_an_unfinished_run(tmp_path, random_model, save_run, call, capsys):
    model = random_model(models.replace(models.size("t5_1_1_mini"), **COMPACT_T5))
    (tmp_path / "pieces.model").write_bytes(b"pieces")
    save_run(tmp_path / "run", model, tmp_path / "pieces.model")
    hf.save(model, tmp_path / "saved", dtype="float32")
    for source in ("run", "saved"):
        assert call("export", f"--checkpoint={tmp_path / source}", f"--output={tmp_path / f'{source} out'}") == 0
    note = "note: no tokenizer of transformers reads pieces.model; encode text with sentencepiece"
    assert capsys.readouterr().out.splitlines().count(note) == 1
    # The same tensors, in the order in which each source is best read.
    left, right = (open_safetensors(tmp_path / f"{source} out" / "model.safetensors") for source in ("run", "saved"))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor.read(), right[name].read(), err_msg=name)
    assert (tmp_path / "run out" / "config.json").read_bytes() == (tmp_path / "saved out" / "config.json").read_bytes()
    assert (tmp_path / "run out" / "pieces.model").read_bytes() == b"pieces"
    sums = json.loads((tmp_path / "run out" / "provenance.json").read_text())["source"]["sha256"]
    assert "checkpoints/7/default/manifest.ocdbt" in sums
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "run" / name).read_bytes()).hexdigest() == digest
    # And it converts, as any other checkpoint.
    arguments = (f"--source={tmp_path / 'run'}", f"--output={tmp_path / 'mqa'}", "--kv_heads=1", "--method=first")
    assert call("convert", *arguments) == 0
    assert checkpoints.load(tmp_path / "mqa", **CHOICES).config.cross_kv_heads == 1
    capsys.readouterr()
    assert call("verify", tmp_path / "run" / "checkpoints", tmp_path / "run out", "--length=8") == 0
