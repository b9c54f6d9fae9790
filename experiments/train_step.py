"""python -m experiments.train_step [--rows=32 --inputs_length=128 --targets_length=29] [--repeats=20] [--output=FILE]

Time of a training step (forward, backward, Adafactor) of a T5 in this library, with unrolled and with scanned layers,
and in transformers on torch: same weights, same batch, float32, all cores, measured in turns. Both must give the same
loss first. The model and the optimizer are those of `--config`, and `--config.model.changes.d_model=192` changes them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gqa import command_line
from gqa.errors import InputError
from gqa.training.memory import keep_freed_memory

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0  # T5's span corruption; they give the length of the targets
LOSS_TOLERANCE = 1e-4  # largest relative difference of the implementations' losses

Calls = Mapping[str, Callable[[], float]]  # "gradients" and "step": run once to the end, return the loss


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/teacher_t5.py", help="run to time (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="rows of the batch (default: the config's batch_size)")
    parser.add_argument("--inputs_length", type=int, help="input tokens a row (default: the config's)")
    parser.add_argument("--targets_length", type=int, help="target tokens a row (default: what span corruption leaves)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments, raw_config = command_line.parse(parser)
    keep_freed_memory()

    from experiments.measure import commit, machine, write_json
    from gqa.data.span_corruption import inputs_targets_lengths, tokens_length
    from gqa.models import family_of
    from gqa.training.config import parse

    config = parse(raw_config)
    architecture = config.model.architecture()
    if family_of(architecture) != "t5" or architecture.dtype != "float32":
        raise InputError(f"{arguments.config} is no T5 in float32; nearest: configs/teacher_t5.py")
    for name in ("rows", "inputs_length", "targets_length", "repeats"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name}={value}; expected at least 1")
    rows = arguments.rows or config.train.batch_size
    inputs_length = arguments.inputs_length or config.data.inputs_length
    num_tokens = tokens_length(inputs_length, NOISE_DENSITY, MEAN_SPAN)
    targets_length = arguments.targets_length or inputs_targets_lengths(num_tokens, NOISE_DENSITY, MEAN_SPAN)[1]

    result = compare(config, rows, inputs_length, targets_length, arguments.repeats)
    result |= {
        "machine": machine() | versions(),
        "commit": commit(),
        "command": " ".join(["python -m experiments.train_step", *sys.argv[1:]]),
    }
    print("\n".join(result["table"]))
    if arguments.output is not None:
        write_json(arguments.output, result)


def compare(config, rows: int, inputs_length: int, targets_length: int, repeats: int) -> dict:
    """Times every implementation on one random batch and returns losses, milliseconds, ratios and a Markdown table.

    Raises RuntimeError where the losses of the implementations differ.
    """
    from gqa import models

    architecture = config.model.architecture()
    batch = random_batch(architecture.vocab_size, rows, inputs_length, targets_length)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        save_random_weights(architecture, checkpoint, seed=config.train.seed)
        calls = {
            "ours, unrolled": our_calls(config, checkpoint, batch, scan_layers=False),
            "ours, scanned": our_calls(config, checkpoint, batch, scan_layers=True),
            "transformers, sdpa": their_calls(checkpoint, batch, attention="sdpa"),
            "transformers, eager": their_calls(checkpoint, batch, attention="eager"),
        }
    losses = {name: {kind: call() for kind, call in kinds.items()} for name, kinds in calls.items()}
    check_losses(losses)
    seconds = times_in_turns(calls, repeats)
    milliseconds = {
        kind: {
            name: {"median_ms": 1e3 * float(np.median(times)), "min_ms": 1e3 * min(times)}
            for name, times in of_names.items()
        }
        for kind, of_names in seconds.items()
    }
    return {
        "model": {name: getattr(architecture, name) for name in ("d_model", "num_heads", "head_dim", "d_ff")}
        | {"layers": [architecture.num_encoder_layers, architecture.num_decoder_layers]}
        | {"vocab_size": architecture.vocab_size}
        | {"parameters": models.num_parameters(models.abstract(architecture))},
        "batch": {"rows": rows, "inputs_length": inputs_length, "targets_length": targets_length},
        "repeats": repeats,
        "losses": losses,
        "milliseconds": milliseconds,
        "table": table(milliseconds),
    }


def random_batch(vocab_size: int, rows: int, inputs_length: int, targets_length: int) -> dict[str, np.ndarray]:
    """A batch without padding, in the form that training reads."""
    rng = np.random.default_rng(0)
    inputs, targets = (
        rng.integers(1, vocab_size, (rows, length), dtype=np.int32) for length in (inputs_length, targets_length)
    )
    return {
        "inputs": inputs,
        "inputs_segments": np.ones_like(inputs),
        "targets": targets,
        "decoder_inputs": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "targets_segments": np.ones_like(targets),
        "loss_weights": np.ones(targets.shape, np.float32),
    }


def save_random_weights(architecture, directory: Path, seed: int) -> None:
    """A freshly initialised model in the layout that both implementations read."""
    import jax

    from gqa import models
    from gqa.checkpoints import hf

    hf.save(models.create(architecture, jax.random.key(seed)), directory, dtype="float32")


def our_calls(config, checkpoint: Path, batch: Mapping[str, np.ndarray], *, scan_layers: bool) -> Calls:
    """This library's gradients and training step, compiled."""
    import jax

    from gqa import checkpoints, sharding
    from gqa.training import optimizer as optimizers
    from gqa.training.loop import language_model_loss
    from gqa.training.state import abstract_state, initial_state, jit_train_step, make_train_step, place_batch

    mesh = sharding.make_mesh(config.mesh)
    model = checkpoints.load(checkpoint, mesh=mesh, **(config.model.run_choices() | {"scan_layers": scan_layers}))
    optimizer = optimizers.optimizer(config.optimizer, 0, sharding.logical_axes(model))
    like = abstract_state(jax.eval_shape(lambda: model), optimizer, mesh)
    state = initial_state(model, optimizer, like)
    batch = place_batch(mesh, batch)
    loss_fn = language_model_loss(z_loss=0.0, dropout=False)  # transformers has no z-loss
    schedule = optimizers.schedule(config.optimizer)
    train_step = jit_train_step(make_train_step(loss_fn, optimizer, schedule, accumulation=1, seed=0), like)

    @jax.jit
    def mean_loss_and_gradients(model, batch):
        def mean_loss(model):
            sums = loss_fn(model, batch, None, 0)
            return sums.loss_sum / sums.weight_sum

        return jax.value_and_grad(mean_loss)(model)

    def gradients():
        with jax.set_mesh(mesh):
            loss, _ = jax.block_until_ready(mean_loss_and_gradients(model, batch))
        return float(loss)

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(train_step(state, batch))
        return float(metrics["loss"])

    return {"gradients": gradients, "step": step}


def their_calls(checkpoint: Path, batch: Mapping[str, np.ndarray], *, attention: str) -> Calls:
    """The same of transformers on torch, with its own Adafactor."""
    import torch
    import transformers
    from transformers.optimization import Adafactor

    from experiments.measure import machine

    torch.set_num_threads(machine()["cores"])
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it finds logits of their own unusual
    model = transformers.T5ForConditionalGeneration.from_pretrained(checkpoint, attn_implementation=attention).train()
    model.config.use_cache = False  # it would build caches that training does not read
    # The learning rate of our schedule's first steps has no influence on the time.
    optimizer = Adafactor(model.parameters(), scale_parameter=True, relative_step=False, lr=1e-2)
    tensors = {name: torch.tensor(array, dtype=torch.int64) for name, array in batch.items()}

    def gradients():
        optimizer.zero_grad()
        loss = model(
            input_ids=tensors["inputs"],
            attention_mask=tensors["inputs_segments"],
            decoder_input_ids=tensors["decoder_inputs"],
            decoder_attention_mask=tensors["targets_segments"],
            labels=tensors["targets"],
        ).loss
        loss.backward()
        return loss.item()

    def step():
        loss = gradients()
        optimizer.step()
        return loss

    return {"gradients": gradients, "step": step}


def check_losses(losses: Mapping[str, Mapping[str, float]]) -> None:
    """Raises RuntimeError unless every implementation gives the same loss on the weights that they share."""
    all_losses = [loss for kinds in losses.values() for loss in kinds.values()]
    if not np.ptp(all_losses) <= LOSS_TOLERANCE * np.min(all_losses):  # true of NaN too
        raise RuntimeError(f"the implementations differ: {losses}")


def times_in_turns(calls: Mapping[str, Calls], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call by kind and implementation, in turns, so that a slow spell of the machine hits all.

    Before a timed call comes an untimed one: the other library's threads still spin when it ends.
    """
    from tqdm import tqdm

    kinds = list(next(iter(calls.values())))
    seconds = {kind: {name: [] for name in calls} for kind in kinds}
    for _ in tqdm(range(repeats), desc="repeats", unit="repeat"):
        for kind in kinds:
            for name in calls:
                calls[name][kind]()
                start = time.perf_counter()
                calls[name][kind]()
                seconds[kind][name].append(time.perf_counter() - start)
    return seconds


def table(milliseconds: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A Markdown table: milliseconds, and their ratio to the faster of transformers' two attentions."""
    kinds = {"gradients": "forward and backward", "step": "training step"}
    heads = "".join(f" {title}, ms | fastest | ratio |" for title in kinds.values())
    lines = [f"| |{heads}", "|---|" + "--:|" * 3 * len(kinds)]
    for name in milliseconds["step"]:
        cells = ""
        for kind in kinds:
            of_names = milliseconds[kind]
            reference = min(found["median_ms"] for other, found in of_names.items() if other.startswith("transformers"))
            median, fastest = of_names[name]["median_ms"], of_names[name]["min_ms"]
            cells += f" {median:.1f} | {fastest:.1f} | {median / reference:.2f} |"
        lines.append(f"| {name} |{cells}")
    return lines


def versions() -> dict[str, str]:
    """Versions of the other implementation."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    command_line.run(main)
