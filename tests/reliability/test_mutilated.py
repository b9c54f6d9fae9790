"""Mutilated checkpoints of every format are refused in one line, or read exactly as the format's own reader reads them.

Case N is a function of N alone: the format, what is done to it and where. A case goes through
`checkpoints_tools.convert` with as many heads as there are, so that what comes out is what went in.
"""

import json
import random
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import checkpoints_tools.convert  # noqa: F401  before memory is measured
from gqa import checkpoints, models
from gqa.checkpoints import hf, writer
from gqa.checkpoints.table import parameters
from tests.reliability import mutilations

torch = pytest.importorskip("torch")

CASES, SHORT = 200, 30
RUN = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none", dropout_rate=0.0)
SMALL = dict(vocab_size=24, d_model=16, num_heads=4, head_dim=4, d_ff=56)
LLAMA = models.replace(models.size("llama_mini"), **SMALL, num_layers=2, decoder_self_kv_heads=4)
T5 = models.replace(models.size("t5_1_1_mini"), **SMALL, num_encoder_layers=2, num_decoder_layers=2)
T5_PER_LAYER = models.replace(T5, relative_bias_per_layer=True)
SLACK_BYTES = 1 << 23  # Python's objects, whatever the checkpoint
DEADLINE = 120  # seconds, of cases that take less than one

# Sources.


@pytest.fixture(scope="module")
def sources(tmp_path_factory, random_model, save_as_meta, write_t5x):
    """Name -> a checkpoint of that form, not to be changed."""
    root = tmp_path_factory.mktemp("sources")
    llama, t5 = random_model(LLAMA), random_model(T5)

    def plain(model, name: str, dtype: str = "float32") -> Path:
        hf.save(model, root / name, dtype=dtype)
        (root / name / writer.SUMS).unlink()
        return root / name

    def as_bin(source: Path, name: str, files: int) -> None:
        (root / name).mkdir()
        shutil.copy(source / "config.json", root / name)
        tensors = {key: torch.from_numpy(value) for key, value in load_file(source / "model.safetensors").items()}
        names = [f"pytorch_model-{i + 1:05}-of-{files:05}.bin" for i in range(files)]
        parts = [dict(list(tensors.items())[i::files]) for i in range(files)]
        if files == 1:
            names = ["pytorch_model.bin"]
        else:
            weight_map = {key: file for file, part in zip(names, parts, strict=True) for key in part}
            (root / name / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, part in zip(names, parts, strict=True):
            torch.save(part, root / name / file)

    def sharded(source: Path, name: str) -> None:
        (root / name).mkdir()
        shutil.copy(source / "config.json", root / name)
        tensors = load_file(source / "model.safetensors")
        files = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
        weight_map = {key: files[i % 3] for i, key in enumerate(tensors)}
        for file in files:
            save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, root / name / file)
        (root / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    plain(llama, "safetensors")
    plain(t5, "safetensors of T5", "bfloat16")
    sharded(plain(llama, "to shard"), "sharded safetensors")
    as_bin(root / "safetensors", "bin", 1)
    as_bin(plain(t5, "to pickle"), "sharded bin", 2)
    save_as_meta(root / "safetensors", root / "meta", 2)
    arrays = dict(hf.named_tensors(t5))
    write_t5x(root / "T5X", {name: arrays[name] for name in hf.table(T5)})
    arrays = dict(hf.named_tensors(random_model(T5_PER_LAYER)))
    write_t5x(
        root / "scanned T5X",
        {name: arrays[name] for name in hf.table(T5_PER_LAYER)},
        scanned=True,
        head_dim=4,
        compressor="zstd",
        dtype="bfloat16",
        layer_chunk=1,
    )
    hf.save(llama, root / "ours", dtype="float32")
    return {name: root / name for name in FORMS}


# The readers of the formats' own libraries.


def read_hf(folder: Path) -> dict[str, np.ndarray]:
    for suffix, read in ((".safetensors", load_file), (".bin", load_torch)):
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        if (folder / f"{stem}{suffix}").is_file():
            return read(folder / f"{stem}{suffix}")
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {file: read(folder / file) for file in set(weight_map.values())}
            return {name: files[file][name] for name, file in weight_map.items()}
    raise FileNotFoundError(folder)


def load_torch(path: Path) -> dict[str, np.ndarray]:
    tensors = torch.load(path, weights_only=True)
    return {name: as_numpy(tensor) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def as_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


COLUMNS = ("wo", "w2", "tok_embeddings")  # Meta's matrices whose parts are columns


def read_meta(folder: Path) -> dict[str, np.ndarray]:
    files = [load_torch(path) for path in sorted(folder.glob("consolidated.*.pth"))]
    tensors = {}
    for name, first in files[0].items():
        parts = [file[name] for file in files]
        if "norm" in name:
            assert all(part.tobytes() == first.tobytes() for part in parts)
            tensors[name] = first
        elif first.ndim == 2:
            tensors[name] = np.concatenate(parts, int(name.split(".")[-2] in COLUMNS))
    return tensors


def read_t5x(folder: Path) -> dict[str, np.ndarray]:
    tree = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())

    def leaves(prefix: str, tree: dict):
        for key, value in tree.items():
            if isinstance(value, dict) and "driver" in value:
                path = str(folder / ("target." + (prefix + key).replace("/", ".")))
                spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}
                yield prefix + key, tensorstore.open(spec, open=True).result().read().result()
            elif isinstance(value, dict):
                yield from leaves(f"{prefix}{key}/", value)
            else:
                yield prefix + key, value

    return dict(leaves("", tree["optimizer"]["target"]))


class Form(NamedTuple):
    """A form of checkpoints: how its own libraries read it, and what is done to it."""

    read: Callable[[Path], dict[str, np.ndarray]]
    mutilations: list[Callable]


FORMS = {
    "safetensors": Form(read_hf, mutilations.SAFETENSORS),
    "safetensors of T5": Form(read_hf, mutilations.SAFETENSORS),
    "sharded safetensors": Form(read_hf, mutilations.SAFETENSORS),
    "bin": Form(read_hf, mutilations.PICKLES),
    "sharded bin": Form(read_hf, mutilations.PICKLES),
    "meta": Form(read_meta, mutilations.PICKLES),
    "T5X": Form(read_t5x, mutilations.T5X),
    "scanned T5X": Form(read_t5x, mutilations.T5X),
    "ours": Form(read_hf, mutilations.SAFETENSORS),
}


# The property.


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in mutilations.files_of(folder)}


@pytest.fixture
def deadline():
    """Interrupts what hangs."""

    def late(*_):
        raise AssertionError(f"not done after {DEADLINE} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def assert_same_tensors(folder: Path, theirs: dict[str, np.ndarray], output: Path) -> None:
    """What we read of `folder` is `theirs`, and `output` has that and nothing else."""
    contents = checkpoints.read(folder, **RUN)
    shapes = {path: p.layer_shape for p in parameters(models.abstract(contents.config)) for path in p.paths}
    rows = {row.path: (name, row.transform) for name, row in hf.table(contents.config).items()}
    written = load_file(output / "model.safetensors")
    assert rows.keys() == contents.tensors.keys()
    assert written.keys() == {name for name, _ in rows.values()}
    for path, (tensor, to_ours) in contents.tensors.items():
        found, expected = tensor.read(), theirs[tensor.name]
        if tensor.name.startswith(("encoder/encoder/", "decoder/decoder/")):  # T5X's scanned layers
            expected = expected[:, int(path.split(".")[1])]
        expected = expected.reshape(tensor.shape)
        assert found.dtype == expected.dtype and found.shape == tensor.shape
        assert found.tobytes() == expected.tobytes(), tensor.name
        name, to_theirs = rows[path]
        expected = to_theirs.to_theirs(to_ours.to_ours(expected, shapes[path]))
        assert written[name].tobytes() == expected.astype(written[name].dtype).tobytes(), name


@pytest.fixture
def convert(call, tmp_path):
    """A function (folder) -> exit code and peak bytes of its conversion to `tmp_path / "output"`."""

    def run(folder: Path) -> tuple[int, int]:
        arguments = (f"--source={folder}", f"--output={tmp_path / 'output'}", "--kv_heads=4", "--method=mean")
        tracemalloc.start()
        try:
            return call("convert", *arguments), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return run


@pytest.mark.parametrize("form", FORMS)
def test_whole_ones_are_read_as_by_the_formats_own_reader(form, sources, tmp_path, convert):
    assert convert(sources[form])[0] == 0
    assert_same_tensors(sources[form], FORMS[form].read(sources[form]), tmp_path / "output")


@pytest.mark.parametrize("number", [n if n < SHORT else pytest.param(n, marks=pytest.mark.full) for n in range(CASES)])
@pytest.mark.usefixtures("deadline")
def test_mutilated_ones_are_refused_or_read_as_by_the_formats_own_reader(number, sources, tmp_path, convert, capsys):
    rng = random.Random(number)
    name = list(FORMS)[number % len(FORMS)]
    form, folder = FORMS[name], tmp_path / "source"
    shutil.copytree(sources[name], folder)
    mutilate = rng.choice(form.mutilations)
    what = f"{name}, {mutilate(rng, folder)}"
    before = contents_of(folder)
    try:
        theirs = form.read(folder)
    except Exception:  # each library has its own
        theirs = None
    code, peak = convert(folder)
    assert contents_of(folder) == before, what
    assert peak < 2 * sum(map(len, before.values())) + SLACK_BYTES, what
    if code == 0:
        every_bit_has_a_sum = name == "ours" and mutilate is mutilations.flip and writer.SUMS not in what
        assert not every_bit_has_a_sum, what
        # What its own reader refuses and we do not is damage beside the values.
        assert_same_tensors(folder, form.read(sources[name]) if theirs is None else theirs, tmp_path / "output")
    else:
        *others, error = capsys.readouterr().err.splitlines()
        assert code == 2 and error.startswith("error: "), what
        # Before it may stand warnings, and a progress bar on a slow machine.
        assert all(line.startswith("warning: ") or "B/s" in line or not line for line in others), what
        assert [path.name for path in tmp_path.iterdir()] == ["source"], what
