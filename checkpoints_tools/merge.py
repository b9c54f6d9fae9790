"""python -m checkpoints_tools.merge --checkpoint=DIR --adapter=DIR --output=DIR [--base=nf4] [--dtype=bfloat16]

Adds a LoRA adapter, as gqa.train and the peft library save them, to the kernels of the checkpoint that it was trained
beside: the result is an ordinary checkpoint that computes the same. For QLoRA that takes --base, as in the run's
config.adapter.base: the layers' kernels get the values that they had in those bits. Tensors pass one by one: memory
does not grow with the model. Interrupted and run again, it goes on.
"""

import argparse
import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from checkpoints_tools.rewriting import Source, check_output
from gqa.adapters.lora import LoRAConfig
from gqa.checkpoints import peft
from gqa.command_line import parse_arguments, run
from gqa.models.layer_kernels import by_layer_path
from gqa.models.quantize import check_weights, quantized


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint that the adapter was trained on")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder with adapter_model.safetensors")
    parser.add_argument("--output", required=True, metavar="DIR", help="where it goes; must not exist")
    parser.add_argument("--base", metavar="TYPE", help="nf4, int8, int4: what the layers' kernels were beside it")
    parser.add_argument("--dtype", metavar="TYPE", help="of the tensors: float32, bfloat16 (default: the checkpoint's)")
    args = parse_arguments(parser)
    output = Path(args.output)
    check_output(output, args.dtype)
    if args.base is not None:
        check_weights(args.base)
    source = Source(args.checkpoint)
    layers, settings = peft.load(Path(args.adapter), source.config)
    scale = LoRAConfig(kernels=("*",), **settings._asdict()).scale
    kernels = {} if args.base is None else by_layer_path(source.abstract)

    def read(path: str) -> np.ndarray:
        kernel = source.read(path)
        if path in kernels:
            few = quantized(jnp.asarray(kernel, jnp.float32), kernels[path], args.base)
            kernel = np.asarray(few.kernel(jnp.float32))
        if path not in layers:
            return kernel
        down, up = layers[path]
        product = down.reshape(-1, settings.rank) @ up.reshape(settings.rank, -1)
        return kernel.astype(np.float32) + np.float32(scale) * product.reshape(kernel.shape)

    digest = hashlib.sha256((Path(args.adapter) / peft.WEIGHTS).read_bytes()).hexdigest()
    choice = {"adapter": settings._asdict(), "adapter_sha256": digest, "base": args.base}
    source.write(output, source.config, read, args.dtype or source.dtype, choice)
    print(f"merged {len(layers)} kernels of rank {settings.rank}; wrote {output}")


if __name__ == "__main__":
    run(main)
