"""python -m checkpoints_tools.convert --source=DIR --output=DIR --kv_heads=8 --method=mean [--sites=decoder_self,cross]

Converts a checkpoint to fewer key/value heads (GQA §2.1). What is in the source's folder says its format. The new
checkpoint has the layout of Hugging Face, the source's tokenizer files, sums, and provenance.json, which says what it
was made from and how. Tensors pass one by one: memory does not grow with the model. Interrupted and run again, it goes
on.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from gqa import checkpoints, models
from gqa.checkpoints import hf, hf_config
from gqa.checkpoints.sums import hash_in_background
from gqa.checkpoints.table import parameters
from gqa.checkpoints.tensor import Tensor
from gqa.command_line import parse_arguments, run
from gqa.convert import METHODS, convert_lazily
from gqa.errors import InputError
from gqa.models.heads import KVHeads

PROVENANCE = "provenance.json"
# Everything that tokenizers of these families are saved as, and how to generate.
COPIED = ("*.model", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COPIED += ("chat_template.jinja", "generation_config.json")
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "safetensors")


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, metavar="DIR", help=f"checkpoint: {', '.join(checkpoints.FORMATS)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes; must not exist")
    parser.add_argument(
        "--kv_heads",
        required=True,
        action="append",
        metavar="K",
        help="key/value heads, which divide the present ones: one number, or one per layer (8,8,4,4); for one "
        "attention site alone, and then given several times: --kv_heads=decoder_self=8 --kv_heads=cross=4",
    )
    parser.add_argument("--method", required=True, metavar="NAME", help=f"how heads become one: {', '.join(METHODS)}")
    parser.add_argument(
        "--sites",
        metavar="SITE,SITE",
        help="attention sites to convert: encoder_self, decoder_self, cross (default: all but the encoder, GQA §2.2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of --method=random (default: 0)")
    parser.add_argument("--dtype", metavar="TYPE", help="of the tensors: float32, bfloat16 (default: the source's)")
    args = parse_arguments(parser)
    source, output = Path(args.source), Path(args.output)
    if output.exists():
        raise InputError(f"--output={output} exists already; name a new directory")
    if args.dtype not in (None, *hf.SAVED_DTYPES):
        raise InputError(f"--dtype={args.dtype} is unknown; expected one of {', '.join(hf.SAVED_DTYPES)}")

    choices = dict(dtype="float32", param_dtype="float32", scan_layers=True, remat="none")
    contents = checkpoints.read(source, dropout_rate=_dropout_rate(source), **choices)
    config = contents.config
    dtype = args.dtype or _stored_dtype(contents.tensors)
    kv_heads = _kv_heads(args.kv_heads, args.sites, config)
    before = models.abstract(config)
    shapes = {path: parameter.layer_shape for parameter in parameters(before) for path in parameter.paths}

    def read(path: str) -> np.ndarray:
        tensor, transform = contents.tensors[path]
        array = tensor.read()
        _warn_of_non_finite(tensor, array)
        return transform.to_ours(array, shapes[path])

    new_config, read_converted = convert_lazily(config, read, kv_heads, args.method, jax.random.key(args.seed))
    choice = {
        "method": args.method,
        "seed": args.seed,
        "dtype": dtype,
        "kv_heads": {
            site: {"before": config.kv_heads(site), "after": new_config.kv_heads(site)}
            for site in models.FAMILIES[models.family_of(config)].sites
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("gqa", *LIBRARIES)},
    }
    source_sums = hash_in_background(source, contents.weight_files)

    def other_files(sums: dict[str, str]) -> dict[str, bytes | Path]:
        provenance = {
            "command": shlex.join(["python", "-m", "checkpoints_tools.convert", *sys.argv[1:]]),
            "source": {"path": args.source, "sha256": source_sums.result()},
            **choice,
            "sha256": dict(sums),
        }
        if (source / PROVENANCE).exists():
            provenance["source_provenance"] = hf_config.read_json(source / PROVENANCE)
        copied = {file.name: file for pattern in COPIED for file in sorted(source.glob(pattern))}
        return {PROVENANCE: (json.dumps(provenance, indent=2) + "\n").encode(), **copied}

    weights = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in contents.weight_files}
    hf.write(
        new_config,
        read_converted,
        output,
        dtype,
        contents.token_ids,
        other_files,
        identity={"source": str(source.absolute()), "weights": weights, **choice},
        order=list(contents.tensors),
    )
    print(_summary(before, models.abstract(new_config), dtype))
    print(f"wrote {output}")


def _kv_heads(given: list[str], sites: str | None, config: models.ModelConfig) -> dict[str, KVHeads]:
    """The command line's numbers of key/value heads by attention site."""
    found: dict[str, KVHeads] = {}
    for text in given:
        site, separator, numbers = text.rpartition("=")
        if not all(number.strip().isdecimal() for number in numbers.split(",")):
            raise InputError(f"--kv_heads={text} is no number, list of numbers or SITE=number, such as 8 or cross=4")
        per_layer = tuple(int(number) for number in numbers.split(","))
        value = per_layer[0] if len(per_layer) == 1 else per_layer
        if separator and sites:
            raise InputError(f"--kv_heads={text} names its attention site; leave out --sites={sites}")
        default = models.FAMILIES[models.family_of(config)].converted_sites
        for name in [site] if separator else sites.split(",") if sites else default:
            if name in found:
                raise InputError(f"--kv_heads={text} sets {name} a second time; give each attention site once")
            found[name] = value
    return found


def _dropout_rate(source: Path) -> float:
    rate = hf_config.read_json(source / hf.CONFIG).get("dropout_rate") if (source / hf.CONFIG).is_file() else None
    return float(rate) if isinstance(rate, int | float) and 0 <= rate < 1 else 0.0


def _stored_dtype(tensors: dict) -> str:
    """The narrowest of the dtypes that can be saved which holds every tensor without loss (of float64 apart)."""
    narrow = all(tensor.dtype == ml_dtypes.bfloat16 for tensor, _ in tensors.values())
    return "bfloat16" if narrow else "float32"


def _warn_of_non_finite(tensor: Tensor, array: np.ndarray) -> None:
    flat = array.reshape(-1)
    if array.dtype == np.float32:
        with np.errstate(all="ignore"):
            finite = np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all()  # the product is 20 times faster
    elif array.dtype == ml_dtypes.bfloat16:
        finite = not ((flat.view(np.uint16) & 0x7F80) == 0x7F80).any()  # all bits of the exponent
    else:
        finite = np.isfinite(flat).all()
    if not finite:
        tqdm.write(f"warning: {tensor.name} of {tensor.file} holds NaN or infinite values", file=sys.stderr)


def _summary(before: models.Model, after: models.Model, dtype: str) -> str:
    """A table: for each site its heads, its parameters, and what a token of one sequence adds to the cache."""
    rows = [("site", "key/value heads", "parameters", f"{dtype} cache, bytes per token")]
    for site in models.FAMILIES[models.family_of(before.config)].sites:
        heads, parameters, cache = (
            " -> ".join(describe(model, site) for model in (before, after))
            for describe in (_heads, _parameters, partial(_cache_bytes, dtype=dtype))
        )
        tokens = {"encoder_self": "none", "decoder_self": f"{cache} (target)", "cross": f"{cache} (input)"}
        rows.append((site, heads, parameters, tokens[site]))
    rows.append(("whole model", "", f"{models.num_parameters(before):,} -> {models.num_parameters(after):,}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _heads(model: models.Model, site: str) -> str:
    numbers = model.config.kv_heads(site)
    return ",".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def _parameters(model: models.Model, site: str) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(models.site_attention(model, site))):,}"


def _cache_bytes(model: models.Model, site: str, dtype: str) -> str:
    # A key and a value in every layer.
    return f"{2 * sum(model.config.kv_heads(site)) * model.config.head_dim * jnp.dtype(dtype).itemsize:,}"


if __name__ == "__main__":
    run(main)
