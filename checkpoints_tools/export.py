"""python -m checkpoints_tools.export --checkpoint=DIR --output=DIR [--format=hf] [--layout=stock] [--dtype=bfloat16]

Writes a checkpoint of any format for others to load. --layout=stock: what transformers loads as it stands, computing
the same function. Its T5 knows multi-head attention only, so each key/value head is written once for every query head
that reads it; its Llama, Mistral, Qwen2 and Qwen3 know one number of key/value heads for all layers, so where layers
differ, heads are repeated up to their least common multiple. --layout=compact: every head once, for this library and
for readers of num_key_value_heads. Tokenizer and generation files travel along. Tensors pass one by one: memory does
not grow with the model. Interrupted and run again, it goes on.
"""

import argparse
import math
from pathlib import Path

from checkpoints_tools import describe
from checkpoints_tools.rewriting import Source, check_output
from gqa import checkpoints, models
from gqa.command_line import parse_arguments, run
from gqa.convert.repeat import repeat_lazily
from gqa.errors import InputError
from gqa.models.heads import KVHeads

FORMATS = ("hf",)
LAYOUTS = ("stock", "compact")
# Where transformers finds a tokenizer. Without any of them AutoTokenizer makes one that knows no text, without a word.
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"}


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(checkpoints.FORMATS)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=f"checkpoint: {known}")
    parser.add_argument("--output", required=True, metavar="DIR", help="where it goes; must not exist")
    parser.add_argument("--format", default="hf", metavar="NAME", help="format written: hf, Hugging Face (default)")
    parser.add_argument(
        "--layout", default="stock", metavar="NAME", help="how key/value heads are written: stock (default) or compact"
    )
    parser.add_argument("--dtype", metavar="TYPE", help="of the tensors: float32, bfloat16 (default: the checkpoint's)")
    args = parse_arguments(parser)
    for name, choices in (("format", FORMATS), ("layout", LAYOUTS)):
        if getattr(args, name) not in choices:
            raise InputError(f"--{name}={getattr(args, name)} is unknown; expected one of {', '.join(choices)}")
    output = Path(args.output)
    check_output(output, args.dtype)
    source = Source(args.checkpoint)
    kv_heads = _stock_kv_heads(args.checkpoint, source.config) if args.layout == "stock" else {}
    config, read = repeat_lazily(source.config, source.read, kv_heads)
    dtype = args.dtype or source.dtype
    source.write(output, config, read, dtype, {"format": args.format, "layout": args.layout})
    for site in describe.sites(config):
        before, after = (describe.heads(each.kv_heads(site)) for each in (source.config, config))
        print(f"{site}: {before} key/value heads" + (f", written as {after}" if after != before else ""))
    names = {file.name for file in source.contents.companions}
    vocabularies = sorted(name for name in names if name.endswith(".model"))
    if vocabularies and not names & TOKENIZERS:
        print(f"note: no tokenizer of transformers reads {vocabularies[0]}; encode text with sentencepiece")
    print(f"wrote {output}")


def _stock_kv_heads(checkpoint: str, config: models.ModelConfig) -> dict[str, KVHeads]:
    """The numbers of key/value heads that stock transformers can express, by attention site."""
    if isinstance(config, models.llama.LlamaConfig):
        return {site: math.lcm(*config.kv_heads(site)) for site in models.llama.SITES}
    if config.relative_bias_per_layer:
        raise InputError(
            f"{checkpoint} has a relative-bias table per layer, stock T5 one for all layers; use --layout=compact"
        )
    return dict.fromkeys(models.t5.SITES, config.num_heads)


if __name__ == "__main__":
    run(main)
