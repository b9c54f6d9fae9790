"""python -m gqa.evaluate --config=configs/NAME.py --checkpoint=DIR [--output=FILE.json]

Scores a checkpoint on the config's held-out records: loss in nats a target token, perplexity and accuracy. With
--weights=int8,int4 --cache=int8 also the loss with kernels, or keys and values, in fewer bits, as gqa.generate decodes.
"""

import argparse
import json
import math
from pathlib import Path

from gqa import command_line
from gqa.errors import InputError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config_argument(parser)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder of a checkpoint of any format, or a run's WORKDIR"
    )
    parser.add_argument("--output", type=Path, help="file for the scores as JSON")
    parser.add_argument(
        "--cross_attention",
        action="store_true",
        help="also the loss without cross-attention and with another example's encoder outputs (encoder-decoders)",
    )
    parser.add_argument(
        "--weights", metavar="TYPES", help="also the loss with kernels in int8, int4 or both: int8,int4"
    )
    parser.add_argument("--cache", metavar="TYPE", help="int8: also the loss with keys and values in int8")
    arguments, raw_config = command_line.parse(parser)
    import jax

    from gqa import checkpoints, models, sharding
    from gqa.data import loader
    from gqa.evaluation.cross_attention import cross_attention_cost
    from gqa.evaluation.quantization import loss_table, quantized_losses
    from gqa.models.quantize import check_weights
    from gqa.nn.cache import check_cache_dtype
    from gqa.training import config as run_config
    from gqa.training import loop

    config = run_config.parse(raw_config)
    if arguments.output and not arguments.output.parent.is_dir():
        raise InputError(f"--output={arguments.output}: there is no folder {arguments.output.parent}")
    weights = arguments.weights.split(",") if arguments.weights else []
    for name in weights:
        check_weights(name)
    check_cache_dtype(arguments.cache)
    config.check_devices(jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    records = config.prepared_records()
    batches = loader.heldout_batches(records, config.train.batch_size, config.train.eval_examples)
    model = checkpoints.load(arguments.checkpoint, mesh=mesh, **config.model.run_choices())
    run_config.check_vocabulary(batches.manifest, model.config)
    scores = loop.heldout_metrics(model, batches, mesh, show_progress=True)
    if arguments.cross_attention:
        if not isinstance(model, models.t5.T5):
            raise InputError(f"--cross_attention needs an encoder-decoder; {arguments.checkpoint} is a decoder")
        scores |= cross_attention_cost(model, batches, mesh)
    scores = {"checkpoint": str(arguments.checkpoint), **scores, "perplexity": math.exp(scores["loss"])}
    scores |= {"unigram_loss": batches.manifest.unigram_cross_entropy, "corpus": batches.manifest.corpus_digests}
    for name, value in scores.items():
        print(f"{name:30} {value:.4f}" if isinstance(value, float) else f"{name:30} {value}")
    if weights or arguments.cache:
        losses = quantized_losses(model, batches, mesh, int8_cache=arguments.cache is not None, weights=weights)
        print(f"\n{loss_table(scores['loss'], losses)}")
        scores["quantized_loss"] = losses
    if arguments.output:
        arguments.output.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(main)
