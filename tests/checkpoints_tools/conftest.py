"""What tests of the command lines share."""

import io
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from gqa import models
from gqa.checkpoints import hf_config
from gqa.checkpoints.store import Store


class State(NamedTuple):
    """As training's."""

    step: jax.Array
    model: models.Model


@pytest.fixture
def save_run():
    """A function (folder, model, vocabulary) that writes what a run that trains that model has at step 7."""

    def save(workdir, model, vocabulary="none.model") -> None:
        with Store(workdir / "checkpoints", keep=1) as store:
            store.save(7, State(jnp.int32(7), model))
        (workdir / "architecture.json").write_text(json.dumps(hf_config.write(model.config, "float32", None)))
        (workdir / "config.json").write_text(json.dumps({"data": {"vocabulary": str(vocabulary)}, "train": {}}))

    return save


@pytest.fixture
def assert_equal():
    """A function that asserts that two models are the same, bit for bit."""

    def check(left, right) -> None:
        assert left.config == right.config
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(one, other)

    return check


@pytest.fixture(scope="session")
def llama_tokenizers(tmp_path_factory):
    """A function (tokenizer.model or tokenizer.json) -> files of a tokenizer of characters, its special ids Llama's."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    characters = "abcdefghijklmnopqrstuvwxyz0123456789_():*+= \n"

    def write_model(folder):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(characters.split("\n")[:1]),
            model_writer=model,
            model_type="char",
            vocab_size=80,
            hard_vocab_limit=False,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())

    def write_json(folder):
        tokenizers = pytest.importorskip("tokenizers")
        vocabulary = {token: number for number, token in enumerate([*special.values(), *characters])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        tokenizer.add_special_tokens(list(special.values()))
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(special))

    def write(name):
        folder = tmp_path_factory.mktemp("tokenizer")
        {"tokenizer.model": write_model, "tokenizer.json": write_json}[name](folder)
        return sorted(folder.iterdir())

    return write
