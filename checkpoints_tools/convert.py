"""python -m checkpoints_tools.convert --source=DIR --output=DIR --kv_heads=8 --method=mean [--sites=decoder_self,cross]

Converts a checkpoint to fewer key/value heads (GQA §2.1). What is in the source's folder says its format. The new
checkpoint has the layout of Hugging Face, the source's tokenizer files, sums, and provenance.json, which says what it
was made from and how. Tensors pass one by one: memory does not grow with the model. Interrupted and run again, it goes
on.
"""

import argparse
from pathlib import Path

import jax

from checkpoints_tools import describe
from checkpoints_tools.rewriting import Source, check_output
from gqa import checkpoints, models
from gqa.command_line import parse_arguments, run
from gqa.convert import METHODS, convert_lazily
from gqa.errors import InputError
from gqa.models.heads import KVHeads


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
    output = Path(args.output)
    check_output(output, args.dtype)
    source = Source(args.source)
    dtype = args.dtype or source.dtype
    kv_heads = _kv_heads(args.kv_heads, args.sites, source.config)
    key = jax.random.key(args.seed)
    config, read = convert_lazily(source.config, source.read, kv_heads, args.method, key)
    source.write(output, config, read, dtype, {"method": args.method, "seed": args.seed})
    print(_summary(source.abstract, models.abstract(config), dtype))
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


def _summary(before: models.Model, after: models.Model, dtype: str) -> str:
    """A table: for each site its heads, its parameters, and what a token of one sequence adds to the cache."""
    rows = [("site", "key/value heads", "parameters", f"{dtype} cache, bytes per token")]
    both = (before, after)
    for site in describe.sites(before.config):
        heads = " -> ".join(describe.heads(model.config.kv_heads(site)) for model in both)
        parameters = " -> ".join(f"{describe.site_parameters(model, site):,}" for model in both)
        cache = " -> ".join(f"{describe.cache_bytes(model.config, site, dtype):,}" for model in both)
        rows.append((site, heads, parameters, f"{cache} ({token})" if (token := describe.CACHED.get(site)) else "none"))
    rows.append(("whole model", "", " -> ".join(f"{models.num_parameters(model):,}" for model in both), ""))
    return describe.columns(rows)


if __name__ == "__main__":
    run(main)
