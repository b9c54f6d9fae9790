"""What `verify` measures is what numpy says of the two models' logits; its exit code is the verdict."""

import json
import shutil

import jax
import numpy as np
import pytest

from gqa import models
from gqa.checkpoints import hf

LENGTH = 12
PROBE = ("--batch=2", f"--length={LENGTH}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, random_model, tiny_vocabulary):
    """A grouped T5, the same with another output kernel in one layer's cross-attention, and a Llama."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = models.replace(models.size("t5_1_1_mini"), decoder_self_kv_heads=2, cross_kv_heads=(1, 2))
    model = random_model(config)
    hf.save(model, folder / "t5", dtype="float32", extra_files=[tiny_vocabulary])
    for attention in models.site_attention(model, "cross")[1:]:
        attention.out[...] = 1.5 * attention.out[...]
    hf.save(model, folder / "other", dtype="float32")
    hf.save(random_model(models.size("llama_mini")), folder / "llama", dtype="float32")
    return folder


def fields(output: str) -> tuple[dict[tuple[str, int], float], dict[str, float]]:
    """The errors by site and layer, and the summary's numbers by name."""
    table, summary = output.split("\n\n")
    words = [line.split() for line in table.splitlines()[1:]]
    errors = {(site, int(layer)): float(error) for site, _, layer, error in words}
    found = {}
    for line in summary.splitlines()[:-1]:
        name, value = line.rsplit("  ", 1)
        found[name.strip()] = float(value.removesuffix(" nats").removesuffix("%"))
    return errors, found


def test_the_stock_export_is_the_same_function(folders, tmp_path, call, capsys):
    assert call("export", f"--checkpoint={folders / 't5'}", f"--output={tmp_path / 'stock'}") == 0
    text = tmp_path / "text.py"
    text.write_text("def function(x):\n    return x * y + z\n" * 9)
    capsys.readouterr()
    assert call("verify", folders / "t5", tmp_path / "stock", *PROBE, f"--text={text}") == 0
    output = capsys.readouterr().out
    errors, summary = fields(output)
    assert len(errors) == 6 and max(errors.values()) < 1e-4
    assert summary["logits, relative difference"] < 1e-5
    assert summary["same most likely token"] == 100
    assert output.splitlines()[-1].startswith("pass: ")


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "tokenizer.json"])
def test_text_through_tokenizers_of_other_special_ids(
    tokenizer, folders, tmp_path, random_model, llama_tokenizers, call, capsys
):
    files = llama_tokenizers(tokenizer)
    hf.save(random_model(models.size("llama_mini")), tmp_path / "a", dtype="float32", extra_files=files)
    text = tmp_path / "text.py"
    text.write_text("def function(x):\n    return x * y + z\n" * 9)
    assert call("verify", tmp_path / "a", folders / "llama", *PROBE, f"--text={text}") == 0
    assert capsys.readouterr().out.endswith("pass: 0 <= 0.0001\n")


def test_another_function_fails_and_shows_where(folders, call, capsys):
    assert call("verify", folders / "t5", folders / "other", *PROBE, "--seed=3") == 1
    output = capsys.readouterr().out
    errors, summary = fields(output)
    changed = errors.pop(("cross", 1))
    assert changed == pytest.approx(0.5, rel=0.05)  # the stream before it is the same
    assert errors and max(errors.values()) < 1e-5
    assert output.splitlines()[-1].startswith("fail: ") and output.endswith(" > 0.0001\n")

    # The same numbers from the logits, with a probe of the documented form.
    from gqa import checkpoints

    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    inputs, targets = np.random.default_rng(3).integers(3, 256, (2, 2, LENGTH))
    a, b = (
        np.asarray(jax.jit(lambda model: model(inputs, targets))(checkpoints.load(folders / name, **choices)), float)
        for name in ("t5", "other")
    )
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (a, b))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    assert summary == pytest.approx(
        {
            "logits, largest difference": np.abs(a - b).max(),
            "logits, relative difference": np.sqrt(((a - b) ** 2).sum() / (a**2).sum()),
            "mean KL(A || B)": (p * np.log(p / q)).sum(-1).mean(),
            "same most likely token": 100 * (a.argmax(-1) == b.argmax(-1)).mean(),
        },
        rel=1e-2,
    )
    generous = f"--tolerance={summary['logits, relative difference'] * 1.1}"
    assert call("verify", folders / "t5", folders / "other", *PROBE, "--seed=3", generous) == 0


def test_bad_input(folders, tmp_path, call, capsys):
    def error(*arguments) -> str:
        assert call("verify", *arguments) == 2
        return capsys.readouterr().err

    t5, llama = folders / "t5", folders / "llama"
    assert error(t5, llama) == "error: A is a t5 model, B a llama model; expected one family\n"
    for key, message in (
        ("num_decoder_layers", "cross_kv_heads names 2 layers, the model has 7; give one number or 7"),
        ("vocab_size", "shared.weight in {folder} has shape [256, 64]; expected [7, 64] by the model's sizes"),
    ):
        damaged = tmp_path / key
        shutil.copytree(t5, damaged)
        raw = json.loads((t5 / "config.json").read_text())
        (damaged / "config.json").write_text(json.dumps(raw | {key: 7}))
        assert error(t5, damaged) == f"error: {message.format(folder=damaged)}\n"
    assert error(t5, tmp_path / "none") == f"error: {tmp_path / 'none'} is not a directory; expected a checkpoint's\n"
    assert error(t5, t5, "--batch=0") == "error: --batch=0; expected at least 1\n"
    assert error(t5, t5, "--seed=-1") == "error: --seed=-1; expected 0..9223372036854775807\n"
    assert error(t5) == "error: the following arguments are required: B; see --help\n"
    short = tmp_path / "short.txt"
    short.write_text("x = 1")
    assert error(t5, t5, f"--text={short}", "--batch=1", "--length=9") == (
        f"error: --text={short} has 5 tokens; expected at least 2 x batch x length = 18\n"
    )
    assert error(llama, llama, f"--text={short}") == (
        f"error: {llama} has no tokenizer; expected a SentencePiece file *.model or a tokenizer.json in it: "
        "copy it there\n"
    )


@pytest.mark.parametrize("change", [{"vocab_size": 7}, {"d_model": 32}, {"num_layers": 3}])
def test_models_that_cannot_be_compared(change, folders, tmp_path, random_model, call, capsys):
    hf.save(random_model(models.replace(models.size("llama_mini"), **change)), tmp_path / "b", dtype="float32")
    assert call("verify", folders / "llama", tmp_path / "b") == 2
    (name, value), present = *change.items(), models.size("llama_mini")
    assert capsys.readouterr().err == f"error: A has {name}={getattr(present, name)}, B {value}; expected the same\n"
