import io
import json
import re
import shutil
import signal
import sys

import jax
import pytest
import sentencepiece

from gqa import command_line, generate, models
from gqa.checkpoints import hf
from gqa.data.vocabulary import Vocabulary
from gqa.decode.batches import Settings, generate_all
from gqa.models.quantize import quantize

PROMPTS = ["def f(x)", "x", "return y * z + 1", "abc", "function 7 of 9", "z"]


@pytest.fixture(scope="module")
def checkpoints(tiny_vocabulary, tmp_path_factory):
    """A random checkpoint of each family with the vocabulary of characters."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, size in (("t5", "t5_1_1_mini"), ("llama", "llama_mini")):
        network = models.create(models.size(size), jax.random.key(3))
        ids = {"eos_token_id": [1, 40]}
        hf.save(network, folder / name, dtype="float32", token_ids=ids, extra_files=[tiny_vocabulary])
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """A function (arguments, lines of the terminal) -> exit code, stdout, stderr."""

    def run(*arguments, terminal: str = ""):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(terminal))
        with pytest.raises(SystemExit) as exit:
            command_line.run(generate.main)
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


def expected_outputs(checkpoints, name, prompts, max_new_tokens=8, weights=None, cache_dtype=None):
    """Text and number of tokens of each prompt's continuation, by the library."""
    from gqa import checkpoints as formats

    choices = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)
    network = formats.load(checkpoints / name, **choices)
    if weights is not None:
        network = quantize(network, weights)
    vocabulary = Vocabulary(checkpoints / name / "characters.model")
    settings = Settings(
        max_new_tokens, (1, 40), None, 0, num_beams=1, length_penalty=1.0, batch_size=8, cache_dtype=cache_dtype
    )
    ends = [] if name == "llama" else [1]
    tokens = {i: [*vocabulary.encode(prompt), *ends] for i, prompt in enumerate(prompts)}
    found = dict(generate_all(network, tokens, settings))
    return [(vocabulary.decode([t for t in found[i] if t < vocabulary.size]), len(found[i])) for i in tokens]


@pytest.mark.parametrize("name", ["t5", pytest.param("llama", marks=pytest.mark.full)])
def test_prompt_file_and_terminal_agree(name, checkpoints, call, tmp_path):
    expected = expected_outputs(checkpoints, name, PROMPTS)
    common = [f"--checkpoint={checkpoints / name}", "--max_new_tokens=8", "--batch_size=4"]

    code, out, err = call(*common, f"--prompt={PROMPTS[0]}")
    assert (code, out) == (0, expected[0][0] + "\n")
    assert f"{expected[0][1]} tokens, " in err and "tokens/s, the first after" in err

    # JSON may spell half a surrogate pair, which UTF-8 has none of.
    lines = [json.dumps({"prompt": prompt, "id": f"{i}\ud800"}).encode() for i, prompt in enumerate(PROMPTS)]
    digits = b'{"prompt": ' + b"1" * 5000 + b"}"
    bad = {2: b"nonsense", 4: b'{"prompt": "\xff"}', 5: b'{"text": "x"}', 6: b'{"prompt": "", "id": 9}', 7: digits}
    for number in sorted(bad):
        lines.insert(number - 1, bad[number])
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    code, out, err = call(*common, *files)
    assert code == 2
    assert f"wrote {tmp_path / 'out.jsonl'}: 6 prompts, {sum(count for _, count in expected)} tokens, " in out
    last = err.splitlines()[-1]
    assert last.startswith(f"error: 5 of 11 lines of {tmp_path / 'in.jsonl'} are bad, the rest is done; first: line 2")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [entry for entry in found if "error" not in entry] == [
        {"prompt": prompt, "id": f"{i}?", "output": text, "num_tokens": count}
        for i, (prompt, (text, count)) in enumerate(zip(PROMPTS, expected, strict=True))
    ]
    errors = {number: found[number - 1]["error"] for number in bad}
    assert errors.pop(7).startswith("line 7: no JSON: Exceeds the limit")
    assert errors == {
        2: "line 2: no JSON: Expecting value at character 1",
        4: "line 4: byte 13 is no UTF-8",
        5: 'line 5: expected a JSON object with a "prompt" that is text',
        6: "line 6: the prompt is empty; expected some text",
    }
    assert found[5]["id"] == 9 and found[4]["text"] == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    code, _, err = call(*common, *files)
    assert (code, err) == (2, f"error: --output={tmp_path / 'out.jsonl'} exists already; name a new file\n")

    # T5 reads each line by itself; a decoder sees what was said, until an empty line.
    code, out, err = call(*common, "--interactive", terminal="x\n\nx\nx\n")
    assert code == 0 and err.count("tokens/s") == 3
    if name == "t5":
        assert out == 3 * (expected[1][0] + "\n")
    else:
        [(first, _)] = expected_outputs(checkpoints, name, ["x\n"])
        assert out.startswith(2 * (first + "\n"))
        assert out != 3 * (first + "\n")


def test_fewer_bits_and_a_draft(checkpoints, call, tmp_path):
    expected = expected_outputs(checkpoints, "llama", PROMPTS, weights="int4", cache_dtype="int8")
    common = [f"--checkpoint={checkpoints / 'llama'}", "--max_new_tokens=8", "--weights=int4", "--cache=int8"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for number, arguments in enumerate(([], [f"--draft={checkpoints / 'llama'}", "--draft_tokens=2"])):
        files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / f'{number}.jsonl'}"]
        code, out, _ = call(*common, *files, *arguments)
        assert code == 0 and bool(arguments) == bool(
            re.search(r"tokens/s.*, 100% of the draft's \d+ tokens kept$", out)
        )
        found = [json.loads(line) for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()]
        assert [(entry["output"], entry["num_tokens"]) for entry in found] == expected
    code, out, err = call(*common, f"--prompt={PROMPTS[0]}", f"--draft={checkpoints / 'llama'}")
    assert (code, out) == (0, expected[0][0] + "\n")
    assert err.startswith(f"{expected[0][1]} tokens, ") and "of the draft's " in err


def test_drafts_that_are_refused(checkpoints, call, tmp_path, tiny_vocabulary):
    network = models.create(models.replace(models.size("llama_mini"), vocab_size=200), jax.random.key(3))
    hf.save(network, tmp_path / "other", dtype="float32")
    network = models.create(models.size("llama_mini"), jax.random.key(3))
    hf.save(network, tmp_path / "tokenizer", dtype="float32")
    (tmp_path / "tokenizer" / "other.model").write_bytes(b"another")
    hf.save(network, tmp_path / "json", dtype="float32")
    (tmp_path / "json" / "tokenizer.json").write_text("{}")
    own = tmp_path / "own"
    shutil.copytree(checkpoints / "llama", own)
    (own / "tokenizer.json").write_text("{ }")
    for arguments, message in (
        (
            [f"--draft={tmp_path / 'other'}"],
            "the draft is a Llama of 200 tokens; expected the model's kind: a Llama of 256",
        ),
        ([f"--draft={checkpoints / 't5'}"], "the draft is a T5 of 256 tokens; expected the model's kind: a Llama"),
        ([f"--draft={tmp_path / 'tokenizer'}"], f"--draft={tmp_path / 'tokenizer'}: other.model is another vocabulary"),
        (
            [f"--checkpoint={own}", f"--draft={tmp_path / 'json'}"],
            f"--draft={tmp_path / 'json'}: tokenizer.json is another vocabulary than {own / 'tokenizer.json'}",
        ),
        ([f"--draft={tmp_path / 'none'}"], f"{tmp_path / 'none'} is not a directory; expected a checkpoint's"),
        ([f"--draft={tmp_path / 'other'}", "--beams=2"], "--beams=2 with --draft; expected one of them"),
        ([f"--draft={checkpoints / 'llama'}", "--draft_tokens=0"], "num_drafted=0 is below 1; expected 1 or more"),
        (["--draft_tokens=3"], "--draft_tokens=3 is of speculative decoding; add --draft=DIR"),
    ):
        code, out, err = call(f"--checkpoint={checkpoints / 'llama'}", "--prompt=x", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {message}"), err


def test_a_killed_run_goes_on(checkpoints, call, tmp_path, run_python):
    prompts = [{"prompt": PROMPTS[i % 6][: 1 + i % 5]} for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    common = [f"--checkpoint={checkpoints / 'llama'}", "--max_new_tokens=8", f"--input={tmp_path / 'in.jsonl'}"]
    common += ["--temperature=1.5", "--seed=5"]
    assert call(*common, f"--output={tmp_path / 'whole.jsonl'}", "--batch_size=3")[0] == 0

    journal = tmp_path / ".out.jsonl.partial"
    # The process kills itself in the middle of writing its eleventh result.
    script = (
        "import os, signal, sys\nfrom gqa import generate\nfrom gqa.decode import batches\n"
        "real = batches.generate_all\n"
        "def until_ten(*args):\n"
        "    for number, result in enumerate(real(*args)):\n"
        "        if number == 10:\n"
        f"            open({str(journal)!r}, 'ab').write(b'[7, [1')\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield result\n"
        "batches.generate_all = until_ten\ngenerate.main()\n"
    )
    process = run_python("-c", script, *common, f"--output={tmp_path / 'out.jsonl'}", "--batch_size=4")
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    assert len(journal.read_bytes().splitlines()) == 12  # the header, ten results and the torn one

    code, _, err = call(*common, f"--output={tmp_path / 'out.jsonl'}", "--top_k=3")
    expected = f"error: {journal} holds a run with another settings; delete it or name another --output\n"
    assert (code, err) == (2, expected)
    code, out, _ = call(*common, f"--output={tmp_path / 'out.jsonl'}", "--batch_size=5")
    assert code == 0 and "out.jsonl: 30 prompts" in out
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


def test_bad_arguments(checkpoints, call, tmp_path):
    llama = f"--checkpoint={checkpoints / 'llama'}"
    for arguments, message in (
        ([], "expected one of --prompt=TEXT, --input=FILE with --output=FILE, and --interactive"),
        (["--prompt=x", "--interactive"], "expected one of --prompt=TEXT, --input=FILE"),
        (["--input=in.jsonl"], "--input and --output go together; expected both"),
        ([f"--input={tmp_path}", f"--output={tmp_path / 'o'}"], f"--input={tmp_path} is not a file; expected"),
        (["--prompt=x", "--temperature=0"], "temperature=0.0 is not above 0; leave it out"),
        (["--prompt=x", "--top_p=1.2"], "top_p=1.2 is not above 0 and at most 1; nearest: 1.0"),
        (["--prompt=x", "--beams=2", "--top_k=5"], "beams=2 with sampling; expected beams=1 or no temperature"),
        (["--prompt=x", "--length_penalty=2"], "--length_penalty=2.0 is of beam search; add --beams=4, say"),
        (["--prompt=x", "--max_new_tokens=0"], "--max_new_tokens=0 is below 1; expected 1 or more"),
        (["--prompt="], "the prompt is empty; expected some text"),
        (["--prompt=x", "--max_new_tokens=5000"], "a prompt of 1 tokens and max_new_tokens=5000 exceed the model's"),
        (
            ["--prompt=x", "--weights=int3"],
            "weights='int3'; expected int8, int4, nf4, or none for the model's own; nearest",
        ),
        (["--prompt=x", "--cache=int4"], "cache type 'int4' is unknown; expected int8, or none for the model's own"),
        (["--prompt=x", "--topk=5"], "unknown option --topk; nearest: --top_k"),
    ):
        code, out, err = call(llama, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {message}"), err


def test_what_a_checkpoint_lacks(checkpoints, call, tmp_path, tiny_vocabulary):
    network = models.create(models.replace(models.size("llama_mini"), vocab_size=50), jax.random.key(0))
    hf.save(network, tmp_path / "bare", dtype="float32")
    hf.save(network, tmp_path / "small", dtype="float32", extra_files=[tiny_vocabulary])
    for name, message in (
        (
            "bare",
            f"{tmp_path / 'bare'} has no tokenizer; expected a SentencePiece file *.model or a tokenizer.json in it",
        ),
        ("small", "the model 50; expected the model's own tokenizer"),
        ("absent", f"{tmp_path / 'absent'} is not a directory; expected a checkpoint's"),
    ):
        code, _, err = call(f"--checkpoint={tmp_path / name}", "--prompt=x")
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_generation_config_says_what_ends_a_text(checkpoints, call, tmp_path, tiny_vocabulary):
    network = models.create(models.size("llama_mini"), jax.random.key(3))
    hf.save(network, tmp_path / "model", dtype="float32", extra_files=[tiny_vocabulary])
    prompt = Vocabulary(tiny_vocabulary).encode("def f(x)")
    settings = Settings(8, (), None, 0, num_beams=1, length_penalty=1.0, batch_size=1)
    free = dict(generate_all(network, {0: prompt}, settings))[0]
    arguments = [f"--checkpoint={tmp_path / 'model'}", "--prompt=def f(x)", "--max_new_tokens=8"]
    for eos_ids, count in ((free[3], free.index(free[3]) + 1), ([250, free[1]], free.index(free[1]) + 1)):
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
        code, _, err = call(*arguments)
        assert code == 0 and err.startswith(f"{count} tokens, ")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    code, _, err = call(*arguments)
    assert code == 2 and "eos_token_id=['</s>']; expected a token id or a list of them" in err


def test_llamas_own_tokenizer_begins_prompts_with_bos(call, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the cat sat on the mat", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )  # SentencePiece's usual ids, which are Llama's: unk 0, bos 1, eos 2, no pad
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    vocabulary = Vocabulary(tmp_path / "tokenizer.model", foreign=True)
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, -1)
    network = models.create(models.replace(models.size("llama_mini"), vocab_size=vocabulary.size), jax.random.key(3))
    hf.save(network, tmp_path / "llama", dtype="float32", extra_files=[tmp_path / "tokenizer.model"])
    prompt = [1, *vocabulary.encode("the cat")]
    settings = Settings(8, (2,), None, 0, num_beams=1, length_penalty=1.0, batch_size=1)
    new = dict(generate_all(network, {0: prompt}, settings))[0]
    code, out, _ = call(f"--checkpoint={tmp_path / 'llama'}", "--prompt=the cat", "--max_new_tokens=8")
    whole = vocabulary.decode([*prompt, *new])
    assert code == 0 and whole.startswith("the cat") and out == whole.removeprefix("the cat") + "\n"
