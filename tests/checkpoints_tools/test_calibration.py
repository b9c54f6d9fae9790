"""Conversion on calibration text, by the command line."""

import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints_tools import calibration
from gqa import checkpoints, models
from gqa.checkpoints import hf
from gqa.convert import convert_calibrated, walk
from gqa.convert.statistics import collect
from gqa.data import loader
from gqa.data.prepare import PrepareSpec, prepare

CHOICES = dict(param_dtype="float32", dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
TASKS = {"t5": "span_corruption", "llama": "causal_lm"}
SIZES = {"t5": "t5_1_1_mini", "llama": "llama_mini"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, random_model, tiny_vocabulary):
    """Folders of a random T5 and a random Llama, 4 heads and 2 layers a side, each with its vocabulary."""
    folders = {}
    for family, name in SIZES.items():
        folder = tmp_path_factory.mktemp("sources")
        vocabulary = shutil.copy(tiny_vocabulary, folder / "spiece.model")
        hf.save(random_model(models.size(name)), folder / family, dtype="float32", extra_files=[vocabulary])
        folders[family] = folder / family
    return folders


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def convert_on_text(sources, tmp_path, call, cache, monkeypatch):
    """A function (family, name of the output, other arguments) -> the exit code and the output's folder."""
    monkeypatch.setenv("GQA_CACHE", str(cache))

    def run(family, name, *arguments):
        common = (f"--source={sources[family]}", f"--output={tmp_path / name}")
        text = next((word.partition("=")[2] for word in arguments if word.startswith("--calibrate=")), None)
        lengths = () if text is None else ("--calibration_rows=8",)
        if text is not None and not (Path(text) / "manifest.json").exists():
            lengths += ("--calibration_length=32",)
        return call("convert", *common, *lengths, *arguments), tmp_path / name

    return run


def bytes_of(output):
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", SIZES)
def test_on_a_folder_of_text(family, sources, tiny_corpus, tiny_records, convert_on_text, capsys):
    method = "svd+group+refit" if family == "t5" else "svd+group+tune+refit"
    code, output = convert_on_text(family, "new", "--kv_heads=2", f"--method={method}", f"--calibrate={tiny_corpus}")
    assert code == 0
    printed = capsys.readouterr().out
    source, records = checkpoints.load(sources[family], **CHOICES), tiny_records(TASKS[family])
    sites = models.FAMILIES[family].converted_sites
    batches = [loader.train_batches(records, 8, seed=0)(0)]
    statistics = collect(walk.shell_of(source), walk.layers_of(source), batches, sites)
    expected, report = convert_calibrated(
        source, dict.fromkeys(sites, 2), method, jax.random.key(0), batches=batches, statistics=statistics
    )
    found = checkpoints.load(output, **CHOICES)
    assert found.config == expected.config and jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)

    content = json.loads((output / "conversion.json").read_text())
    assert (content["method"], content["seed"]) == (method, 0)
    for entry, wanted in zip(content["attention"], report, strict=True):
        assert entry == {
            name: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
            for name, value in wanted.items()
        }
    assert [(entry["site"], entry["layer"]) for entry in report] == [(site, n) for n in range(2) for site in sites]
    for entry in report:
        assert (
            sorted(itertools.chain(*entry["groups"])) == [0, 1, 2, 3] and len(entry["groups"]) == entry["kv_heads"] == 2
        )
        assert 0 < entry["key_energy_kept"] < 1 and 0 < entry["value_energy_kept"] < 1
        errors = [entry[name] for name in entry if name.startswith("output_error")]
        assert len(errors) == method.count("+") and entry["output_error"] == min(errors)
        for name in ("tune", "refit"):
            assert (f"before {name}" in printed) == (name in method)
            assert f"{entry.get(f'output_error_before_{name}', 0):.1%}" in printed or name not in method
        assert f"{entry['key_energy_kept']:.1%}" in printed and f"{entry['output_error']:.1%}" in printed
    assert content["heldout"].keys() == {"teacher", "mean pooling", "this conversion"}
    for name, loss in content["heldout"].items():
        assert re.search(rf"^{name} +{loss:.4f}$", printed, re.MULTILINE), printed
    assert content["calibration"]["text"] == str(tiny_corpus) and content["calibration"]["rows"] == 8
    provenance = json.loads((output / "provenance.json").read_text())
    assert provenance["calibration"] == content["calibration"]
    assert "warning: " in printed and " was calibrated on " in printed  # 8 rows of 32 tokens for a width of 64


def test_through_a_tokenizer_json(
    tmp_path, random_model, tiny_corpus, llama_tokenizers, convert_on_text, monkeypatch, capsys
):
    monkeypatch.setattr(calibration, "SCORED_BYTES", 0)
    source, records = tmp_path / "source", tmp_path / "records"
    files = llama_tokenizers("tokenizer.json")
    hf.save(random_model(models.size("llama_mini")), source, dtype="float32", extra_files=files)
    common = ("--kv_heads=2", "--method=svd_values", f"--source={source}")
    code, new = convert_on_text("llama", "new", *common, f"--calibrate={tiny_corpus}")
    assert code == 0 and (new / "tokenizer.json").read_bytes() == files[0].read_bytes()
    prepare(PrepareSpec("causal_lm", str(tiny_corpus), str(source), 32, None), records)
    code, same = convert_on_text("llama", "same", *common, f"--calibrate={records}")
    assert code == 0 and bytes_of(same) == bytes_of(new)
    capsys.readouterr()
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + " ")
    (source / "SHA256SUMS").unlink()
    assert convert_on_text("llama", "other", *common, f"--calibrate={records}")[0] == 2
    assert capsys.readouterr().err == (
        f"error: --calibrate={records} was prepared with another vocabulary; expected the model's, "
        f"{source / 'tokenizer.json'}\n"
    )


def test_statistics_are_kept_and_used_again(sources, tiny_records, convert_on_text, tmp_path, monkeypatch, capsys):
    file, records = tmp_path / "moments.safetensors", tiny_records("causal_lm")
    arguments = ("--method=svd", f"--calibrate={records}", f"--statistics={file}")
    code, first = convert_on_text("llama", "first", "--kv_budget=75%", *arguments)
    assert code == 0 and file.exists()
    kv_heads = checkpoints.load(first, **CHOICES).config.kv_heads("decoder_self")
    assert sum(kv_heads) == 6 and sorted(kv_heads) == [2, 4]
    monkeypatch.setattr(calibration.statistics, "collect", None)
    code, second = convert_on_text("llama", "second", "--kv_budget=75%", *arguments)
    assert code == 0 and bytes_of(first) == bytes_of(second)
    capsys.readouterr()
    message = (
        f"error: {file} holds the statistics of another checkpoint, text, number of rows, seed or choice of sites; "
    )
    for change in ("--calibration_rows=4", f"--source={first}"):
        code, output = convert_on_text("llama", "other", "--kv_heads=2", *arguments, change)
        assert code == 2 and not output.exists()
        assert capsys.readouterr().err.startswith(message)
    file.write_bytes(file.read_bytes()[:-9])
    assert convert_on_text("llama", "other", "--kv_budget=75%", *arguments)[0] == 2
    assert "holds no statistics of calibration" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 6, 7])
def test_all_rows_asked_for_are_read(rows, tiny_records, convert_on_text):
    records = tiny_records("causal_lm")
    arguments = ("--kv_heads=2", "--method=svd", f"--calibrate={records}", f"--calibration_rows={rows}")
    code, output = convert_on_text("llama", "new", *arguments)
    assert code == 0 and json.loads((output / "provenance.json").read_text())["calibration"]["rows"] == rows


def test_a_seed_draws_other_rows(tiny_records, convert_on_text):
    arguments = ("--kv_heads=2", "--method=svd", f"--calibrate={tiny_records('causal_lm')}")
    outputs = [convert_on_text("llama", f"seed{seed}", *arguments, f"--seed={seed}")[1] for seed in (0, 1)]
    assert bytes_of(outputs[0]) != bytes_of(outputs[1])


def test_on_prepared_pairs(tmp_path, tiny_vocabulary, convert_on_text):
    table, records = tmp_path / "pairs.jsonl", tmp_path / "pairs"
    table.write_text("".join(f'{{"inputs": "function {i}", "targets": "{i} x"}}\n' for i in range(300)))
    prepare(PrepareSpec("supervised", str(table), str(tiny_vocabulary), 32, 16), records)
    code, output = convert_on_text("t5", "new", "--kv_heads=2", "--method=svd+refit", f"--calibrate={records}")
    assert code == 0
    content = json.loads((output / "conversion.json").read_text())
    assert content["calibration"]["task"] == "supervised"
    assert content["heldout"]["this conversion"] < content["heldout"]["mean pooling"]


def test_mean_pooling_is_scored_too(tiny_records, convert_on_text):
    code, output = convert_on_text(
        "llama", "new", "--kv_heads=2", "--method=mean", f"--calibrate={tiny_records('causal_lm')}"
    )
    assert code == 0
    content = json.loads((output / "conversion.json").read_text())
    assert content["heldout"]["mean pooling"] == content["heldout"]["this conversion"] != content["heldout"]["teacher"]
    assert all(entry["output_error"] > 0.1 for entry in content["attention"])
    _, plain = convert_on_text("llama", "plain", "--kv_heads=2", "--method=mean")
    assert bytes_of(output) == bytes_of(plain) and not (plain / "conversion.json").exists()


def test_an_interrupted_conversion_goes_on_with_its_report(sources, tiny_records, convert_on_text, monkeypatch):
    arguments = ("--kv_heads=2", "--method=svd+refit", f"--calibrate={tiny_records('causal_lm')}")
    _, whole = convert_on_text("llama", "whole", *arguments)
    write = hf.writer.write

    def write_all_but_the_last(directory, entries, *rest):
        def interrupt():
            raise KeyboardInterrupt

        return write(directory, [*entries[:-1], entries[-1]._replace(make=interrupt)], *rest)

    monkeypatch.setattr(hf.writer, "write", write_all_but_the_last)
    code, output = convert_on_text("llama", "new", *arguments)
    assert code == 130 and not output.exists()
    monkeypatch.setattr(hf.writer, "write", write)
    code, output = convert_on_text("llama", "new", *arguments)
    assert code == 0 and bytes_of(output) == bytes_of(whole)
    assert json.loads((output / "conversion.json").read_text()) == json.loads((whole / "conversion.json").read_text())


def test_a_conversion_stopped_while_it_is_scored_has_its_report(tiny_records, convert_on_text, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration.Calibration, "scores", interrupt)
    arguments = ("--kv_heads=2", "--method=svd", f"--calibrate={tiny_records('causal_lm')}")
    code, output = convert_on_text("llama", "new", *arguments)
    content = json.loads((output / "conversion.json").read_text())
    assert code == 130 and len(content["attention"]) == 2 and content["heldout"] is None


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_corpus, tiny_vocabulary, tiny_records):
    """Things that are no calibration text for these models."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "tiny.txt").write_text("x")
    changed = json.loads((tiny_records("causal_lm") / "manifest.json").read_text()) | {"vocabulary_sha256": "0"}
    shutil.copytree(tiny_records("causal_lm"), folder / "other")
    (folder / "other" / "manifest.json").write_text(json.dumps(changed))
    return {
        "texts": folder,
        "records": tiny_records("causal_lm"),
        "corpus": tiny_corpus,
        "t5": tiny_records("span_corruption"),
    }


HEADS = "--kv_heads=2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([HEADS, "--method=svd+refit"], "refit fits outputs on text; give some to calibrate on, or leave refit out"),
        (["--method=svd"], "--kv_heads=K or --kv_budget=P%: give exactly one of them"),
        ([HEADS, "--kv_budget=50%", "--method=svd"], "--kv_heads=K or --kv_budget=P%: give exactly one of them"),
        (
            ["--kv_budget=20%", "--method=svd", "--calibrate={corpus}"],
            "--kv_budget=20% is under one head for each layer and site; nearest: 25%",
        ),
        (
            ["--kv_budget=a half", "--method=svd"],
            "--kv_budget=a half is no share of the present heads; expected one such as 25%",
        ),
        (
            ["--kv_budget=0%", "--method=svd"],
            "--kv_budget=0% is no share of the present heads; expected one such as 25%",
        ),
        (
            ["--kv_budget=50%", "--method=svd", "--sites=cross", "--calibrate={corpus}"],
            "attention site 'cross' is unknown; expected one of decoder_self",
        ),
        (
            ["--kv_budget=50%", "--method=svd", "--sites=decoder_self,decoder_self", "--calibrate={corpus}"],
            "--sites=decoder_self,decoder_self names decoder_self 2 times; give each attention site once",
        ),
        (
            [HEADS, "--method=svd+norm"],
            "method='svd+norm' has the step 'norm'; expected each of +group, +renorm, +tune, +refit once at most",
        ),
        ([HEADS, "--method=svd", "--statistics=x"], "--statistics=x needs --calibrate=TEXT"),
        ([HEADS, "--method=svd", "--calibration_rows=9"], "--calibration_rows=9 needs --calibrate=TEXT"),
        (
            [HEADS, "--method=svd+tune", "--calibrate={corpus}", "--calibration_rows=1"],
            "--calibrate={corpus}: 1 row of text; svd+tune needs 2 or more",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={corpus}", "--calibration_length=9999"],
            "--calibration_length=9999; the model has 4096 positions; nearest: 4096",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={records}", "--calibration_length=32"],
            "--calibration_length=32 is for text; {records} holds rows of 32: leave it out",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={corpus}", "--statistics={texts}/no/file"],
            "--statistics={texts}/no/file: its folder does not exist",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={corpus}", "--calibration_rows=0"],
            "--calibration_rows=0; expected at least 1",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={corpus}", "--calibration_length=7"],
            "--calibration_length=7; expected at least 8",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={t5}"],
            "--calibrate={t5} holds span_corruption; expected rows for a llama model, such as those of causal_lm",
        ),
        (
            [HEADS, "--method=svd", "--calibrate={texts}/other"],
            "--calibrate={texts}/other was prepared with another vocabulary; "
            "expected the model's, {source}/spiece.model",
        ),
    ],
)
def test_bad_input(arguments, message, texts, sources, convert_on_text, capsys, monkeypatch):
    monkeypatch.setattr(calibration.statistics, "collect", None)  # refused before any work
    names = texts | {"source": sources["llama"]}
    code, output = convert_on_text("llama", "new", *(argument.format(**names) for argument in arguments))
    assert code == 2 and not output.exists()
    assert capsys.readouterr().err == f"error: {message.format(**names)}\n"


def test_one_order_for_layers_of_two_sizes(sources, convert_on_text, call, tiny_corpus, tmp_path, monkeypatch, capsys):
    code, uneven = convert_on_text("t5", "uneven", "--kv_heads=decoder_self=4,2", "--method=mean")
    assert code == 0
    capsys.readouterr()
    monkeypatch.setattr(calibration.statistics, "collect", None)  # refused before any work
    for heads in ("--kv_heads=1", "--kv_budget=40%"):
        arguments = (heads, "--method=svd+group", f"--calibrate={tiny_corpus}")
        assert call("convert", f"--source={uneven}", f"--output={tmp_path / 'new'}", *arguments) == 2
        assert capsys.readouterr().err == (
            "error: group: the layers of decoder_self share a bias table but have (4, 2) key/value heads; "
            "leave group out\n"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["empty", "empty.txt", "tiny.txt", "nothing"])
def test_text_that_is_none(text, texts, convert_on_text, capsys):
    code, output = convert_on_text("llama", "new", HEADS, "--method=svd", f"--calibrate={texts['texts'] / text}")
    error = capsys.readouterr().err
    assert code == 2 and not output.exists()
    assert error.startswith("error: ") and error.count("\n") == 1 and str(texts["texts"] / text) in error, error


def test_a_vocabulary_that_is_larger_than_the_models(
    tmp_path, random_model, tiny_vocabulary, tiny_corpus, call, cache, monkeypatch, capsys
):
    monkeypatch.setenv("GQA_CACHE", str(cache))
    vocabulary = shutil.copy(tiny_vocabulary, tmp_path / "spiece.model")
    model = random_model(models.replace(models.size("llama_mini"), vocab_size=32))
    hf.save(model, tmp_path / "source", dtype="float32", extra_files=[vocabulary])
    common = (f"--source={tmp_path / 'source'}", f"--output={tmp_path / 'new'}", HEADS, "--method=svd")
    assert call("convert", *common, f"--calibrate={tiny_corpus}") == 2
    error = capsys.readouterr().err
    assert "its vocabulary has" in error and "the model's embedding 32; use the model's own vocabulary" in error
    (tmp_path / "source" / "spiece.model").unlink()
    shutil.rmtree(tmp_path / "source" / "SHA256SUMS", ignore_errors=True)
    assert call("convert", *common, f"--calibrate={tiny_corpus}") == 2
    assert (
        "has no tokenizer; expected a SentencePiece file *.model or a tokenizer.json in it" in capsys.readouterr().err
    )
