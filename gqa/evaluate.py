"""python -m gqa.evaluate --checkpoint=DIR --config=configs/NAME.py [--output=FILE.json]
python -m gqa.evaluate --checkpoint=DIR --task_file=dev.jsonl --metrics=rouge --output=DIR
python -m gqa.evaluate --checkpoint=DIR --preferences=FILE.jsonl --template=llama2 [--output=DIR]
python -m gqa.evaluate --checkpoint=DIR --dialogues=FILE.jsonl --template=NAME --output=DIR
python -m gqa.evaluate --checkpoint=DIR --harness=TASK,TASK [--include_path=FOLDER] [--output=DIR]

Scores a checkpoint.

--config: on the configuration's held-out records: loss in nats a target token, perplexity and accuracy.
With --weights=int8,int4 --cache=int8 also the loss with kernels, or keys and values, in fewer bits, as gqa.generate
decodes.
--task_file: on the answers that it generates to the rows of a JSONL file, objects with "inputs" and "targets" (or
"answers", a list of right ones). ROUGE, BLEU, or F1 and exact match (trivia_qa), with 95 % intervals of a bootstrap,
go to --output=DIR: scores.json, table.md laid out as GQA's Table 1, and a predictions.jsonl for each checkpoint and
file. Give several files to average over tasks; one named as a task of Table 1, such as cnn_dailymail.jsonl, knows its
metric. Interrupted and started again, it goes on.
--preferences: a reward model's accuracy on pairs, overall and by rating, and its calibration; --output=DIR gets
preferences.json, preferences.md and calibration.png.
--dialogues: on how long an instruction of the first turn is obeyed, the share of dialogues by turn (Llama 2's table 30
for ghost attention). A line of the file is {"instruction": "Always act as Napoleon.", "turns": ["Hi.", "Who are you?"],
"rule": {"contains": ["Napoleon"]}}: every response is counted by the rule, contains or lacks (words or phrases) or
max_words. consistency.md, .json and .png, and the dialogues themselves, go to --output=DIR.
--harness: on tasks of the LM Evaluation Harness (package lm_eval).

Several --checkpoint=DIR, such as seeds, are averaged with their spread. --every_checkpoint scores each step that a run
has kept, and names the best.
"""

import argparse
import math
from pathlib import Path

from gqa import command_line, files
from gqa.errors import InputError

MODES = ("config", "task_file", "preferences", "dialogues", "harness")
# Option -> the modes that read it.
OPTIONS = {
    **dict.fromkeys(("cross_attention", "weights", "cache"), ("config",)),
    **dict.fromkeys(("metrics", "beam", "length_penalty", "inputs_length", "bootstrap", "seed"), ("task_file",)),
    "max_new_tokens": ("task_file", "dialogues"),
    "batch_size": ("task_file", "preferences", "dialogues", "harness"),
    "template": ("preferences", "dialogues"),
    **dict.fromkeys(("include_path", "num_fewshot", "limit"), ("harness",)),
}


def main() -> None:
    """The command line."""
    parser = _parser()
    arguments, raw_config = command_line.parse(parser)
    modes = {f"--{name}": getattr(arguments, name) for name in MODES}
    chosen = [name for name, value in modes.items() if value]
    if len(chosen) != 1:
        raise InputError(f"expected one of {', '.join(modes)}; found {' and '.join(chosen) or 'none'}")
    for name, read_by in OPTIONS.items():
        if getattr(arguments, name) != parser.get_default(name) and chosen[0].removeprefix("--") not in read_by:
            expected = " or ".join(f"--{mode}" for mode in read_by)
            raise InputError(f"--{name} does nothing with {chosen[0]}; expected it with {expected}")
    if arguments.length_penalty != parser.get_default("length_penalty") and arguments.beam == 1:
        raise InputError(f"--length_penalty={arguments.length_penalty} is of beam search; add --beam=4, say")
    from gqa.evaluation import runs

    evaluated = runs.checkpoints_of(arguments.checkpoint, arguments.every_checkpoint)
    if arguments.harness:
        runs.run_harness(arguments, evaluated)
    elif arguments.preferences:
        runs.judge_preferences(arguments, evaluated)
    elif arguments.dialogues:
        runs.hold_dialogues(arguments, evaluated)
    elif arguments.task_file:
        runs.generate_and_score(arguments, evaluated)
    else:
        _losses(arguments, raw_config, evaluated)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gqa.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command_line.add_config_argument(parser, required=False)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        action="append",
        metavar="DIR",
        help="folder of a checkpoint of any format, or a run's WORKDIR; may be repeated",
    )
    parser.add_argument("--every_checkpoint", action="store_true", help="each step that the run --checkpoint has kept")
    parser.add_argument("--output", type=Path, help="file for the losses as JSON; otherwise a folder")
    parser.add_argument(
        "--cross_attention",
        action="store_true",
        help="also the loss without cross-attention and with another example's encoder outputs (encoder-decoders)",
    )
    parser.add_argument("--weights", metavar="TYPES", help="also the loss with kernels in int8, int4, nf4: int8,int4")
    parser.add_argument("--cache", metavar="TYPE", help="int8: also the loss with keys and values in int8")
    group = parser.add_argument_group("generated text")
    group.add_argument("--task_file", type=Path, action="append", metavar="FILE", help="rows; may be repeated")
    group.add_argument("--metrics", help="rouge, bleu, trivia_qa, or several; the first one's is the table's")
    group.add_argument("--beam", type=int, default=1, help="beams of the search (default: 1, greedy, GQA §3.1)")
    group.add_argument("--length_penalty", type=float, default=1.0, help="of --beam (default: 1)")
    group.add_argument("--inputs_length", type=int, help="first tokens of an input that are read (default: all)")
    group.add_argument("--max_new_tokens", type=int, default=128, help="most tokens of an answer (default: 128)")
    group.add_argument("--batch_size", type=int, default=8, help="rows decoded or scored at a time (default: 8)")
    group.add_argument("--bootstrap", type=int, default=1000, help="resampled corpora of the intervals (default: 1000)")
    group.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    group = parser.add_argument_group("conversations")
    group.add_argument("--preferences", type=Path, metavar="FILE", help="pairs, as the reward model was trained on")
    group.add_argument("--dialogues", type=Path, metavar="FILE", help="instruction, turns and rule a line")
    group.add_argument("--template", help="that the checkpoint was tuned with, such as llama2")
    group = parser.add_argument_group("LM Evaluation Harness")
    group.add_argument("--harness", metavar="TASKS", help="names, such as arc_easy,gsm8k")
    group.add_argument("--include_path", type=Path, metavar="DIR", help="folder of further task YAMLs")
    group.add_argument("--num_fewshot", type=int, help="examples before a question (default: the task's)")
    group.add_argument("--limit", type=int, help="first questions of each task (default: all)")
    return parser


def _losses(arguments: argparse.Namespace, raw_config, evaluated: dict[str, Path]) -> None:
    import jax

    from gqa import checkpoints, models, sharding
    from gqa.data import loader
    from gqa.evaluation import runs
    from gqa.evaluation.cross_attention import cross_attention_cost
    from gqa.evaluation.quantization import loss_table, quantized_losses
    from gqa.models.quantize import check_weights
    from gqa.nn.cache import check_cache_dtype
    from gqa.training import config as run_config
    from gqa.training import loop

    config = run_config.parse(raw_config)
    if arguments.output and not arguments.output.parent.is_dir():
        raise InputError(f"--output={arguments.output}: there is no folder {arguments.output.parent}")
    if arguments.output and arguments.output.is_dir():
        raise InputError(f"--output={arguments.output} is a folder; expected a file for the losses")
    weights = arguments.weights.split(",") if arguments.weights else []
    for name in weights:
        check_weights(name)
    check_cache_dtype(arguments.cache)
    config.check_devices(jax.device_count())
    mesh = sharding.make_mesh(config.mesh)
    records = config.prepared_records()
    batches = loader.heldout_batches(records, config.train.batch_size, config.train.eval_examples)

    def score(checkpoint: Path) -> dict:
        contents = checkpoints.read(checkpoint, **config.model.run_choices())
        run_config.check_vocabulary(batches.manifest, contents.config, contents.companions)
        model = checkpoints.load(checkpoint, mesh=mesh, **config.model.run_choices())
        if arguments.cross_attention and not isinstance(model, models.t5.T5):
            raise InputError(f"--cross_attention needs an encoder-decoder; {checkpoint} is a decoder")
        scores = loop.heldout_metrics(model, batches, mesh, show_progress=True)
        if arguments.cross_attention:
            scores |= cross_attention_cost(model, batches, mesh)
        scores = {"checkpoint": str(checkpoint), **scores, "perplexity": _perplexity(scores["loss"])}
        scores |= {"unigram_loss": batches.manifest.unigram_cross_entropy, "corpus": batches.manifest.corpus_digests}
        for name, value in scores.items():
            print(f"{name:30} {value:.4f}" if isinstance(value, float) else f"{name:30} {value}")
        if weights or arguments.cache:
            losses = quantized_losses(model, batches, mesh, int8_cache=arguments.cache is not None, weights=weights)
            print(f"\n{loss_table(scores['loss'], losses)}")
            scores["quantized_loss"] = losses
        return scores

    found = {name: score(checkpoint) for name, checkpoint in evaluated.items()}
    scores = next(iter(found.values())) if len(found) == 1 else runs.compared_losses(found, arguments.every_checkpoint)
    if arguments.output:
        files.write_json(arguments.output, scores)


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # of a model that has diverged
        return math.inf


if __name__ == "__main__":
    command_line.run(main)
