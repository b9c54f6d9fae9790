import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import sys
import zipfile

import jax
import numpy as np
import pytest

from checkpoints_tools import convert as command
from gqa import checkpoints, models
from gqa.checkpoints import hf
from gqa.command_line import run
from gqa.convert import convert

CHOICES = dict(param_dtype="float32", dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A multi-head T5 (4 heads, 2+2 layers) with a vocabulary, the licence of its weights and no provenance."""
    folder = tmp_path_factory.mktemp("checkpoints")
    vocabulary = folder / "spiece.model"
    vocabulary.write_bytes(b"pieces")
    model = models.create(models.size("t5_1_1_mini"), jax.random.key(0))
    ids = {"pad_token_id": 0, "eos_token_id": 7}
    hf.save(model, folder / "t5", dtype="float32", extra_files=[vocabulary], token_ids=ids)
    (folder / "t5" / "optimizer.pt").write_bytes(b"not for the copy")
    return folder / "t5"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    hf.save(models.create(models.size("llama_mini"), jax.random.key(0)), folder, dtype="bfloat16")
    return folder


def call(monkeypatch, *arguments):
    """Runs the command; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        run(command.main)
    return exit.value.code


def assert_equal(left, right):
    assert left.config == right.config
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


def test_t5(source, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new folder" / "gqa2"
    arguments = [f"--source={source}", f"--output={output}", "--kv_heads=2", "--method=mean"]
    assert not call(monkeypatch, *arguments)
    converted = convert(checkpoints.load(source, **CHOICES), {"decoder_self": 2, "cross": 2}, "mean", jax.random.key(0))
    assert_equal(checkpoints.load(output, **CHOICES), converted)
    assert sorted(path.name for path in output.iterdir()) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "provenance.json",
        "spiece.model",
    ]
    assert (output / "spiece.model").read_bytes() == b"pieces"
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == 7
    provenance = json.loads((output / "provenance.json").read_text())
    versions = provenance.pop("versions")
    assert versions["jax"] == jax.__version__ and versions["numpy"] == np.__version__
    assert provenance == {
        "command": " ".join(["python -m checkpoints_tools.convert", *(f"'{a}'" if " " in a else a for a in arguments)]),
        "source": {
            "path": str(source),
            "sha256": {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in source.iterdir()
                if file.name not in ("SHA256SUMS", "optimizer.pt")
            },
        },
        "method": "mean",
        "seed": 0,
        "dtype": "float32",
        "sha256": {"model.safetensors": hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()},
        "kv_heads": {
            "encoder_self": {"before": [4, 4], "after": [4, 4]},
            "decoder_self": {"before": [4, 4], "after": [2, 2]},
            "cross": {"before": [4, 4], "after": [2, 2]},
        },
    }
    # Site: in 2 layers, 4 kernels of 64 x 64, then 2 of 64 x 64 and 2 of 64 x 32. Cache: 2 * 4 heads * 16 * 2 layers *
    # 4 bytes. Model: 3 sites of 32768, 4 MLPs of 3 * 64 * 96, 2 tables of 256 * 64, 2 of 32 * 4, and 12 norms of 64.
    assert capsys.readouterr().out.splitlines() == [
        "site          key/value heads  parameters          float32 cache, bytes per token",
        "encoder_self  4 -> 4           32,768 -> 32,768    none",
        "decoder_self  4 -> 2           32,768 -> 24,576    1,024 -> 512 (target)",
        "cross         4 -> 2           32,768 -> 24,576    1,024 -> 512 (input)",
        "whole model                    205,824 -> 189,440",
        f"wrote {output}",
    ]


def test_conversions_in_a_row_keep_their_provenance(source, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--method=first", "--sites=cross"]
    assert not call(monkeypatch, f"--source={source}", f"--output={first}", "--kv_heads=2", *common)
    assert not call(monkeypatch, f"--source={first}", f"--output={second}", "--kv_heads=1", *common)
    provenance = json.loads((second / "provenance.json").read_text())
    assert provenance["kv_heads"]["cross"] == {"before": [2, 2], "after": [1, 1]}
    assert provenance["kv_heads"]["decoder_self"] == {"before": [4, 4], "after": [4, 4]}
    assert provenance["source_provenance"] == json.loads((first / "provenance.json").read_text())
    direct = convert(checkpoints.load(source, **CHOICES), {"cross": 1}, "first", jax.random.key(0))
    assert_equal(checkpoints.load(second, **CHOICES), direct)


def test_llama_keeps_its_dtype_unless_told_otherwise(llama, tmp_path, monkeypatch):
    choices = CHOICES | {"param_dtype": "bfloat16"}
    expected = convert(checkpoints.load(llama, **choices), {"decoder_self": 1}, "random", jax.random.key(5))
    common = [f"--source={llama}", "--kv_heads=1", "--method=random", "--seed=5"]
    for dtype, extra in (("bfloat16", []), ("float32", ["--dtype=float32"])):
        assert not call(monkeypatch, f"--output={tmp_path / dtype}", *common, *extra)
        assert_equal(checkpoints.load(tmp_path / dtype, **choices), expected)
        assert json.loads((tmp_path / dtype / "provenance.json").read_text())["dtype"] == dtype
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "decoder_self_kv_heads=3 does not divide the 4 key/value heads of layer 0; nearest: 2, 4"),
        ({"kv_heads": 8}, "decoder_self_kv_heads=8 does not divide the 4 key/value heads of layer 0; nearest: 4"),
        (
            {"method": "median"},
            "method='median' is unknown; expected one of mean, first, random, "
            "procrustes, svd, svd_values, with +group, +renorm, +tune, +refit",
        ),
        ({"sites": "self"}, "attention site 'self' is unknown; expected one of encoder_self, decoder_self, cross"),
        ({"dtype": "float8"}, "--dtype=float8 is unknown; expected one of float32, bfloat16"),
        ({"seed": 2**32}, "--seed=4294967296; expected 0..4294967295"),
        ({"kv_heads": "4" * 5000}, f"--kv_heads={'4' * 20}… has a number of 5000 digits; expected one such as 8"),
        ({"souce": "x"}, "unknown option --souce; nearest: --source"),
        ({"source": "{tmp}/nothing"}, "{tmp}/nothing is not a directory; expected a checkpoint's"),
        ({"output": "{source}"}, "--output={source} exists already; name a new directory"),
        ({"output": "/dev/null/x/y"}, "--output=/dev/null/x/y: /dev/null is no directory"),
        ({"output": "{tmp}/new/.."}, "--output={tmp}/new/.. ends in ..; expected the name of a new directory"),
    ],
)
def test_bad_input(source, tmp_path, monkeypatch, capsys, changes, message):
    changes = {name: str(value).format(tmp=tmp_path, source=source) for name, value in changes.items()}
    arguments = {"source": source, "output": tmp_path / "output", "kv_heads": 2, "method": "mean"} | changes
    before = sorted(source.iterdir())
    assert call(monkeypatch, *(f"--{name}={value}" for name, value in arguments.items())) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp=tmp_path, source=source)}\n"
    assert list(tmp_path.iterdir()) == []
    assert sorted(source.iterdir()) == before


def test_damaged_weights_leave_nothing(source, tmp_path, monkeypatch, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((source / "config.json").read_bytes())
    (damaged / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    output = tmp_path / "output"
    assert call(monkeypatch, f"--source={damaged}", f"--output={output}", "--kv_heads=2", "--method=mean") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {damaged / 'model.safetensors'}: lm_head.weight lies at bytes ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_damaged_provenance_is_noticed_before_any_work(source, tmp_path, monkeypatch, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (damaged / "provenance.json").write_text("{")
    monkeypatch.setattr(hf.writer, "write", None)
    arguments = (f"--source={damaged}", f"--output={tmp_path / 'output'}", "--kv_heads=2", "--method=mean")
    assert call(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {damaged / 'provenance.json'} is not readable JSON: ")


def test_an_interrupted_conversion_goes_on(source, tmp_path, monkeypatch):
    arguments = [f"--source={source}", "--kv_heads=2", "--method=mean"]
    assert not call(monkeypatch, *arguments, f"--output={tmp_path / 'whole'}")
    output, partial = tmp_path / "new", tmp_path / ".new.partial"
    made = []
    read = command.checkpoints.read

    def counted(tensor):
        def read_tensor():
            made.append(tensor.name)
            if len(made) == 20:
                raise KeyboardInterrupt
            return tensor.read()

        return dataclasses.replace(tensor, read=read_tensor)

    def read_counted(*args, **kwargs):
        contents = read(*args, **kwargs)
        tensors = {path: (counted(tensor), transform) for path, (tensor, transform) in contents.tensors.items()}
        return contents._replace(tensors=tensors)

    monkeypatch.setattr(command.checkpoints, "read", read_counted)
    assert call(monkeypatch, *arguments, f"--output={output}") == 130
    assert not output.exists() and partial.exists()
    # What a power cut may leave behind the last line of the journal.
    with (partial / "model.safetensors").open("ab") as file:
        file.write(b"torn")
    first = len(made)
    assert not call(monkeypatch, *arguments, f"--output={output}")
    assert len(made) - first < len(set(made)) - 10  # what was written already was not read again
    assert not partial.exists()
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_another_conversion_does_not_go_on_with_it(source, tmp_path, monkeypatch):
    output, partial = tmp_path / "new", tmp_path / ".new.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"method": "first"}\n')
    (partial / "model.safetensors").write_bytes(b"of another conversion")
    assert not call(monkeypatch, f"--source={source}", f"--output={output}", "--kv_heads=2", "--method=mean")
    assert checkpoints.load(output, **CHOICES).config.cross_kv_heads == 2


def test_every_flipped_bit_of_a_file_with_sums_is_found(source, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for case in range(8):
        damaged = tmp_path / str(case)
        shutil.copytree(source, damaged)
        raw = bytearray((damaged / "model.safetensors").read_bytes())
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        (damaged / "model.safetensors").write_bytes(raw)
        arguments = (f"--source={damaged}", f"--output={tmp_path / 'out'}", "--kv_heads=2", "--method=mean")
        assert call(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and str(damaged) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(case) for case in range(8)]


def test_numbers_of_heads_by_site_and_by_layer(source, tmp_path, monkeypatch, capsys):
    arguments = (f"--source={source}", f"--output={tmp_path / 'out'}", "--method=mean")
    assert not call(monkeypatch, *arguments, "--kv_heads=decoder_self=4,2", "--kv_heads=cross=1")
    config = checkpoints.load(tmp_path / "out", **CHOICES).config
    assert [config.kv_heads(site) for site in ("encoder_self", "decoder_self", "cross")] == [(4, 4), (4, 2), (1, 1)]
    expected = convert(
        checkpoints.load(source, **CHOICES), {"decoder_self": (4, 2), "cross": 1}, "mean", jax.random.key(0)
    )
    assert_equal(checkpoints.load(tmp_path / "out", **CHOICES), expected)
    arguments = (f"--source={source}", f"--output={tmp_path / 'other'}", "--method=mean")
    for kv_heads, message in (
        (("two",), "--kv_heads=two is no number, list of numbers or SITE=number, such as 8 or cross=4"),
        (("4,2,1",), "decoder_self_kv_heads names 3 layers, the model has 2; give 1 number or 2"),
        (("cross=2", "cross=1"), "--kv_heads=cross=1 sets cross a second time; give each attention site once"),
    ):
        assert call(monkeypatch, *arguments, *(f"--kv_heads={text}" for text in kv_heads)) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_weights_that_are_not_numbers_are_named(source, tmp_path, monkeypatch, capsys):
    damaged = tmp_path / "damaged"
    model = checkpoints.load(source, **CHOICES)
    model.decoder_norm.scale = model.decoder_norm.scale.replace(model.decoder_norm.scale[...].at[3].set(np.nan))
    hf.save(model, damaged, dtype="float32")
    output = tmp_path / "out"
    assert not call(monkeypatch, f"--source={damaged}", f"--output={output}", "--kv_heads=2", "--method=mean")
    name = "decoder.final_layer_norm.weight"
    assert f"warning: {name} of {damaged / 'model.safetensors'} holds NaN" in capsys.readouterr().err


@pytest.fixture
def metas(tmp_path, save_as_meta):
    """A Llama in Hugging Face's layout, and the same in two files of Meta's with their sums and a tokenizer."""
    original, folder = tmp_path / "original", tmp_path / "meta"
    hf.save(models.create(models.size("llama_mini"), jax.random.key(0)), original, dtype="float32")
    save_as_meta(original, folder, 2)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "checklist.chk").write_text("".join(sums))
    return original, folder


def test_metas_folder_and_the_same_weights_from_hugging_face_give_the_same_bytes(metas, tmp_path, monkeypatch):
    original, folder = metas
    for source, output in ((original, tmp_path / "from_hf"), (folder, tmp_path / "from_meta")):
        assert not call(monkeypatch, f"--source={source}", f"--output={output}", "--kv_heads=2", "--method=mean")
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("from_meta", "from_hf"))
    assert found == expected
    config, expected_config = (checkpoints.read_config(tmp_path / f"from_{name}", **CHOICES) for name in ("meta", "hf"))
    assert config == expected_config and config.decoder_self_kv_heads == 2
    assert (tmp_path / "from_meta" / "tokenizer.model").read_bytes() == b"pieces"
    provenance = json.loads((tmp_path / "from_meta" / "provenance.json").read_text())
    assert provenance["source"]["sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "checklist.chk"
    }


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", "consolidated.01.pth"])
def test_metas_sums_are_checked(name, metas, tmp_path, monkeypatch, capsys):
    _, folder = metas
    path = folder / name
    if name == "consolidated.01.pth":  # whose own check sums would find another change
        lines = (folder / "checklist.chk").read_text().splitlines()
        lines = [f"{'0' * 32}  {name}" if line.endswith(name) else line for line in lines]
        (folder / "checklist.chk").write_text("\n".join(lines))
    else:
        path.write_bytes(path.read_bytes() + b" ")
    assert call(monkeypatch, f"--source={folder}", f"--output={tmp_path / 'out'}", "--kv_heads=2", "--method=mean") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path} is damaged: its md5 is ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "original"]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_pickles_that_would_run_something_are_refused(name, function, tmp_path, monkeypatch, capsys):
    folder, canary = tmp_path / "hostile", tmp_path / "canary"
    argument = f"touch {canary}" if function is os.system else f"open({str(canary)!r}, 'w')"
    folder.mkdir()
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model.embed_tokens.weight": Call(function, argument)}, 2))
    if "-of-" in name:
        index = {"weight_map": {"model.embed_tokens.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "params.json").write_text("{}")
    assert call(monkeypatch, f"--source={folder}", f"--output={tmp_path / 'out'}", "--kv_heads=2", "--method=mean") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / name}: data.pkl asks for ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hostile"]
