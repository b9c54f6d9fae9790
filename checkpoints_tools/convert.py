"""python -m checkpoints_tools.convert --source=DIR --output=DIR --kv_heads=8 --method=mean [--sites=decoder_self,cross]

Converts a Hugging Face checkpoint of T5.1.1 or Llama to fewer key/value heads (GQA §2.1). The new checkpoint has the
same layout, the source's tokenizer files, and provenance.json, which says what it was made from and how.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors import safe_open
from tqdm import tqdm

from gqa import models
from gqa.checkpoints import hf, hf_config
from gqa.command_line import parse_arguments, run
from gqa.convert import METHODS, convert
from gqa.errors import InputError

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
    parser.add_argument("--source", required=True, metavar="DIR", help="checkpoint: config.json and safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes; must not exist")
    parser.add_argument(
        "--kv_heads", required=True, type=int, metavar="K", help="key/value heads per site; divides the present"
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
    choices["dropout_rate"] = hf_config.read_json(source / hf.CONFIG).get("dropout_rate", 0.0)
    config = hf.read_config(source, **choices)
    choices["param_dtype"] = _stored_dtype(source)
    dtype = args.dtype or choices["param_dtype"]
    sites = args.sites.split(",") if args.sites else models.FAMILIES[models.family_of(config)].converted_sites
    conversion = partial(
        convert, kv_heads=dict.fromkeys(sites, args.kv_heads), method=args.method, key=jax.random.key(args.seed)
    )
    before = models.abstract(config)
    after = jax.eval_shape(conversion, before)  # refuses what does not fit before the weights are read

    provenance = {
        "command": shlex.join(["python", "-m", "checkpoints_tools.convert", *sys.argv[1:]]),
        "source": {"path": args.source, "sha256": _sha256(_weight_files(source))},
        "method": args.method,
        "seed": args.seed,
        "dtype": dtype,
        "kv_heads": {
            site: {"before": config.kv_heads(site), "after": after.config.kv_heads(site)}
            for site in models.FAMILIES[models.family_of(config)].sites
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    if (source / PROVENANCE).exists():
        provenance["source_provenance"] = hf_config.read_json(source / PROVENANCE)
    copied = sorted({file for pattern in COPIED for file in source.glob(pattern)})
    model = conversion(hf.load(source, **choices))
    with tempfile.TemporaryDirectory() as folder:
        provenance_file = Path(folder) / PROVENANCE
        provenance_file.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        token_ids = hf_config.token_ids(source)
        hf.save(model, output, dtype=dtype, token_ids=token_ids, extra_files=[*copied, provenance_file])
    print(_summary(before, after, dtype))
    print(f"wrote {output}")


def _weight_files(source: Path) -> list[Path]:
    return [source / hf.WEIGHTS] if (source / hf.WEIGHTS).exists() else sorted(source.glob("*.safetensors"))


def _stored_dtype(source: Path) -> str:
    """The narrowest of the dtypes that can be saved which holds every tensor without loss (of float64 apart)."""
    found = set()
    for file in _weight_files(source):
        with safe_open(file, framework="numpy") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    return "bfloat16" if found == {"BF16"} else "float32"


def _sha256(files: list[Path]) -> dict[str, str]:
    digests = {}
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="hash", unit="B", unit_scale=True, delay=1) as bar:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
                    bar.update(len(chunk))
            digests[file.name] = digest.hexdigest()
    return digests


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
