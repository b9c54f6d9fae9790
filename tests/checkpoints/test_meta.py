"""Meta's Llama folders: what they hold, whatever the number of files, and what is refused. Logits: tests/parity."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa import checkpoints, models
from gqa.checkpoints import hf
from gqa.errors import InputError
from gqa.nn.position import RopeScaling

torch = pytest.importorskip("torch")

RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
SIZES = dict(vocab_size=20, d_model=16, num_heads=4, head_dim=4, d_ff=56, num_layers=2, decoder_self_kv_heads=2)
CONFIG = models.replace(models.size("llama_mini"), **SIZES)


def model_of(config) -> models.Model:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), models.abstract(config))


class Saved:
    """A folder in Meta's layout, and functions to change it."""

    def __init__(self, directory, save_as_meta, shards: int, config=CONFIG, **params):
        self.directory = directory
        self.hf = directory.with_name("hf")
        hf.save(model_of(config), self.hf, dtype="float32")
        save_as_meta(self.hf, directory, shards, **params)

    def params(self, **changes) -> None:
        path = self.directory / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def change(self, number: int, function) -> None:
        """Applies a function to the dictionary of tensors of one file."""
        path = self.directory / f"consolidated.{number:02}.pth"
        tensors = torch.load(path)
        function(tensors)
        torch.save(tensors, path)

    def load(self) -> models.Model:
        return checkpoints.load(self.directory, **RUN)

    def refused(self) -> str:
        with pytest.raises(InputError) as error:
            self.load()
        message = str(error.value)
        assert "\n" not in message
        return message


@pytest.fixture
def make(tmp_path, save_as_meta):
    return lambda shards, **settings: Saved(tmp_path / "meta", save_as_meta, shards, **settings)


@pytest.fixture
def saved(make):
    """The folder, in four files."""
    return make(4)


def assert_equal_models(found, expected):
    assert found.config == expected.config
    for leaf, expected_leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_same_model_from_any_number_of_files(shards, embedding_axis, make):
    saved = make(shards, embedding_axis=embedding_axis)
    assert_equal_models(saved.load(), model_of(CONFIG))
    contents = checkpoints.read(saved.directory, **RUN)
    assert [file.name for file in contents.weight_files] == [f"consolidated.{i:02}.pth" for i in range(shards)]
    assert contents.token_ids is None  # Llama 2's


def test_the_rows_of_queries_and_keys_change_places(make):
    """Meta rotates rows 0 and 1 of a head together, then 2 and 3; we 0 and 2, then 1 and 3."""
    saved = make(1, config=models.replace(CONFIG, d_model=8, num_heads=2, decoder_self_kv_heads=1))

    def number_the_rows(tensors):
        for name in ("wq", "wk", "wv"):
            weight = tensors[f"layers.0.attention.{name}.weight"]
            weight[...] = torch.arange(len(weight))[:, None]

    saved.change(0, number_the_rows)
    attention = saved.load().decoder[0].self_attention
    for column in range(8):
        np.testing.assert_array_equal(attention.query[...][0, column], [[0, 2, 1, 3], [4, 6, 5, 7]])
        np.testing.assert_array_equal(attention.key[...][0, column], [[0, 2, 1, 3]])
        np.testing.assert_array_equal(attention.value[...][0, column], [[0, 1, 2, 3]])


def in_one_storage(tensors) -> None:
    """Makes all tensors views of one storage, as in the files of Llama 1."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    tensors |= {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}


def test_tensors_that_share_a_storage(saved):
    for number in range(4):
        saved.change(number, in_one_storage)
    assert (saved.directory / "consolidated.00.pth").stat().st_size < 20_000
    assert_equal_models(saved.load(), model_of(CONFIG))


def test_a_tensor_is_put_together_from_one_part_at_a_time(make):
    saved = make(4, config=models.replace(CONFIG, d_ff=32_000))
    tensors = checkpoints.read(saved.directory, **RUN).tensors
    for path in ("decoder.1.mlp.gate", "decoder.1.mlp.down"):
        tensor, _ = tensors[path]
        tracemalloc.start()
        tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert tensor.nbytes == 4 * 16 * 32_000
        assert peak < 1.3 * tensor.nbytes  # itself and a quarter


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_from_the_embedding(scaled, make):
    """Llama 3.2 writes the embedding twice; its rotary frequencies are stretched by 32."""
    tied = models.replace(CONFIG, tied_logits=True, max_position=131072 if scaled else 4096)
    tied = models.replace(tied, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192) if scaled else None)
    saved = make(1, config=tied, use_scaled_rope=scaled)  # without output.weight
    assert_equal_models(saved.load(), model_of(tied))

    def write_it_twice(tensors):
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()

    saved.change(0, write_it_twice)
    assert_equal_models(saved.load(), model_of(tied))
    saved.change(0, in_one_storage)
    assert_equal_models(saved.load(), model_of(tied))

    def write_another(tensors):
        tensors["output.weight"] = tensors["tok_embeddings.weight"] + 1

    saved.change(0, write_another)
    model = saved.load()
    np.testing.assert_array_equal(model.logits[...], model.embedding[...].T + 1)
    assert model.config.rope_scaling == (RopeScaling(8.0, 1.0, 4.0, 8192) if scaled else None)


def test_what_params_json_says(saved):
    # 8/3 of 16 is 42; 1.3 times that 54; in fours 56.
    saved.params(vocab_size=20, multiple_of=4, ffn_dim_multiplier=1.3, max_seq_len=100, rope_theta=1e6, norm_eps=1e-6)
    config = saved.load().config
    assert (config.rope_theta, config.norm_epsilon, config.max_position) == (1e6, 1e-6, 16384)
    raw = json.loads((saved.directory / "params.json").read_text())
    del raw["rope_theta"], raw["n_kv_heads"]
    (saved.directory / "params.json").write_text(json.dumps({"model": raw}))
    assert "attention.wk.weight" in saved.refused() and "has shape [8, 16]; expected [16, 16]" in saved.refused()
    raw["n_kv_heads"] = 2
    (saved.directory / "params.json").write_text(json.dumps({"model": raw}))
    config = saved.load().config
    assert (config.rope_theta, config.max_position) == (10000.0, 2048)


def test_llama_3(make):
    config = models.replace(CONFIG, vocab_size=128256, d_model=4, num_heads=2, head_dim=2, num_layers=1)
    saved = make(2, config=config, embedding_axis=0, rope_theta=5e5)
    contents = checkpoints.read(saved.directory, **RUN)
    assert contents.token_ids == {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    assert contents.config == models.replace(config, rope_theta=5e5, max_position=8192, dtype="float32")


def test_older_buffers(saved):
    for number in range(4):
        saved.change(number, lambda tensors: tensors.pop("rope.freqs"))
    assert_equal_models(saved.load(), model_of(CONFIG))
    name = "layers.1.attention.inner_attention.rope.freqs"  # Llama 1's
    for number in range(4):
        saved.change(number, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert_equal_models(saved.load(), model_of(CONFIG))


def test_missing_files(saved):
    (saved.directory / "consolidated.03.pth").rename(saved.directory / "4.pth")
    assert "has 3 file(s) with 4 rows each of layers.0.attention.wq.weight; expected 16 rows in" in saved.refused()
    (saved.directory / "consolidated.01.pth").unlink()
    assert saved.refused().endswith("lacks consolidated.01.pth; found consolidated.00.pth, consolidated.02.pth")
    (saved.directory / "consolidated.02.pth").rename(saved.directory / "consolidated.01.pth")
    (saved.directory / "params.json").unlink()
    assert saved.refused().endswith("params.json is missing")
    for number in range(2):
        (saved.directory / f"consolidated.{number:02}.pth").unlink()
    assert "meta is no checkpoint of a known format (" in saved.refused()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 32}, "says dim=32, the tensors have 16"),
        ({"dim": 10**400}, "the tensors have 16"),
        ({"dim": None}, "has no dim; expected a positive integer"),
        ({"dim": 18}, "n_heads=4 does not divide dim=18"),
        ({"n_heads": 2}, "says n_heads=2 of dim=16, but rope.freqs has shape [2]; expected half a head, [4]"),
        ({"n_heads": 0}, "n_heads=0; expected a positive integer"),
        ({"n_layers": 3}, "says n_layers=3, the tensors have 2"),
        ({"n_layers": 10**12}, "the tensors have 2"),
        ({"n_kv_heads": 4}, "layers.0.attention.wk.weight in {meta} has shape [8, 16]; expected [16, 16]"),
        ({"n_kv_heads": 3}, "decoder_self_kv_heads=3 does not divide num_heads=4; nearest: 2, 4"),
        ({"vocab_size": 24}, "says vocab_size=24, the tensors have 20"),
        ({"vocab_size": -2}, "vocab_size=-2; expected a positive integer"),
        ({"multiple_of": 8}, "says MLP width (by dim, multiple_of and ffn_dim_multiplier)=48, the tensors have 56"),
        ({"multiple_of": 4, "ffn_dim_multiplier": 1e308}, "the tensors have 56"),
        ({"norm_eps": float("nan")}, "norm_eps=nan; expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta=inf; expected a positive number"),
        ({"use_scaled_rope": 1}, "use_scaled_rope=1; expected true or false"),
        ({"sliding_window": 4096}, "sets sliding_window, which is not supported; expected only dim, n_layers"),
        ({"a\nb": 4096}, "sets 'a\\nb', which is not supported"),
    ],
)
def test_params_that_are_refused(changes, message, saved):
    saved.params(**changes)
    assert message.format(meta=saved.directory) in saved.refused()


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "1" * 10_000])
def test_params_that_are_no_json_object(text, saved):
    (saved.directory / "params.json").write_text(text)
    assert "params.json" in saved.refused()


WQ, NORM = "layers.1.attention.wq.weight", "layers.1.ffn_norm.weight"


def add(tensors, **more) -> None:
    tensors |= more


@pytest.mark.parametrize(
    ("numbers", "change", "message"),
    [
        ([2], lambda t: t.pop(WQ), "consolidated.02.pth hold other tensors: only one of them has " + WQ),
        ([2], lambda t: add(t, more=t[WQ]), "consolidated.02.pth hold other tensors: only one of them has more"),
        (range(4), lambda t: t.pop(WQ), "lacks 1 tensor(s) for its sizes: " + WQ),
        (range(4), lambda t: t.pop("tok_embeddings.weight"), "lacks the tensor tok_embeddings.weight; found layers.0"),
        (range(4), lambda t: t.clear(), "lacks the tensor layers.0.attention.wq.weight; found none"),
        (range(4), lambda t: add(t, more=t[WQ]), "has unknown 1 tensor(s) for its sizes: more"),
        (
            [1],
            lambda t: add(t, **{WQ: t[WQ][1:]}),
            "is [4, 16] of float32 in consolidated.00.pth and [3, 16] of float32 in consolidated.01.pth; expected",
        ),
        (
            [3],
            lambda t: add(t, **{WQ: t[WQ].bfloat16()}),
            "is [4, 16] of float32 in consolidated.00.pth and [4, 16] of bfloat16 in consolidated.03.pth",
        ),
        (range(4), lambda t: add(t, **{WQ: t[WQ].int()}), "has type int32; expected one of bfloat16, float16"),
        (range(4), lambda t: add(t, **{WQ: t[WQ][0]}), "has shape [16]; expected a matrix"),
        (range(4), lambda t: add(t, **{NORM: t[NORM][1:]}), "has shape [15]; expected [16] by the model's sizes"),
        (range(4), lambda t: add(t, **{"tok_embeddings.weight": torch.ones(4)}), "has shape [4]; expected a matrix"),
        ([2], lambda t: t[NORM].add_(1), NORM + " of {meta} differs in consolidated.00.pth and consolidated.02.pth"),
    ],
)
def test_files_that_contradict_each_other(numbers, change, message, saved):
    for number in numbers:
        saved.change(number, change)
    assert message.format(meta=saved.directory) in saved.refused()


def test_norms_that_differ_inside_a_shared_storage(saved):
    saved.change(2, lambda tensors: tensors[NORM].add_(1))
    for number in range(4):
        saved.change(number, in_one_storage)
    assert checkpoints.read(saved.directory, **RUN)  # headers do not tell
    assert f"{NORM} of {saved.directory} differs in consolidated.00.pth and consolidated.02.pth" in saved.refused()
