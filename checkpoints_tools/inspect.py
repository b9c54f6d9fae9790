"""python -m checkpoints_tools.inspect --checkpoint=DIR [--json=FILE]

What a checkpoint of any format is: sizes, key/value heads by attention site, types, parameters, bytes on disk, bytes
that a token adds to the key/value cache, and what it was made from. Reads headers only.
"""

import argparse
import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools import describe
from checkpoints_tools.rewriting import Source
from gqa import checkpoints, models
from gqa.checkpoints.sums import KNOWN
from gqa.command_line import parse_arguments, run
from gqa.errors import InputError

# Of a configuration, what a run chooses and no checkpoint holds.
RUN_CHOICES = ("dropout_rate", "dtype", "param_dtype", "scan_layers", "remat")


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(checkpoints.FORMATS)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=f"checkpoint: {known}")
    parser.add_argument("--json", metavar="FILE", help="also write all of it as JSON")
    args = parse_arguments(parser)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"--json={args.json}: there is no folder {Path(args.json).parent}")
    found = describe_checkpoint(args.checkpoint)
    print(_text(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def describe_checkpoint(directory: str) -> dict[str, Any]:
    """Everything `inspect` knows of a checkpoint, as plain JSON values."""
    source = Source(directory)
    config, contents, folder = source.config, source.contents, source.directory
    parameters: collections.Counter[str] = collections.Counter()
    # Tied parameters are one tensor; layers that lie scanned in one file are several of the same name.
    for tensor in {id(tensor): tensor for tensor, _ in contents.tensors.values()}.values():
        parameters[tensor.dtype.name] += math.prod(tensor.shape)
    sites = {
        site: {
            "kv_heads": list(config.kv_heads(site)),
            "parameters": describe.site_parameters(source.abstract, site),
            "cache_bytes_per_token": {
                dtype: describe.cache_bytes(config, site, dtype) for dtype in dict.fromkeys((source.dtype, "bfloat16"))
            },
        }
        for site in describe.sites(config)
    }
    fields = dataclasses.asdict(config)
    heads = [f"{site}_kv_heads" for site in sites]
    return {
        "checkpoint": directory,
        "format": checkpoints.format_of(folder),
        "family": models.family_of(config),
        "sizes": {name: value for name, value in fields.items() if name not in (*RUN_CHOICES, *heads)},
        "sites": sites,
        "parameters": models.num_parameters(source.abstract),
        "parameters_by_dtype": dict(parameters),
        "weight_files": len(contents.weight_files),
        "bytes_on_disk": sum(file.stat().st_size for file in contents.weight_files),
        "companions": [file.name for file in contents.companions],
        "files_of_sums": [name for name in KNOWN if (folder / name).is_file()],
        "provenance": source.provenance,
    }


def _text(found: Mapping[str, Any]) -> str:
    by_dtype = ", ".join(f"{number:,} {dtype}" for dtype, number in found["parameters_by_dtype"].items())
    rows = [("format", found["format"]), ("family", found["family"])]
    rows += [(name, "none" if value is None else str(value)) for name, value in found["sizes"].items()]
    rows += [
        ("parameters", f"{found['parameters']:,} ({by_dtype} in the files)"),
        ("on disk", f"{found['bytes_on_disk']:,} bytes in {found['weight_files']} file(s)"),
        ("beside them", ", ".join(found["companions"]) or "nothing"),
        ("sums", ", ".join(found["files_of_sums"]) or "none"),
    ]
    dtypes = list(next(iter(found["sites"].values()))["cache_bytes_per_token"])
    table = [("site", "key/value heads", "parameters", *(f"{dtype} cache, bytes per token" for dtype in dtypes))]
    for site, entry in found["sites"].items():
        token = describe.CACHED.get(site)
        cache = [f"{entry['cache_bytes_per_token'][dtype]:,} ({token})" if token else "none" for dtype in dtypes]
        table.append((site, describe.heads(entry["kv_heads"]), f"{entry['parameters']:,}", *cache))
    lines = [describe.columns(rows), "", describe.columns(table)]
    if found["provenance"] is not None:
        lines += ["", "made from, last step first:", *_chain(found["provenance"])]
    return "\n".join(lines)


def _chain(provenance: Mapping[str, Any]) -> Iterator[str]:
    """One line for each conversion, merge or export that led to a checkpoint."""
    while isinstance(provenance, dict):
        export = f"{provenance.get('format')} {provenance.get('layout')}"
        step = provenance.get("method") or ("merge" if "adapter" in provenance else export)
        source, heads = (provenance.get(key) for key in ("source", "kv_heads"))
        path = source.get("path") if isinstance(source, dict) else None
        changes = []
        for site, entry in heads.items() if isinstance(heads, dict) else ():
            before, after = (entry.get(key) if isinstance(entry, dict) else None for key in ("before", "after"))
            per_layer = isinstance(before, list) and isinstance(after, list)
            if per_layer and before != after and all(type(number) is int for number in before + after):
                changes.append(f"{site} {describe.heads(before)} -> {describe.heads(after)}")
        yield f"  {step} of {path}: {', '.join(changes) or 'the same key/value heads'}"
        provenance = provenance.get("source_provenance")


if __name__ == "__main__":
    run(main)
