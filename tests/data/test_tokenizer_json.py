import argparse
import json
import shutil
from pathlib import Path

import pytest

from gqa.data.prepare import prepare, read_manifest
from gqa.data.tokenizer_json import TokenizerJson, open_vocabulary, tokenizer_file
from gqa.data.vocabulary import train
from gqa.errors import InputError

tokenizers = pytest.importorskip("tokenizers")
SHIPPED = Path(__file__).parents[2] / "assets" / "vocabulary" / "python_4096.model"
VOCABULARY = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "the", "cat", "sat"])}


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    """A SentencePiece file of Llama's kind with 600 pieces."""
    file = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    train(argparse.__file__, 600, "llama", file)
    return file


@pytest.fixture
def write(tmp_path):
    """A function (template around a text, end of a text) -> the path of a tokenizer of words."""

    def make(template, eos_token):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        special = [(name, VOCABULARY[name]) for name in ("<s>", "</s>") if name in template]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        return tmp_path / "tokenizer.json"

    return make


@pytest.mark.parametrize(
    ("template", "eos_token", "bos_id", "eos_id"),
    [
        ("<s> $A", "</s>", 1, 2),  # Llama's
        ("$A </s>", {"content": "</s>"}, None, 2),  # T5's
        ("$A", None, None, -1),
    ],
)
def test_ids(write, template, eos_token, bos_id, eos_id):
    found = TokenizerJson(write(template, eos_token))
    assert (found.size, found.bos_id, found.eos_id) == (6, bos_id, eos_id)
    assert found.encode("the cat sat on") == [3, 4, 5, 0]
    assert found.decode([1, 3, 4, 2]) == "the cat"


def test_a_file_that_cuts_or_fills_up_reads_whole_texts(write):
    path = write("$A", "</s>")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5, pad_id=1, pad_token="<s>")
    tokenizer.save(str(path))
    found = TokenizerJson(path)
    assert (found.encode("the"), found.encode("the cat sat"), found.bos_id) == ([3], [3, 4, 5], None)


def test_bad_files(write):
    path = write("$A", "<end>")
    with pytest.raises(InputError, match=r"tokenizer_config.json: eos_token='<end>' is no token of tokenizer.json$"):
        TokenizerJson(path)
    path.with_name("tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config.json is no JSON object: "):
        TokenizerJson(path)
    path.with_name("tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"tokenizer_config.json is no JSON object: "):
        TokenizerJson(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"tokenizer.json is no tokenizer: "):
        TokenizerJson(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"tokenizer.json is no tokenizer: "):
        TokenizerJson(path)


@pytest.fixture
def write_bpe(tmp_path):
    """A function (special tokens first, sentinels last) -> the path of a byte-level BPE tokenizer of Python."""

    def make(special, sentinels=0):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(special.values()),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["def function(x):\n    return x * 12 + 34\n"] * 9, trainer)
        tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
        return tmp_path / "tokenizer.json"

    return make


LLAMA_3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_preparation_reads_a_tokenizer_or_its_folder(write_bpe, make_spec, tmp_path):
    path = write_bpe(LLAMA_3)
    assert open_vocabulary(path.parent, foreign=True).path == path
    manifests = [
        prepare(make_spec("causal_lm", vocabulary=str(vocabulary)), tmp_path / name)
        for vocabulary, name in ((path, "a"), (path.parent, "b"))
    ]
    assert manifests[0] == manifests[1]
    vocabulary = open_vocabulary(path, foreign=True)
    assert (vocabulary.eos_id, vocabulary.pad_id) == (1, -1) and vocabulary.token_ids == {"eos_token_id": 1}
    assert vocabulary.files == [path, path.with_name("tokenizer_config.json")]
    histogram = json.loads((tmp_path / "a" / "token_histogram.json").read_text())
    # A document's last piece is left out where it is its end alone.
    assert 0 < histogram["heldout"][1] <= manifests[0].num_documents["heldout"]
    # What ends a document is part of what the records are made from.
    path.with_name("tokenizer_config.json").write_text(json.dumps(LLAMA_3 | {"eos_token": "<|begin_of_text|>"}))
    with pytest.raises(InputError, match="holds records of vocabulary_sha256"):
        prepare(make_spec("causal_lm", vocabulary=str(path)), tmp_path / "a")


def test_a_text_that_spells_a_special_token_is_text(write_bpe):
    path = write_bpe(LLAMA_3)
    text = "x<|end_of_text|>"
    assert 1 in TokenizerJson(path).encode(text)
    vocabulary = open_vocabulary(path, foreign=True)
    assert 1 not in vocabulary.encode(text) and vocabulary.decode(vocabulary.encode(text)) == text
    texts = ["def f", text, "", "half \ud800"]  # of a surrogate pair, which is a question mark
    rows = vocabulary.encode_all(texts, num_threads=2)
    assert [row.tolist() for row in rows] == list(map(vocabulary.encode, texts))
    assert rows[-1].tolist() == vocabulary.encode("half ?")
    assert vocabulary.special_ids == {"<|begin_of_text|>": 0, "<|end_of_text|>": 1}


def test_tasks_of_t5_need_its_special_ids(write_bpe, make_spec, tmp_path):
    spec = make_spec("span_corruption", vocabulary=str(write_bpe(T5, sentinels=100)))
    size = spec.open_vocabulary().size
    assert prepare(spec, tmp_path / "records").vocabulary_size == size
    histogram = json.loads((tmp_path / "records" / "token_histogram.json").read_text())
    assert len(histogram["train"]) == size and histogram["train"][size - 1] > 0 == histogram["train"][size - 100]
    assert read_manifest(tmp_path / "records").make_task().vocabulary_size == size
    write_bpe(T5, sentinels=99)
    with pytest.raises(InputError, match="has not T5's 100 sentinels"):
        spec.open_vocabulary()
    write_bpe(LLAMA_3)
    with pytest.raises(InputError, match=r"has pad, eos, unk = \(-1, 1, -1\); expected T5's \(0, 1, 2\)"):
        spec.open_vocabulary()


def test_a_text_that_goes_on_has_no_space_before_it(write, tmp_path):
    """As Llama 2's own `tokenizer.json` has it: a space mark is put before a text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(write("$A", None)))
    pieces = ["<unk>", "\u2581", "a", "b", "\u2581a", "ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    found = open_vocabulary(path, foreign=True)
    assert found.encode("ab") == [4, 3]
    assert found.encode("ab", continued=True) == [5]


@pytest.mark.parametrize(
    ("added", "vocab_size", "chosen"),
    [
        ({}, None, "tokenizer.model"),
        ({"tokenizer.json": {"added_tokens": [{"id": 2}, {"id": 600}]}}, None, "tokenizer.json"),
        ({"added_tokens.json": {"<|im_start|>": 601}}, 602, "tokenizer.json"),
        ({"added_tokens.json": {"<pad>": 600}}, 600, "tokenizer.model"),  # no row of the embedding
        ({"tokenizer_config.json": {"added_tokens_decoder": {"600": {}, "x": {}}}}, None, "tokenizer.json"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"599": {}}}}, None, "tokenizer.model"),
    ],
)
def test_tokens_that_were_added_are_in_tokenizer_json(added, vocab_size, chosen, llama_file, tmp_path):
    files = {"tokenizer.json": {}, "config.json": {"vocab_size": vocab_size}} | added
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    shutil.copy(llama_file, tmp_path / "tokenizer.model")
    assert tokenizer_file(tmp_path, sorted(tmp_path.iterdir())).name == chosen


def test_the_sentinels_of_t5_are_no_added_tokens(tmp_path):
    shutil.copy(SHIPPED, tmp_path / "spiece.model")
    tokens = [{"id": 4095 - i, "content": f"<extra_id_{i}>"} for i in range(100)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert tokenizer_file(tmp_path, sorted(tmp_path.iterdir())).name == "spiece.model"


@pytest.mark.parametrize("names", [["a.model", "b.model"], []])
def test_folders_without_one_tokenizer(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"has 2 files \*.model|has no tokenizer; expected a SentencePiece file"):
        open_vocabulary(tmp_path)
    with pytest.raises(InputError, match=r"x.json not found; expected a tokenizer.json or a SentencePiece"):
        open_vocabulary(tmp_path / "x.json")
