"""python -m checkpoints_tools.verify A B [--tolerance=1e-4] [--batch=2 --length=64 --seed=0] [--text=FILE]

Do two checkpoints compute the same function? Both get the same probe: random tokens, or text through A's vocabulary.
Says by how much their logits differ (the largest difference, and the norm of the difference over the norm of A's),
the mean KL(A || B) of the next-token distributions in nats, how often they agree on the most likely token, and for
every attention site and layer the norm of the difference of its outputs over the norm of A's. That error is each
layer's on its own model's stream: it carries what the layers before it did differently. Computed in float32.

Exit code 0: the relative difference of the logits is within the tolerance; 1: it is not; 2: bad input.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import describe
from gqa import checkpoints, models
from gqa.command_line import parse_arguments, run
from gqa.data.tokenizer_json import open_vocabulary, tokenizer_file
from gqa.errors import InputError
from gqa.models.observe import attention_outputs

CHOICES = dict(dtype="float32", param_dtype="float32", scan_layers=False, remat="none", dropout_rate=0.0)


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(checkpoints.FORMATS)
    parser.add_argument("A", help=f"the checkpoint that is right: {known}")
    parser.add_argument("B", help="the checkpoint to compare with it")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest relative difference of the logits (default: 1e-4)"
    )
    parser.add_argument("--batch", type=int, default=2, help="rows of the probe (default: 2)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    parser.add_argument("--text", metavar="FILE", help="text to take the tokens from, instead of random ones")
    args = parse_arguments(parser)
    for name in ("batch", "length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)}; expected at least 1")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed={args.seed}; expected 0..{2**63 - 1}")
    contents = {name: checkpoints.read(directory, **CHOICES) for name, directory in (("A", args.A), ("B", args.B))}
    _check_alike(contents["A"].config, contents["B"].config)
    config = contents["A"].config
    shape = (args.batch, args.length)
    if args.text:
        tokens = _text_tokens(Path(args.text), args.A, contents["A"].companions, config.vocab_size, shape)
    else:
        # 0 to 2 are the special tokens of all families here.
        tokens = np.random.default_rng(args.seed).integers(
            min(3, config.vocab_size - 1), config.vocab_size, (2, *shape)
        )
    batch = {"inputs": tokens[0], "decoder_inputs": tokens[1]}
    batch |= dict.fromkeys(("inputs_segments", "targets_segments"), np.ones(shape, np.int32))
    observe = jax.jit(attention_outputs)

    def outputs(directory: str) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
        # One model in memory at a time.
        return jax.device_get(observe(checkpoints.load(directory, **CHOICES), batch))

    (logits, attention), (other_logits, other_attention) = outputs(args.A), outputs(args.B)
    difference = _relative_error(other_logits, logits)
    kl, agreement = (float(value) for value in _distributions(logits, other_logits))
    rows = []
    for site in describe.sites(config):
        pairs = zip(attention[site], other_attention[site], strict=True)
        rows += [(site, f"layer {i}", f"{_relative_error(b, a):.2e}") for i, (a, b) in enumerate(pairs)]
    print("relative error of the attention outputs")
    print(describe.columns(rows))
    print()
    passed = difference <= args.tolerance  # False for NaN
    summary = [
        ("logits, largest difference", f"{np.abs(logits - other_logits).max():.3g}"),
        ("logits, relative difference", f"{difference:.3g}"),
        ("mean KL(A || B)", f"{kl:.3g} nats"),
        ("same most likely token", f"{agreement:.2%}"),
    ]
    print(describe.columns(summary))
    print(f"{'pass' if passed else 'fail'}: {difference:.3g} {'<=' if passed else '>'} {args.tolerance:g}")
    return 0 if passed else 1


def _check_alike(a: models.ModelConfig, b: models.ModelConfig) -> None:
    """Raises `InputError` for two models whose outputs cannot be compared."""
    families = models.family_of(a), models.family_of(b)
    if families[0] != families[1]:
        raise InputError(f"A is a {families[0]} model, B a {families[1]} model; expected one family")
    layers = ("num_layers",) if families[0] == "llama" else ("num_encoder_layers", "num_decoder_layers")
    for name in ("vocab_size", "d_model", *layers):
        values = getattr(a, name), getattr(b, name)
        if values[0] != values[1]:
            raise InputError(f"A has {name}={values[0]}, B {values[1]}; expected the same")


def _text_tokens(file: Path, checkpoint: str, companions: list[Path], vocab_size: int, shape) -> np.ndarray:
    """The text's first tokens as `[2, batch, length]`: inputs, then decoder inputs."""
    vocabulary = open_vocabulary(tokenizer_file(checkpoint, companions), foreign=True)
    try:
        ids = vocabulary.encode(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"--text={file} is no UTF-8 text: {error}") from error
    needed = 2 * shape[0] * shape[1]
    if len(ids) < needed:
        raise InputError(f"--text={file} has {len(ids)} tokens; expected at least 2 x batch x length = {needed}")
    if max(ids[:needed]) >= vocab_size:
        raise InputError(f"--text={file} has the token {max(ids[:needed])}; the embedding has {vocab_size} rows")
    return np.asarray(ids[:needed]).reshape(2, *shape)


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / max(np.linalg.norm(expected), 1e-30))


def _distributions(logits_BTV: np.ndarray, other_BTV: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Mean KL(A || B) in nats, and the share of positions with the same most likely token."""
    log_p, log_q = jax.nn.log_softmax(logits_BTV), jax.nn.log_softmax(other_BTV)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean()
    return kl, (logits_BTV.argmax(-1) == other_BTV.argmax(-1)).mean()


if __name__ == "__main__":
    run(main)
