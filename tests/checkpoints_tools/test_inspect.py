"""What `inspect` prints and writes of a checkpoint whose numbers are known."""

import json
import re

import pytest

from gqa import models
from gqa.checkpoints import hf


@pytest.fixture
def t5(tmp_path, random_model):
    extra = tmp_path / "spiece.model"
    extra.write_bytes(b"pieces")
    hf.save(random_model(models.size("t5_1_1_mini")), tmp_path / "t5", dtype="float32", extra_files=[extra])
    return tmp_path / "t5"


def test_a_converted_checkpoint(t5, tmp_path, call, capsys):
    heads = ("--kv_heads=decoder_self=2,4", "--kv_heads=cross=2")
    assert call("convert", f"--source={t5}", f"--output={tmp_path / 'a'}", "--method=mean", *heads) == 0
    assert call("export", f"--checkpoint={tmp_path / 'a'}", f"--output={tmp_path / 'b'}", "--layout=compact") == 0
    output = tmp_path / "c"
    common = (f"--source={tmp_path / 'b'}", f"--output={output}", "--dtype=bfloat16")
    assert call("convert", *common, "--method=first", "--kv_heads=1", "--sites=cross") == 0
    capsys.readouterr()
    assert call("inspect", f"--checkpoint={output}", f"--json={tmp_path / 'found.json'}") == 0
    # Attentions: 2 layers of 4 kernels of 64 x 64 (16 a head, 4 heads), less where heads are fewer. Cache: a key and a
    # value of 16 numbers of 2 bytes for each head of each layer. Model: as in test_convert, less those heads.
    parameters = 205_824 - 2 * 64 * 32 - 4 * 64 * 48
    size = (output / "model.safetensors").stat().st_size
    assert capsys.readouterr().out.splitlines() == [
        "format                   Hugging Face",
        "family                   t5",
        "vocab_size               256",
        "d_model                  64",
        "num_heads                4",
        "head_dim                 16",
        "d_ff                     96",
        "num_encoder_layers       2",
        "num_decoder_layers       2",
        "relative_buckets         32",
        "relative_max_distance    128",
        "relative_bias_per_layer  False",
        "tied_logits              False",
        "activation               gelu_new",
        "norm_epsilon             1e-06",
        f"parameters               {parameters:,} ({parameters:,} bfloat16 in the files)",
        f"on disk                  {size:,} bytes in 1 file(s)",
        "beside them              spiece.model",
        "sums                     SHA256SUMS",
        "",
        "site          key/value heads  parameters  bfloat16 cache, bytes per token",
        "encoder_self  4                32,768      none",
        "decoder_self  2,4              28,672      384 (target)",
        "cross         1                20,480      128 (input)",
        "",
        "made from, last step first:",
        f"  first of {tmp_path / 'b'}: cross 2 -> 1",
        f"  hf compact of {tmp_path / 'a'}: the same key/value heads",
        f"  mean of {t5}: decoder_self 4 -> 2,4, cross 4 -> 2",
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sites"]["decoder_self"] == {
        "kv_heads": [2, 4],
        "parameters": 28_672,
        "cache_bytes_per_token": {"bfloat16": 384},
    }
    assert found["provenance"] == json.loads((output / "provenance.json").read_text())
    assert (found["parameters"], found["parameters_by_dtype"]) == (parameters, {"bfloat16": parameters})


def test_a_training_run(tmp_path, random_model, save_run, call, capsys):
    config = models.replace(models.size("llama_mini"), tied_logits=True)
    workdir = tmp_path / "run"
    save_run(workdir, random_model(config))
    assert call("inspect", f"--checkpoint={workdir}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "format          training run" in lines
    assert "beside them     nothing" in lines and "sums            none" in lines
    assert lines[-2:] == [
        "site          key/value heads  parameters  float32 cache, bytes per token  bfloat16 cache, bytes per token",
        "decoder_self  4                32,768      1,024 (target)                  512 (target)",
    ]


def test_scanned_layers_count_each(tmp_path, random_model, write_t5x, call, capsys):
    model = random_model(models.replace(models.size("t5_1_1_mini"), relative_bias_per_layer=True))
    tensors = dict(hf.named_tensors(model))
    write_t5x(tmp_path / "t5x", {name: tensors[name] for name in hf.table(model.config)}, scanned=True, head_dim=16)
    assert call("inspect", f"--checkpoint={tmp_path / 't5x'}") == 0
    number = f"{models.num_parameters(model):,}"
    assert re.search(
        rf"^parameters +{number} \({number} float32 in the files\)$", capsys.readouterr().out, re.MULTILINE
    )


def test_no_values_are_read(t5, call, capsys):
    """The file's values may be anything: only its length counts."""
    weights = t5 / "model.safetensors"
    raw = weights.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    with weights.open("r+b") as file:
        file.truncate(start)
        file.truncate(len(raw))  # a hole
    assert call("inspect", f"--checkpoint={t5}") == 0
    assert "205,824 float32 in the files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "provenance",
    [
        {"kv_heads": 3, "source": "x"},
        {"kv_heads": {"cross": {"before": 4}}, "source_provenance": [1]},
        {"kv_heads": {"cross": {"before": [[1]], "after": [2]}}},
    ],
)
def test_a_provenance_of_another_kind_does_no_harm(provenance, t5, call, capsys):
    (t5 / "provenance.json").write_text(json.dumps(provenance))
    assert call("inspect", f"--checkpoint={t5}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  None None of None: the same key/value heads"


def test_bad_input(t5, tmp_path, call, capsys):
    assert call("inspect", f"--checkpoint={tmp_path / 'none'}") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} is not a directory; expected a checkpoint's\n"
    assert call("inspect", f"--checkpoint={t5}", f"--json={tmp_path / 'none' / 'x.json'}") == 2
    assert capsys.readouterr().err == (
        f"error: --json={tmp_path / 'none' / 'x.json'}: there is no folder {tmp_path / 'none'}\n"
    )
    (t5 / "config.json").unlink()
    assert call("inspect", f"--checkpoint={t5}", f"--json={tmp_path / 'x.json'}") == 2
    assert capsys.readouterr().err == f"error: {t5 / 'config.json'} is missing\n"
    assert not (tmp_path / "x.json").exists()
