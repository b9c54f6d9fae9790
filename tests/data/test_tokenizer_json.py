import json

import pytest

from gqa.data.tokenizer_json import TokenizerJson
from gqa.errors import InputError

tokenizers = pytest.importorskip("tokenizers")
VOCABULARY = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "the", "cat", "sat"])}


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


def test_bad_files(write):
    path = write("$A", "<end>")
    with pytest.raises(InputError, match=r"tokenizer_config.json: eos_token='<end>' is no token of tokenizer.json$"):
        TokenizerJson(path)
    path.with_name("tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config.json is no JSON object: "):
        TokenizerJson(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InputError, match=r"tokenizer.json is no tokenizer: "):
        TokenizerJson(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"tokenizer.json is no tokenizer: "):
        TokenizerJson(path)
