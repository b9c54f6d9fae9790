"""python -m experiments.loss_curve --workdir=runs/teacher --output=curve.png

Draws a run's training and held-out loss against its steps, beside the unigram entropy where it is given, and prints
the held-out losses as a table.
"""

import argparse
from pathlib import Path

from experiments import scores
from gqa import command_line
from gqa.errors import InputError, one_of
from gqa.training import metrics


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run of gqa.train")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--unigram", type=float, help="cross-entropy of the unigram model, nats, drawn as a line")
    arguments = command_line.parse_arguments(parser)
    from matplotlib.backend_bases import FigureCanvasBase

    kind = arguments.output.suffix.removeprefix(".").lower() or "png"
    one_of(f"--output={arguments.output}", kind, FigureCanvasBase.filetypes)
    lines = metrics.read(arguments.workdir)
    with scores.reading(arguments.workdir / metrics.JSONL, "gqa.train"):
        lines = [
            line | {"step": int(line["step"]), "loss": float(line["loss"])}
            for line in lines
            if line["split"] in ("train", "heldout")
        ]
    if not any(line["split"] == "heldout" for line in lines):
        raise InputError(
            f"{arguments.workdir} has no held-out losses in {metrics.JSONL}; expected a folder of gqa.train"
        )
    draw(lines, arguments.unigram, arguments.output)
    print("\n".join(table(lines)))


def table(lines: list[dict]) -> list[str]:
    """Held-out losses by step, in Markdown."""
    rows = [f"| {line['step']} | {line['loss']:.3f} |" for line in lines if line["split"] == "heldout"]
    return ["| step | held-out loss, nats |", "|--:|--:|", *rows]


def draw(lines: list[dict], unigram: float | None, path: Path) -> None:
    """The picture: training loss of single batches in grey, held-out loss on top."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for split, style in (("train", {"color": "0.75", "linewidth": 1}), ("heldout", {"color": "black", "marker": "o"})):
        points = [(line["step"], line["loss"]) for line in lines if line["split"] == split and line["step"] > 0]
        axes.plot(*zip(*points, strict=True), label={"train": "training batch", "heldout": "held out"}[split], **style)
    if unigram is not None:
        axes.axhline(unigram, linestyle="--", color="0.4", label=f"unigram model, {unigram:.2f}")
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats a target token")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    command_line.run(main)
