"""python -m gqa.evaluate --config=configs/NAME.py --checkpoint=DIR [--output=FILE.json]

Scores a checkpoint on the config's held-out records: loss in nats a target token, perplexity and accuracy.
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
    arguments, raw_config = command_line.parse(parser)
    import jax

    from gqa import checkpoints, models, sharding
    from gqa.data import loader
    from gqa.evaluation.cross_attention import cross_attention_cost
    from gqa.training import config as run_config
    from gqa.training import loop

    config = run_config.parse(raw_config)
    if arguments.output and not arguments.output.parent.is_dir():
        raise InputError(f"--output={arguments.output}: there is no folder {arguments.output.parent}")
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
    if arguments.output:
        arguments.output.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    command_line.run(main)
