"""python -m gqa.rejection_sampling --config=configs/posttraining/rejection_sampling.py --output=FILE.jsonl

Draws several responses to each prompt, scores them with a reward model and keeps the best of this and all former rounds
as conversations that gqa.train fine-tunes on (configs/posttraining/sft.py). A line of --output is {"messages": […],
"score": 1.5, "round": 1, "temperature": 1.0}; beside it FILE.json, FILE.md and FILE.png say what more samples and
other temperatures are worth.

A line of --config.prompts is {"prompt": text or messages}, a preference or a conversation, whose last response is left
out; with "safety": true the safety model scores it whatever it says. Interrupted and started again, it goes on and ends
with the same bytes.
"""

import argparse
from pathlib import Path

from gqa import command_line
from gqa.errors import InputError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gqa.rejection_sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_config_argument(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="conversations; must not exist")
    arguments, raw_config = command_line.parse(parser)
    output = arguments.output
    if output.suffix != ".jsonl":
        raise InputError(f"--output={output}; expected a name that ends in .jsonl")
    command_line.check_new_file(output)
    # Imported here: --help and a mistyped config answer at once.
    from gqa.posttraining import rejection
    from gqa.posttraining.config import RejectionConfig
    from gqa.training import config as run_config

    rejection.run(run_config.parse(raw_config, RejectionConfig), output)


if __name__ == "__main__":
    command_line.run(main)
