"""T5X's native checkpoints of the T5.1.1 family: a msgpack file `checkpoint`, and a zarr folder per large array.

The msgpack is `{version, optimizer: {target, state}}`; a leaf of `target` is an array, or TensorStore's spec of one
that lies in a folder of its own, named after its place in the tree (`target.encoder.layers_0.mlp.wo.kernel`). Specs
name the drivers and buckets of the machine that wrote them: the folder is found by its name, beside `checkpoint`, and
nothing is ever opened as a spec says. There is no configuration; names and shapes determine it.

Layers are separate (`encoder/layers_3/…`), or scanned (`encoder/encoder/…`, the layers on the second axis). Kernels of
attentions have one axis for all heads, or one for heads and one for their width. Sources: T5X `checkpoints.py` and
`examples/scalable_t5/network.py`, Flaxformer `t5_architecture.py`.
"""

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa.checkpoints.flax_msgpack import is_array, open_array, read_tree
from gqa.checkpoints.source import Contents, match, some
from gqa.checkpoints.table import LINEAR, SAME, Row, Transform
from gqa.checkpoints.tensor import Tensor, read_bytes
from gqa.checkpoints.zarr import ZarrTensor, check_inside, open_zarr
from gqa.errors import InputError
from gqa.models.heads import MAX_LAYERS, KVHeads
from gqa.models.t5 import T5Config

CHECKPOINT = "checkpoint"
KEPT_BYTES = 1 << 30  # of scanned tensors, or more where two of them are larger

KERNEL = Transform("in_out", 1)
OUT_KERNEL = Transform("in_out", 2)  # of an attention, ours [H, d, D]
TRANSPOSED = LINEAR  # tables of biases: theirs are [H, buckets]

# Stack -> its attentions: their name, its norm's, our name, the field of its key/value heads.
_ATTENTIONS = {
    "encoder": [("attention", "pre_attention_layer_norm", "self_attention", "encoder_self_kv_heads")],
    "decoder": [
        ("self_attention", "pre_self_attention_layer_norm", "self_attention", "decoder_self_kv_heads"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "cross_attention", "cross_kv_heads"),
    ],
}
_TABLE = "relpos_bias/rel_embedding"


def recognises(directory: Path) -> bool:
    """Whether the folder has a file `checkpoint`."""
    return (directory / CHECKPOINT).is_file()


def read(directory: Path, run_choices: Mapping[str, Any]) -> Contents:
    """What the folder holds, from `checkpoint` and the headers of arrays; a format of `gqa.checkpoints`."""
    tensors = _open(directory)
    stacks = {side: _Stack.find(directory, side, tensors) for side in _ATTENTIONS}
    config = _config(directory, tensors, stacks, run_choices)
    rows = {"token_embedder/embedding": Row("embedding", SAME)}
    for stack in stacks.values():
        rows |= stack.rows(config.relative_bias_per_layer)
    if not config.tied_logits:
        rows["decoder/logits_dense/kernel"] = Row("logits", KERNEL)
    matched = match(directory, rows, tensors, lambda name: False)
    blocks = _Blocks(max(2 * max(tensor.nbytes for tensor in tensors.values()), KEPT_BYTES))
    sources = {
        path: (_flat(tensor, config), transform) for path, (tensor, transform) in matched.items() if "*" not in path
    }
    for group in _groups([path for path in matched if "*" in path]):
        num_layers = stacks[group[0].split(".")[0]].num_layers
        for number in range(num_layers):
            for path in group:
                tensor, transform = matched[path]
                layer = _layer(directory, tensor, number, num_layers, blocks)
                sources[path.replace("*", str(number))] = (_flat(layer, config), transform)
    files = [file for tensor in tensors.values() if isinstance(tensor, ZarrTensor) for file in tensor.files]
    return Contents(config, sources, sorted({directory / CHECKPOINT, *files}), None)


def _groups(paths: Sequence[str]) -> list[list[str]]:
    """The paths of scanned tensors in the order to read them: a conversion wants an attention's kernels together."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[0] if "_attention." in path else path, []).append(path)
    return list(groups.values())


class _Stack(NamedTuple):
    """How the layers of the encoder or the decoder are stored."""

    side: str
    scanned: bool
    num_layers: int

    @classmethod
    def find(cls, directory: Path, side: str, tensors: Mapping[str, Tensor]) -> "_Stack":
        """Finds out from names, and the shape of a norm where the layers are scanned."""
        if any(name.startswith(f"{side}/{side}/") for name in tensors):
            shape = _shape(directory, tensors, f"{side}/{side}/pre_mlp_layer_norm/scale", 2)
            stack = cls(side, True, shape[1])
        else:
            found = {int(m[1]) for name in tensors if (m := re.match(rf"{side}/layers_(0|[1-9]\d{{0,9}})/", name))}
            if found != set(range(len(found))):
                lacking = min(set(range(len(found))) - found)
                raise InputError(f"{directory} lacks {side}/layers_{lacking}, but has layers_{max(found)}")
            stack = cls(side, False, len(found))
        if not 0 < stack.num_layers <= MAX_LAYERS:
            raise InputError(f"{directory} has {stack.num_layers:,} layers in its {side}; expected 1 to {MAX_LAYERS:,}")
        return stack

    def prefixes(self) -> list[tuple[str, str]]:
        """Their and our prefix of the names of each layer; `*` stands for the number of every layer."""
        if self.scanned:
            return [(f"{self.side}/{self.side}", f"{self.side}.*")]
        return [(f"{self.side}/layers_{number}", f"{self.side}.{number}") for number in range(self.num_layers)]

    def rows(self, bias_per_layer: bool) -> dict[str, Row]:
        """The stack's part of the table."""
        found = {f"{self.side}/{self.side}_norm/scale": Row(f"{self.side}_norm.scale", SAME)}
        if not bias_per_layer:
            found[f"{self.side}/{_TABLE}"] = Row(f"{self.side}_bias.table", TRANSPOSED)
        for theirs, ours in self.prefixes():
            for attention, norm, our_name, _ in _ATTENTIONS[self.side]:
                for kind in ("query", "key", "value", "out"):
                    transform = OUT_KERNEL if kind == "out" else KERNEL
                    found[f"{theirs}/{attention}/{kind}/kernel"] = Row(f"{ours}.{our_name}.{kind}", transform)
                found[f"{theirs}/{norm}/scale"] = Row(f"{ours}.{our_name}_norm.scale", SAME)
            for their_name, our_name in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
                found[f"{theirs}/mlp/{their_name}/kernel"] = Row(f"{ours}.mlp.{our_name}", KERNEL)
            found[f"{theirs}/pre_mlp_layer_norm/scale"] = Row(f"{ours}.mlp_norm.scale", SAME)
            if bias_per_layer:
                found[f"{theirs}/{_TABLE}"] = Row(f"{ours}.relative_bias.table", TRANSPOSED)
        return found


def _config(
    directory: Path, tensors: Mapping[str, Tensor], stacks: Mapping[str, _Stack], run_choices: Mapping[str, Any]
) -> T5Config:
    """The architecture that names and shapes determine."""
    for name in tensors:
        if name.endswith("/mlp/wi/kernel"):
            raise InputError(
                f"{directory} has {name}: T5 1.0 with a plain MLP; expected T5.1.1's gated one, wi_0 and wi_1"
            )
    first, ours = stacks["encoder"].prefixes()[0][0], {}
    scanned = int(stacks["encoder"].scanned)  # axes more than in one layer
    vocab_size, d_model = _shape(directory, tensors, "token_embedder/embedding", 2)
    bias_per_layer = f"encoder/{_TABLE}" not in tensors
    table = f"{first}/{_TABLE}" if bias_per_layer else f"encoder/{_TABLE}"
    num_heads, *_, buckets = _shape(directory, tensors, table, 2 + scanned * bias_per_layer)
    query = _shape(directory, tensors, f"{first}/attention/query/kernel", 2 + scanned, 3 + scanned)
    heads_width = math.prod(query[1 + scanned :])
    if heads_width % num_heads:
        raise InputError(
            f"{directory}: queries of width {heads_width} do not divide into the {num_heads} heads of {table}"
        )
    head_dim = heads_width // num_heads
    for side, stack in stacks.items():
        for attention, _, _, field in _ATTENTIONS[side]:
            ours[field] = _kv_heads(directory, tensors, stack, attention, head_dim)
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=head_dim,
        d_ff=_shape(directory, tensors, f"{first}/mlp/wi_0/kernel", 2 + scanned)[-1],
        num_encoder_layers=stacks["encoder"].num_layers,
        num_decoder_layers=stacks["decoder"].num_layers,
        relative_buckets=buckets,
        relative_max_distance=128,
        relative_bias_per_layer=bias_per_layer,
        tied_logits="decoder/logits_dense/kernel" not in tensors,
        activation="gelu_new",
        norm_epsilon=1e-6,
        **ours,
        **run_choices,
    )


def _kv_heads(directory: Path, tensors: Mapping[str, Tensor], stack: _Stack, attention: str, head_dim: int) -> KVHeads:
    """Key/value heads of an attention: one number, or one per layer where they differ."""
    found = []
    for prefix, _ in stack.prefixes():
        name = f"{prefix}/{attention}/key/kernel"
        shape = _shape(directory, tensors, name, 2 + stack.scanned, 3 + stack.scanned)
        width = math.prod(shape[1 + stack.scanned :])
        if width % head_dim:
            raise InputError(f"{name} in {directory} has width {width}, which is no number of heads of {head_dim}")
        found.append(width // head_dim)
    return found[0] if len(set(found)) == 1 else tuple(found)


def _shape(directory: Path, tensors: Mapping[str, Tensor], name: str, *ranks: int) -> tuple[int, ...]:
    """The shape of a tensor from which sizes are read."""
    if name not in tensors:
        raise InputError(f"{directory} lacks the tensor {name}; found {some(sorted(tensors)) or 'none'}")
    shape = tensors[name].shape
    if len(shape) not in ranks or 0 in shape:
        axes = " or ".join(map(str, ranks))
        raise InputError(f"{name} in {directory} has shape {list(shape)}; expected {axes} axes, none of them empty")
    return shape


def _open(directory: Path) -> dict[str, Tensor]:
    """Every array under `target` by its name, `encoder/layers_0/mlp/wo/kernel`."""
    path = directory / CHECKPOINT
    check_inside(path, directory)
    if read_bytes(path, 0, min(path.stat().st_size, 21)).tobytes() == b"model_checkpoint_path":
        raise InputError(f"{path} is TensorFlow's; expected T5X's native format, which is msgpack")
    tree = read_tree(path)
    version = tree.get("version", 3)
    if type(version) is not int or version < 2:
        raise InputError(f"{path} is of version {version!r}; expected 2 or 3")
    optimizer = tree.get("optimizer", tree)
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict):
        raise InputError(f"{path} has no optimizer/target; found {some(sorted(tree)) or 'nothing'}")
    tensors = {}
    for name, leaf in _leaves(path, "", target):
        if is_array(leaf):
            tensors[name] = open_array(path, name, leaf)
        elif _is_spec(leaf):
            if leaf["driver"] != "zarr":
                raise InputError(f"{path}: {name} has the driver {leaf['driver']!r}; expected zarr")
            folder = directory / ("target." + name.replace("/", "."))
            tensors[name] = open_zarr(name, folder, directory, leaf)
        else:
            raise InputError(f"{path}: {name} is {_described(leaf)}; expected an array or TensorStore's spec of one")
    return tensors


def _leaves(path: Path, prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not re.fullmatch(r"\w+", key, re.ASCII):  # it becomes part of a file's name
            raise InputError(f"{path} names {prefix + key!r}; expected names of letters, digits and _")
        if isinstance(value, dict) and not is_array(value) and not _is_spec(value):
            yield from _leaves(path, f"{prefix}{key}/", value)
        else:
            yield prefix + key, value


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and {"driver", "kvstore"} <= value.keys()


def _described(leaf: Any) -> str:
    kind = getattr(leaf, "kind", None)
    return f"of the unknown extension type {kind}" if kind is not None else repr(leaf)[:40]


def _flat(tensor: Tensor, config: T5Config) -> Tensor:
    """A kernel of an attention with one axis for its heads and one for their width as a matrix; others as they are."""
    kind = tensor.name.split("/")[-2]
    if len(tensor.shape) != 3 or kind not in ("query", "key", "value", "out"):
        return tensor
    first, middle, last = tensor.shape
    head_dim, shape = (middle, (first * middle, last)) if kind == "out" else (last, (first, middle * last))
    if head_dim != config.head_dim:
        raise InputError(f"{tensor.name} has shape {list(tensor.shape)}; expected heads of width {config.head_dim}")

    def read() -> np.ndarray:
        return tensor.read().reshape(shape)

    return Tensor(tensor.name, tensor.file, shape, tensor.dtype, read)


def _layer(directory: Path, tensor: Tensor, number: int, num_layers: int, blocks: "_Blocks") -> Tensor:
    """One layer of a scanned tensor, as a tensor without the axis of layers."""
    if tensor.shape[1:2] != (num_layers,):
        expected = f"{num_layers} layers on its second axis"
        raise InputError(f"{tensor.name} in {directory} has shape {list(tensor.shape)}; expected {expected}")
    shape = tensor.shape[:1] + tensor.shape[2:]
    return Tensor(tensor.name, tensor.file, shape, tensor.dtype, partial(blocks.layer, tensor, number))


class _Blocks:
    """Layers of scanned tensors by the run that a chunk holds together: read once, kept until the last was taken.

    What is kept is at most `capacity` bytes; whoever takes layers in another order makes blocks be read again.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kept: dict[
            tuple[str, int], np.ndarray
        ] = {}  # by tensor and first layer, the one taken from last at the end
        self.lock = threading.Lock()

    def layer(self, tensor: Tensor, number: int) -> np.ndarray:
        """A copy of one layer."""
        num_layers = tensor.shape[1]
        length = tensor.chunks[1] if isinstance(tensor, ZarrTensor) else num_layers
        first = number - number % length
        last = min(first + length, num_layers)
        with self.lock:
            block = self.kept.pop((tensor.name, first), None)
            if block is None:
                nbytes = tensor.nbytes // num_layers * (last - first)
                while self.kept and nbytes + sum(other.nbytes for other in self.kept.values()) > self.capacity:
                    del self.kept[next(iter(self.kept))]
                block = tensor.read_part(slice(first, last)) if isinstance(tensor, ZarrTensor) else tensor.read()
            if number < last - 1:
                self.kept[tensor.name, first] = block
            return np.ascontiguousarray(block[:, number - first])
