"""python -m checkpoints_tools.convert --source=DIR --output=DIR --kv_heads=8 --method=mean [--sites=decoder_self,cross]
python -m checkpoints_tools.convert --source=DIR --output=DIR --kv_heads=8 --method=svd+group+refit --calibrate=TEXT

Converts a checkpoint to fewer key/value heads (GQA §2.1). What is in the source's folder says its format. The new
checkpoint has the layout of Hugging Face, the source's tokenizer files, sums, and provenance.json, which says what it
was made from and how. Tensors pass one by one: memory does not grow with the model. With --calibrate they pass layer by
layer, beside the statistics of all layers (for a width D, 2 D² bytes an attention), and below 4 GiB of float32
parameters both models are scored whole. Interrupted and run again, it goes on.

methods: mean, first, random (the paper's); procrustes (heads are turned towards each other before their mean), svd
(keys and values of least error), svd_values (values so, keys by their mean). Steps, joined by +: group (choose which
heads share), renorm (give means the heads' norm), tune (train the attention towards the teacher's output on text),
refit (fit its output kernel to it). With text, the best is svd+group+tune+refit, and svd+group+refit in half the time;
without text, svd.
"""

import argparse
from pathlib import Path

import jax

from checkpoints_tools import describe
from checkpoints_tools.calibration import Calibration
from checkpoints_tools.rewriting import Source, check_output
from gqa import checkpoints, files, models
from gqa.command_line import parse_arguments, run
from gqa.convert import changed_sites, convert_lazily, converted_config
from gqa.convert.calibrated import BASES, POOLED, STEPS, Method
from gqa.errors import InputError
from gqa.models.heads import KVHeads
from gqa.training.memory import keep_freed_memory


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
        action="append",
        metavar="K",
        help="key/value heads, which divide the present ones: one number, or one per layer (8,8,4,4); for one "
        "attention site alone, and then given several times: --kv_heads=decoder_self=8 --kv_heads=cross=4",
    )
    parser.add_argument(
        "--kv_budget",
        metavar="P%",
        help="instead of --kv_heads: a share of the present key/value heads, such as 25%%, spread over layers and "
        "sites to where they keep the most",
    )
    parser.add_argument(
        "--method",
        required=True,
        metavar="NAME",
        help=f"how heads become one: {', '.join([*POOLED, *BASES])}, with {', '.join('+' + step for step in STEPS)}",
    )
    parser.add_argument(
        "--sites",
        metavar="SITE,SITE",
        help="attention sites to convert: encoder_self, decoder_self, cross (default: all but the encoder, GQA §2.2)",
    )
    Calibration.add_arguments(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="draws the rows of --calibrate and the heads of the method random (default: 0)",
    )
    parser.add_argument("--dtype", metavar="TYPE", help="of the tensors: float32, bfloat16 (default: the source's)")
    args = parse_arguments(parser)
    keep_freed_memory()
    output = Path(args.output)
    check_output(output, args.dtype)
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed={args.seed}; expected 0..{2**32 - 1}")
    method = Method.parse(args.method)
    if (args.kv_heads is None) == (args.kv_budget is None):
        raise InputError("--kv_heads=K or --kv_budget=P%: give exactly one of them")
    source = Source(args.source)
    sites = changed = _sites(args.sites, source.config)
    kv_heads = None if args.kv_heads is None else _kv_heads(args.kv_heads, args.sites, sites)
    if kv_heads is not None:
        changed = changed_sites(source.config, converted_config(source.config, kv_heads, args.method))
    budget = None if args.kv_budget is None else _budget(args.kv_budget, source.config, sites)
    method.check(source.config, changed, has_text=args.calibrate is not None)  # refused before any work
    # `tune` judges itself by rows that it keeps back.
    calibration = Calibration.of(args, source, list(kv_heads or sites), least_rows=2 if method.tune else 1)
    if budget is not None:
        kv_heads = calibration.spend(budget, sites)
    dtype = args.dtype or source.dtype
    config, read, report = convert_lazily(
        source.config,
        source.read,
        kv_heads,
        args.method,
        jax.random.key(args.seed),
        batches=calibration.batches,
        statistics=calibration.statistics,
    )
    choice = {"method": args.method, "seed": args.seed}
    if calibration.description:
        choice["calibration"] = calibration.description
    by_layer = method.calibrated or args.calibrate is not None
    source.write(output, config, read, dtype, choice, by_layer=by_layer)
    if by_layer:  # where all tensors of the last layers were there already, these are converted for the report alone
        read(f"{models.site_path('decoder_self', len(config.kv_heads('decoder_self')) - 1)}.query")
    print(_summary(source.abstract, models.abstract(config), dtype))
    if report:
        print(_kept(report))
        content = {**choice, "attention": report, "heldout": None}
        files.write_json(output / "conversion.json", content)  # there even if scoring is stopped
        scores = calibration.scores(args.source, output, kv_heads)
        if scores:
            print(_scores(scores))
            files.write_json(output / "conversion.json", content | {"heldout": scores})
    print(f"wrote {output}")


def _sites(given: str | None, config: models.ModelConfig) -> list[str]:
    if not given:
        return list(models.FAMILIES[models.family_of(config)].converted_sites)
    sites = given.split(",")
    for site in sites:
        if sites.count(site) > 1:
            raise InputError(f"--sites={given} names {site} {sites.count(site)} times; give each attention site once")
    return sites


def _budget(text: str, config: models.ModelConfig, sites: list[str]) -> int:
    """Heads that a share such as `25%` of the present ones allows."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1
    if not text.endswith("%") or not 0 < share <= 1:
        raise InputError(f"--kv_budget={text} is no share of the present heads; expected one such as 25%")
    known = models.FAMILIES[models.family_of(config)].sites
    for site in sites:
        if site not in known:
            raise InputError(f"attention site {site!r} is unknown; expected one of {', '.join(known)}")
    present = [number for site in sites for number in config.kv_heads(site)]
    if sum(present) * share < len(present):
        nearest = -(-1000 * len(present) // sum(present)) / 10
        raise InputError(f"--kv_budget={text} is under one head for each layer and site; nearest: {nearest:g}%")
    return int(sum(present) * share + 1e-9)


def _kv_heads(given: list[str], sites: str | None, default: list[str]) -> dict[str, KVHeads]:
    """The command line's numbers of key/value heads by attention site."""
    found: dict[str, KVHeads] = {}
    for text in given:
        site, separator, numbers = text.rpartition("=")
        if not all(number.strip().isdecimal() for number in numbers.split(",")):
            raise InputError(f"--kv_heads={text} is no number, list of numbers or SITE=number, such as 8 or cross=4")
        digits = max(len(number.strip()) for number in numbers.split(","))
        if digits > 9:  # Python reads no integer of more than 4300
            raise InputError(f"--kv_heads={text[:20]}… has a number of {digits} digits; expected one such as 8")
        per_layer = tuple(int(number) for number in numbers.split(","))
        value = per_layer[0] if len(per_layer) == 1 else per_layer
        if separator and sites:
            raise InputError(f"--kv_heads={text} names its attention site; leave out --sites={sites}")
        for name in [site] if separator else default:
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


def _kept(report: list[dict]) -> str:
    """A table: for each converted attention what its shared heads keep, and the error of its output on the text."""
    steps = [step for step in ("refit", "tune") if any(f"output_error_before_{step}" in entry for entry in report)]
    errors_of = ["output_error", *(f"output_error_before_{step}" for step in steps)]
    before = [f"before {step}" for step in steps]
    rows = [("site", "layer", "heads that share", "keys kept", "values kept", "output error", *before)]
    for entry in report:
        groups = " ".join("+".join(map(str, group)) for group in entry["groups"])
        shares = [entry.get(name) for name in ("key_energy_kept", "value_energy_kept")]
        errors = [entry.get(name) for name in errors_of]
        cells = [f"{value:.1%}" if value is not None else "" for value in (*shares, *errors)]
        rows.append((entry["site"], str(entry["layer"]), groups if len(groups) <= 40 else f"{groups[:39]}…", *cells))
    dead = [f"{entry['site']} {entry['layer']}: {entry['dead_heads']}" for entry in report if "dead_heads" in entry]
    return describe.columns(rows) + (f"\nheads that do nothing: {'; '.join(dead)}" if dead else "")


def _scores(scores: dict[str, float]) -> str:
    rows = [("held-out loss, nats a token", "")]
    return describe.columns(rows + [(name, f"{loss:.4f}") for name, loss in scores.items()])


if __name__ == "__main__":
    run(main)
