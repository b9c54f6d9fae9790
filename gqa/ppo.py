"""python -m gqa.ppo --config=configs/posttraining/ppo.py --workdir=DIR [--config.ppo.method=grpo …]

Trains a decoder against a reward model: responses to prompts are drawn by the decoding engine, scored, and made more or
less likely by PPO with a value model, or by GRPO with a prompt's other samples as the baseline. Started again, it goes
on from its newest checkpoint. DIR/model is the policy that did best on held-out prompts, DIR/metrics.jsonl has reward,
KL from the reference, entropy, clipped share, value loss and times of every iteration.

A line of --config.prompts is {"prompt": text or messages}, a preference or a conversation, whose last response is left
out; with "safety": true the safety model (--config.safety) scores it whatever it says.
"""

import argparse
from pathlib import Path

from gqa import command_line
from gqa.training.memory import keep_freed_memory


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gqa.ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_config_argument(parser)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of this run: metrics, checkpoints, model")
    arguments, raw_config = command_line.parse(parser)
    keep_freed_memory()
    # Imported here: --help and a mistyped config answer at once.
    from gqa.posttraining import ppo
    from gqa.posttraining.config import PPORunConfig
    from gqa.training import config as run_config

    ppo.run(run_config.parse(raw_config, PPORunConfig), arguments.workdir)


if __name__ == "__main__":
    command_line.run(main)
