"""python -m gqa.instructions --config=configs/posttraining/instructions_lamini.py --output=FILE.jsonl

Lets a checkpoint write instruction data, by one of three prompt programs: LaMini (instructions in the manner of a few
seeds, or about topics), Evol-Instruct (seeds made harder) and Orca (explanations of known answers, as system messages
ask for). Filters drop what is badly formed, near-copies and failures, a judge accepts or refuses what is left. A line
of --output is {"messages": […], "program", "method", "seeds", "score"}, which gqa.train fine-tunes on
(configs/posttraining/sft.py); beside it FILE.json, FILE.md and FILE.png count what became of everything.

A line of --config.seeds is a conversation, {"instruction", "input", "output"} or {"prompt": text}; of a conversation
the first turn counts. Interrupted and started again, it goes on and ends with the same bytes. Where nothing is
accepted, what was written stays: started again with other filters or another judge, it goes on from there.
"""

import argparse
from pathlib import Path

from gqa import command_line
from gqa.errors import InputError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gqa.instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_config_argument(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="conversations; must not exist")
    arguments, raw_config = command_line.parse(parser)
    output = arguments.output
    if output.suffix != ".jsonl":
        raise InputError(f"--output={output}; expected a name that ends in .jsonl")
    command_line.check_new_file(output)
    # Imported here: --help and a mistyped config answer at once.
    from gqa.posttraining import instructions
    from gqa.posttraining.config import InstructionsConfig
    from gqa.training import config as run_config

    instructions.run(run_config.parse(raw_config, InstructionsConfig), output)


if __name__ == "__main__":
    command_line.run(main)
