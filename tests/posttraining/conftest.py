"""A tiny policy, and reward models that like some tokens better than others."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from gqa import models
from gqa.checkpoints import hf, reward
from gqa.command_line import load_config
from gqa.data.vocabulary import Vocabulary
from gqa.models.reward import with_head

ROOT = Path(__file__).parents[2]
LIKED = range(40, 110)  # ids that the reward model likes
ENDS = (1, *range(180, 200))  # ids that end a response: so many that a policy of random weights says them


def liking(architecture, ids, gain=1.0):
    """A reward model whose score grows with the share of `ids` among all tokens read: attention is their mean."""
    model = with_head(models.create(architecture, jax.random.key(0)), jax.random.key(1))
    model = jax.tree.map(jnp.zeros_like, model)
    ones = jnp.ones((architecture.vocab_size, architecture.d_model))
    liked = np.isin(np.arange(architecture.vocab_size), list(ids))
    stack = model.backbone.decoder[0]
    for norm in (model.backbone.decoder_norm, stack.self_attention_norm, stack.mlp_norm):
        norm.scale[...] = jnp.ones_like(norm.scale[...])
    model.backbone.embedding[...] = ones.at[:, 0].set(jnp.where(liked, 1.0, -1.0))
    stack.self_attention.value[...] = stack.self_attention.value[...].at[0, 0, 0, 0].set(1.0)
    stack.self_attention.out[...] = stack.self_attention.out[...].at[0, 0, 0, 0].set(10.0)
    model.head[...] = model.head[...].at[0].set(gain)
    return model


@pytest.fixture(scope="session")
def liked():
    """Ids that the reward model of `folders` likes."""
    return LIKED


@pytest.fixture(scope="session")
def liking_model():
    """A function (architecture) -> a reward model that likes `liked`."""
    return lambda architecture: liking(architecture, LIKED)


@pytest.fixture(scope="session")
def folders(tiny_run, tiny_vocabulary, tmp_path_factory):
    """Checkpoints by name.

    `policy`; `talker`, the same, whose texts any sentinel ends; `reward`, which likes `LIKED`; `safety`, the opposite.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    one_layer = {**tiny_run("llama").model.changes, "num_layers": 1}
    architecture = tiny_run("llama", {"model.changes": one_layer}).model.architecture()
    pieces = Vocabulary(tiny_vocabulary, foreign=True).size - 100
    talker = dict(extra_files=[tiny_vocabulary], token_ids={"eos_token_id": [1, *range(pieces, pieces + 100)]})
    files = dict(extra_files=[tiny_vocabulary], token_ids={"pad_token_id": 0, "eos_token_id": list(ENDS)})
    hf.save(models.create(architecture, jax.random.key(7)), root / "policy", dtype="float32", **files)
    hf.save(models.create(architecture, jax.random.key(7)), root / "talker", dtype="float32", **talker)
    reward.save(liking(architecture, LIKED), root / "reward", **files)
    reward.save(liking(architecture, LIKED, -1.0), root / "safety", **files)
    return {name: root / name for name in ("policy", "talker", "reward", "safety")}


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """40 prompts; every fourth is tagged as one of safety."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"add {number} to {'x' * (number % 5)}", "safety": number % 4 == 0} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def sampling_config(folders, prompts_file, tiny_vocabulary):
    """A function (name of a config, dotted changes) -> that config of configs/posttraining on the tiny models."""

    def make(name: str, changes: dict) -> ConfigDict:
        config = load_config(ROOT / "configs" / "posttraining" / f"{name}.py", ["--config.prompts=x"])
        values = dict(
            policy=str(folders["policy"]),
            reward=str(folders["reward"]),
            prompts=str(prompts_file),
            template="human_bot",
            vocabulary=str(tiny_vocabulary),
            inputs_length=40,
            new_tokens=8,
        )
        for key, value in {**values, **changes}.items():
            *sections, last = key.split(".")
            section = config
            for part in sections:
                section = section[part]
            section[last] = value
        return config

    return make
