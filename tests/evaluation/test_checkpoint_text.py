import types

import pytest

from gqa import models
from gqa.checkpoints import hf
from gqa.errors import InputError
from gqa.evaluation.checkpoint_text import CheckpointText, TextModel

tokenizers = pytest.importorskip("tokenizers")


def test_inputs_of_t5_end_with_the_checkpoints_eos(tmp_path):
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "the", "cat"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "tokenizer.json"  # without a tokenizer_config.json, which would name EOS
    tokenizer.save(str(path))
    contents = types.SimpleNamespace(
        config=models.size("t5_1_1_mini"), companions=[path], token_ids={"eos_token_id": [1, 2]}
    )
    text = CheckpointText(tmp_path, contents)
    assert (text.tokens("the cat"), text.eos_ids) == ([3, 4, 1], (1, 2))
    contents.token_ids = None
    with pytest.raises(InputError, match=r"tokenizer.json names no EOS, which T5's inputs end with; expected eos"):
        CheckpointText(tmp_path, contents)


def test_another_tokenizer_makes_it_another_checkpoint(tmp_path, random_model, tiny_vocabulary):
    """So that answers that an evaluation has kept are not read with it."""
    hf.save(random_model(models.size("llama_mini")), tmp_path / "model", dtype="float32", extra_files=[tiny_vocabulary])
    before = TextModel(tmp_path / "model").identity
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    assert TextModel(tmp_path / "model").identity != before
