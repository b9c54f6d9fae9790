"""T5X checkpoints: all is found, and what is damaged, hostile or unknown is named in one line. Parity: tests/parity."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from checkpoints_tools import convert as command
from gqa import checkpoints, models
from gqa.checkpoints import hf, zarr
from gqa.command_line import run
from gqa.convert import convert
from gqa.errors import InputError

RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
SMALL = dict(vocab_size=20, d_model=6, num_heads=4, head_dim=4, d_ff=10, num_encoder_layers=2, num_decoder_layers=3)
CONFIG = models.replace(models.size("t5_1_1_mini"), **SMALL)
PER_LAYER = models.replace(CONFIG, relative_bias_per_layer=True)


def model_of(config) -> models.Model:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), models.abstract(config))


def by_layer(model) -> dict[str, np.ndarray]:
    """Tensors by transformers' names in the order of the layers."""
    tensors = dict(hf.named_tensors(model))
    return {name: tensors[name] for name in hf.table(model.config)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, write_t5x):
    """Stored how -> a checkpoint of `CONFIG` or `PER_LAYER`, not to be changed."""
    folder = tmp_path_factory.mktemp("t5x")
    write_t5x(folder / "separate", by_layer(model_of(CONFIG)), old_specs=True)
    write_t5x(folder / "scanned", by_layer(model_of(PER_LAYER)), scanned=True, head_dim=4)
    write_t5x(folder / "plain", by_layer(model_of(CONFIG)), compressor=None)
    return {path.name: path for path in folder.iterdir()}


class Copy:
    """A checkpoint to damage."""

    def __init__(self, source, directory):
        self.directory = directory
        shutil.copytree(source, directory)
        self.tree = msgpack.unpackb((directory / "checkpoint").read_bytes())  # arrays stay ExtType
        self.target = self.tree["optimizer"]["target"]

    def write(self) -> None:
        (self.directory / "checkpoint").write_bytes(msgpack.packb(self.tree))

    def header(self, name: str, **changes) -> None:
        path = self.directory / name / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def refused(self) -> str:
        with pytest.raises(InputError) as error:
            checkpoints.load(self.directory, **RUN)
        message = str(error.value)
        assert "\n" not in message
        return message


@pytest.fixture
def copy(sources, tmp_path):
    return lambda name="separate": Copy(sources[name], tmp_path / "copy")


def assert_equal_models(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, expected_leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)


@pytest.mark.parametrize(("name", "config"), [("separate", CONFIG), ("scanned", PER_LAYER), ("plain", CONFIG)])
def test_values_and_architecture(sources, name, config, monkeypatch):
    monkeypatch.setattr(zarr, "STEP_BYTES", 100)  # several steps a tensor
    contents = checkpoints.read(sources[name], **RUN)
    assert contents.config == config
    assert contents.token_ids is None
    files = {path for path in sources[name].rglob("*") if path.is_file() and "state." not in str(path)}
    assert set(contents.weight_files) == files
    assert_equal_models(checkpoints.load(sources[name], **RUN), model_of(config))


def test_layers_may_be_taken_in_any_order(sources):
    tensors = checkpoints.read(sources["scanned"], **RUN).tensors
    expected = dict(hf.named_tensors(model_of(PER_LAYER)))
    for path, name in (("mlp.gate", "2.DenseReluDense.wi_0"), ("cross_attention.key", "1.EncDecAttention.k")):
        for layer in (2, 0, 1, 1):
            tensor, _ = tensors[f"decoder.{layer}.{path}"]
            theirs = expected[f"decoder.block.{layer}.layer.{name}.weight"]
            np.testing.assert_array_equal(tensor.read().T, theirs)
            assert tensor.shape == theirs.T.shape


def test_a_bare_target_is_accepted(copy):
    damaged = copy()
    damaged.tree = {"target": damaged.target}
    damaged.write()
    assert_equal_models(checkpoints.load(damaged.directory, **RUN), model_of(CONFIG))


def test_specs_are_never_opened_as_given(copy, tmp_path):
    """Paths that lead elsewhere change nothing: the folder is found by the tensor's name."""
    damaged = copy()
    for path in ("../../elsewhere", "/etc/passwd", "target.decoder.decoder_norm.scale"):
        spec = damaged.target["token_embedder"]["embedding"]
        spec["path"], spec["kvstore"] = path, {"driver": "http", "base_url": "http://127.0.0.1:1", "path": path}
        damaged.write()
        assert_equal_models(checkpoints.load(damaged.directory, **RUN), model_of(CONFIG))


def test_names_that_are_no_names(copy):
    damaged = copy()
    for key in ("../secret", "/etc", "a.b", "", "é", "a\nb"):
        damaged.target[key] = damaged.target["token_embedder"]
        damaged.write()
        assert "expected names of letters, digits and _" in damaged.refused()
        del damaged.target[key]


EMBEDDING = "target.token_embedder.embedding"


@pytest.mark.parametrize("name", ["", "/.zarray", "/0.0"])
def test_links_out_of_the_folder(copy, tmp_path, name):
    damaged = copy()
    path = damaged.directory / (EMBEDDING + name)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert damaged.refused() == f"{path} is a link out of the checkpoint's folder; copy what it points to there"
    path.unlink()
    (tmp_path / "elsewhere").rename(damaged.directory / "inside")
    path.symlink_to(damaged.directory / "inside")
    assert_equal_models(checkpoints.load(damaged.directory, **RUN), model_of(CONFIG))


def test_missing_files(copy):
    damaged = copy()
    folder = damaged.directory / EMBEDDING
    (folder / "1.1").unlink()
    assert damaged.refused() == f"token_embedder/embedding lacks its chunk 1.1 in {folder}"
    (folder / ".zarray").unlink()
    assert damaged.refused() == f"{folder / '.zarray'} is missing"
    shutil.rmtree(folder)
    expected = f"token_embedder/embedding lies in {EMBEDDING} by its name, which {damaged.directory} does not have"
    assert damaged.refused() == expected


def test_damaged_chunks(copy):
    damaged = copy()
    path = damaged.directory / EMBEDDING / "1.0"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for wrong in (content[:-20], bytes(flipped), content[:40]):
        path.write_bytes(wrong)
        message = damaged.refused()
        assert message.startswith("token_embedder/embedding cannot be read from ") and str(path) in message
    path.write_bytes(b"")
    assert damaged.refused() == f"{path} has 0 bytes; a chunk of token_embedder/embedding is 120 (gzip)"


def test_uncompressed_chunks_have_their_size(copy):
    damaged = copy("plain")
    path = damaged.directory / EMBEDDING / "1.0"
    path.write_bytes(path.read_bytes()[:-1])
    assert damaged.refused() == f"{path} has 119 bytes; a chunk of token_embedder/embedding is 120 (None)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [20]}, "shape and chunks are no lists of sizes for the same axes"),
        ({"shape": [20, -6]}, "shape and chunks are no lists of sizes for the same axes"),
        ({"shape": [0, 6]}, "shape and chunks are no lists of sizes for the same axes"),
        ({"chunks": [0, 3]}, "shape and chunks are no lists of sizes for the same axes"),
        ({"chunks": [10, True]}, "shape and chunks are no lists of sizes for the same axes"),
        ({"shape": [20, 5]}, "token_embedder/embedding is [20, 5] of float32; the checkpoint says [20, 6] of float32"),
        ({"dtype": "<f2"}, "token_embedder/embedding is [20, 6] of float16; the checkpoint says [20, 6] of float32"),
        ({"dtype": "<i4"}, "token_embedder/embedding has type <i4; expected <f8, <f4, <f2, bfloat16"),
        (
            {"dtype": [["x", "<f4"]]},
            "token_embedder/embedding has type [['x', '<f4']]; expected <f8, <f4, <f2, bfloat16",
        ),
        ({"compressor": {"id": "blosc"}}, "compressor='blosc' is not supported; expected None or gzip or zlib or zstd"),
        ({"filters": [{"id": "delta"}]}, "filters=[{'id': 'delta'}] is not supported; expected None"),
        ({"zarr_format": 3}, "zarr_format=3 is not supported; expected 2"),
        ({"chunks": [10, 2]}, "token_embedder/embedding lacks its chunk 0.2"),
        ({"chunks": [20, 6]}, "embedding cannot be read from "),
        ({"chunks": [20, 7]}, "chunks=[20, 7] are larger than the shape; expected at most [20, 6]"),
    ],
)
def test_headers_that_are_refused(copy, changes, message):
    damaged = copy()
    damaged.header(EMBEDDING, **changes)
    assert message in damaged.refused()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shape": [1], "shape": [2]}', "[" * 100_000, "\x00"])
def test_headers_that_are_none(copy, text):
    damaged = copy()
    (damaged.directory / EMBEDDING / ".zarray").write_text(text)
    assert str(damaged.directory / EMBEDDING / ".zarray") in damaged.refused()


def test_absurd_shapes_allocate_nothing(copy):
    """Sizes that agree with each other, in the specs and headers of all tensors that have them."""
    damaged = copy()
    huge = 10**12
    for name, shape, chunks in (
        ("decoder/logits_dense/kernel", [6, huge], [3, 10]),
        ("token_embedder/embedding", [huge, 6], [huge // 2, 3]),
    ):
        damaged.header("target." + name.replace("/", "."), shape=shape, chunks=chunks)
        leaf = damaged.target
        for key in name.split("/"):
            leaf = leaf[key]
        leaf["metadata"]["shape"] = shape
    damaged.write()
    assert "decoder/logits_dense/kernel has 200,000,000,000 chunks by" in damaged.refused()
    damaged.header("target.decoder.logits_dense.kernel", chunks=[3, huge // 2])
    assert "a chunk of decoder/logits_dense/kernel is 6,000,000,000,000 (gzip)" in damaged.refused()


def test_absurd_numbers_of_layers(copy):
    damaged = copy("scanned")
    for name, leaf in damaged.target["encoder"]["encoder"]["pre_mlp_layer_norm"].items():
        leaf["metadata"]["shape"][1] = 1001
        damaged.header(f"target.encoder.encoder.pre_mlp_layer_norm.{name}", shape=[6, 1001], chunks=[3, 1001])
    damaged.write()
    assert damaged.refused().endswith("copy has 1,001 layers in its encoder; expected 1 to 1,000")
    shutil.rmtree(damaged.directory)
    damaged = copy()
    damaged.target["encoder"]["layers_9999999999"] = damaged.target["encoder"].pop("layers_1")
    for path in damaged.directory.glob("target.encoder.layers_1.*"):
        path.rename(str(path).replace("layers_1", "layers_9999999999"))
    damaged.write()
    assert damaged.refused().endswith("lacks encoder/layers_1, but has layers_9999999999")


def extension(shape, dtype, values: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, values)))


def pieces(shape, chunks) -> dict:
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (None, "is None; expected an array or TensorStore's spec of one"),
        (3, "is 3; expected an array"),
        ([1.0], "is [1.0]; expected an array"),
        ("text", "is 'text'; expected an array"),
        (msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), "is of the unknown extension type 2; expected an array"),
        (msgpack.ExtType(99, b"os.system"), "is of the unknown extension type 99; expected an array"),
        (msgpack.ExtType(1, b"\x93"), "is damaged or cut short"),
        (msgpack.ExtType(1, msgpack.packb([1])), "is no array of Flax: expected its shape, type and values"),
        (extension([6], "float32", bytes(24)) , None),
        (extension([6], "float32", bytes(20)), "does not have the 24 bytes of [6] of float32"),
        (extension([2**40, 2**40], "float32", bytes(24)), "does not have the 4,835,703,278,458,516,698,824,704 bytes"),
        (extension([-6], "float32", bytes(24)), "is no array of Flax"),
        (extension([6], "object", bytes(48)), "has type object; expected one of bfloat16, float16, float32, float64"),
        (extension([6], ["float32"], bytes(24)), "has type ['float32']; expected one of bfloat16, float16, float32"),
        (extension([7], "float32", bytes(28)), "decoder/decoder_norm/scale in {copy} has shape [7]; expected [6] by"),
        (pieces({"0": 6}, {"0": 1}), "a chunk of decoder/decoder_norm/scale is no array"),
        (pieces({"0": 7}, {"0": extension([6], "float32", bytes(24))}), "do not make an array of shape [7]"),
        (pieces({"0": 6}, {"1": extension([6], "float32", bytes(24))}), "do not make an array of shape [6]"),
        ({"__msgpack_chunked_array__": True}, "do not make an array of shape None"),
        ({"driver": "zarr3", "kvstore": {}}, "decoder/decoder_norm/scale has the driver 'zarr3'; expected zarr"),
        ({"driver": "zarr", "kvstore": {}}, "decoder_norm/scale lies in target.decoder.decoder_norm.scale by its name"),
    ],
)  # fmt: skip
def test_leaves(copy, leaf, message):
    damaged = copy()
    damaged.target["decoder"]["decoder_norm"]["scale"] = leaf
    damaged.write()
    if message is None:
        assert not np.any(checkpoints.load(damaged.directory, **RUN).decoder_norm.scale[...])
    else:
        assert message.format(copy=damaged.directory) in damaged.refused()


def test_missing_unknown_and_misplaced_tensors(copy):
    damaged = copy()
    layer = damaged.target["decoder"]["layers_1"]
    query = layer["self_attention"].pop("query")
    damaged.write()
    missing = "decoder/layers_1/self_attention/query/kernel"
    assert damaged.refused().endswith(f"lacks 1 tensor(s) for its sizes: {missing}")
    layer["self_attention"]["query"] = query
    layer["self_attention"]["query_norm"] = damaged.target["decoder"]["decoder_norm"]
    damaged.write()
    assert damaged.refused().endswith(
        "has unknown 1 tensor(s) for its sizes: decoder/layers_1/self_attention/query_norm/scale"
    )
    del layer["self_attention"]["query_norm"]
    damaged.target["encoder"]["layers_0"]["mlp"]["wi"] = {"kernel": extension([1], "float32", bytes(4))}
    damaged.write()
    assert "encoder/layers_0/mlp/wi/kernel: T5 1.0 with a plain MLP; expected T5.1.1's gated one" in damaged.refused()
    del damaged.target["token_embedder"]
    del damaged.target["encoder"]["layers_0"]["mlp"]["wi"]
    damaged.write()
    assert "lacks the tensor token_embedder/embedding; found decoder/decoder_norm/scale, " in damaged.refused()


def test_sizes_that_contradict_each_other(copy):
    for table, message in (
        ([3, 32], "queries of width 16 do not divide into the 3 heads of encoder/relpos_bias/rel_embedding"),
        ([2, 32], "encoder/layers_0/attention/key/kernel in {} has width"),
        ([8, 32], "decoder/relpos_bias/rel_embedding in {} has shape [4, 32]; expected [8, 32] by the model's sizes"),
        ([32], "encoder/relpos_bias/rel_embedding in {} has shape [32]; expected 2 axes, none of them"),
        ([0, 32], "encoder/relpos_bias/rel_embedding in {} has shape [0, 32]; expected 2 axes, none of them empty"),
    ):
        damaged = copy()
        array = extension(table, "float32", bytes(4 * int(np.prod(table))))
        damaged.target["encoder"]["relpos_bias"]["rel_embedding"] = array
        if table == [2, 32]:  # heads of width 8
            key = extension([6, 12], "float32", bytes(4 * 72))
            damaged.target["encoder"]["layers_0"]["attention"]["key"]["kernel"] = key
        damaged.write()
        assert message.format(damaged.directory) in damaged.refused()
        shutil.rmtree(damaged.directory)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([6, 2, 4, 4], "has shape [6, 2, 4, 4]; expected 3 layers on its second axis"),
        ([6, 3, 2, 8], "has shape [6, 2, 8]; expected heads of width 4"),
        ([6, 3, 4], "has shape [6, 4]; expected [6, 16] by the model's sizes"),
    ],
)
def test_scanned_kernels_of_another_shape(copy, shape, message):
    damaged = copy("scanned")
    array = extension(shape, "float32", bytes(4 * int(np.prod(shape))))
    damaged.target["decoder"]["decoder"]["self_attention"]["value"]["kernel"] = array
    damaged.write()
    assert message in damaged.refused()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or cut short"),
        (b"\x81", "is damaged or cut short"),
        (b"\xdf\xff\xff\xff\xff", "is damaged or cut short"),
        (b"\xdb\xff\xff\xff\xff", "is damaged or cut short"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xffa", "is damaged or cut short"),
        (b"\x91" * 200, "is damaged: its msgpack has more than 100 levels"),
        (b"\x81\xa1a" * 200, "is damaged: its msgpack has more than 100 levels"),
        (b"\x81\x01\x01", "is damaged: its msgpack has a key that is no text"),
        (b"\x82\xa1a\x01\xa1a\x01", "is damaged: its msgpack has the key 'a' twice"),
        (b"\x81\xa1\xff\x01", "is damaged: its msgpack has a text that is not UTF-8"),
        (b"\xc1", "is damaged: its msgpack has an unknown code 0xc1"),
        (b"\x80\x80", "goes on for 1 bytes behind its msgpack"),
        (b"\x90", "holds a msgpack list; expected a map"),
        (b"\x80", "has no optimizer/target; found nothing"),
        (msgpack.packb({"version": 1}), "is of version 1; expected 2 or 3"),
        (b'model_checkpoint_path: "model.ckpt-1000000"', "is TensorFlow's; expected T5X's native format"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(InputError) as error:
        checkpoints.read(tmp_path, **RUN)
    assert str(error.value).startswith(f"{tmp_path / 'checkpoint'} ") and message in str(error.value)


def test_a_checkpoint_cut_short_anywhere_is_refused(copy):
    damaged = copy()
    path = damaged.directory / "checkpoint"
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        assert "cut short" in damaged.refused()


def test_all_that_msgpack_knows_is_skipped_in_the_optimizer_state(copy):
    damaged = copy()
    numbers = [0, 127, 255, 65535, 2**31, 2**63, -1, -32, -128, -32768, -(2**31), -(2**63), 0.5, True, False, None]
    texts = ["", "a" * 31, "a" * 32, "a" * 300, "a" * 70_000, b"", b"a" * 300, b"a" * 70_000]
    extensions = [msgpack.ExtType(7, bytes(size)) for size in (1, 2, 3, 4, 8, 16, 300, 70_000)]
    damaged.tree["optimizer"]["state"] = {
        "list": [*numbers, *texts, *extensions],
        "long list": [0] * 70_000,
        "map": {str(i): i for i in range(20)},
        "long map": {str(i): i for i in range(70_000)},
    }
    damaged.write()
    assert checkpoints.read(damaged.directory, **RUN).config == CONFIG


# The command line.


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        run(command.main)
    return exit.value.code


@pytest.mark.parametrize(("name", "config"), [("separate", CONFIG), ("scanned", PER_LAYER)])
def test_conversion(sources, name, config, tmp_path, monkeypatch):
    read = []
    read_part = zarr.ZarrTensor.read_part
    monkeypatch.setattr(
        zarr.ZarrTensor, "read_part", lambda self, part: read.append(self.name) or read_part(self, part)
    )
    output = tmp_path / "output"
    assert not call(monkeypatch, f"--source={sources[name]}", f"--output={output}", "--kv_heads=2", "--method=mean")
    assert len(read) == len(set(read)), "no chunk is read twice"
    converted = convert(model_of(config), {"decoder_self": 2, "cross": 2}, "mean", jax.random.key(0))
    found = checkpoints.load(output, **RUN)
    assert found.config == converted.config
    assert_equal_models(found, converted)
    sums = json.loads((output / "provenance.json").read_text())["source"]["sha256"]
    assert {"checkpoint", f"{EMBEDDING}/.zarray", f"{EMBEDDING}/0.0", f"{EMBEDDING}/1.1"} <= sums.keys()


def test_damage_leaves_nothing(copy, tmp_path, monkeypatch, capsys):
    damaged = copy()
    folder = damaged.directory / "target.decoder.layers_2.mlp.wo.kernel"
    (folder / "0.0").write_bytes((folder / "0.0").read_bytes()[:-20])
    common = [f"--source={damaged.directory}", f"--output={tmp_path / 'output'}", "--kv_heads=2", "--method=mean"]
    before = sorted(damaged.directory.rglob("*"))
    assert call(monkeypatch, *common) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: decoder/layers_2/mlp/wo/kernel cannot be read from ") and error.count("\n") == 1
    (folder / "0.0").unlink()
    assert call(monkeypatch, *common) == 2
    assert capsys.readouterr().err == f"error: decoder/layers_2/mlp/wo/kernel lacks its chunk 0.0 in {folder}\n"
    before.remove(folder / "0.0")
    assert sorted(damaged.directory.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_warnings_name_the_tensor(sources, copy, tmp_path, monkeypatch, capsys):
    damaged = copy()
    scale = np.array([1, np.nan, 1, 1, 1, 1], np.float32)
    damaged.target["decoder"]["decoder_norm"]["scale"] = extension([6], "float32", scale.tobytes())
    damaged.write()
    arguments = [f"--source={damaged.directory}", f"--output={tmp_path / 'output'}", "--kv_heads=2", "--method=mean"]
    assert not call(monkeypatch, *arguments)
    path = damaged.directory / "checkpoint"
    assert f"warning: decoder/decoder_norm/scale of {path} holds NaN or infinite values\n" in capsys.readouterr().err
