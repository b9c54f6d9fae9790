"""python -m checkpoints_tools.merge --checkpoint=DIR --adapter=DIR --output=DIR [--dtype=bfloat16]

Adds a LoRA adapter, as gqa.train and the peft library save them, to the kernels of the checkpoint that it was trained
beside: the result is an ordinary checkpoint that computes the same. Tensors pass one by one: memory does not grow with
the model. Interrupted and run again, it goes on.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from checkpoints_tools.rewriting import Source, check_output
from gqa.adapters.lora import LoRAConfig
from gqa.checkpoints import peft
from gqa.command_line import parse_arguments, run


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint that the adapter was trained on")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder with adapter_model.safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="where it goes; must not exist")
    parser.add_argument("--dtype", metavar="TYPE", help="of the tensors: float32, bfloat16 (default: the checkpoint's)")
    args = parse_arguments(parser)
    output = Path(args.output)
    check_output(output, args.dtype)
    source = Source(args.checkpoint)
    layers, settings = peft.load(Path(args.adapter), source.config)
    scale = LoRAConfig(kernels=("*",), **settings._asdict()).scale

    def read(path: str) -> np.ndarray:
        kernel = source.read(path)
        if path not in layers:
            return kernel
        down, up = layers[path]
        product = down.reshape(-1, settings.rank) @ up.reshape(settings.rank, -1)
        return kernel.astype(np.float32) + np.float32(scale) * product.reshape(kernel.shape)

    digest = hashlib.sha256((Path(args.adapter) / peft.WEIGHTS).read_bytes()).hexdigest()
    choice = {"adapter": settings._asdict(), "adapter_sha256": digest}
    source.write(output, source.config, read, args.dtype or source.dtype, choice)
    print(f"merged {len(layers)} kernels of rank {settings.rank}; wrote {output}")


if __name__ == "__main__":
    run(main)
