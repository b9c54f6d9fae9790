"""The paper's figures, drawn from results: every function takes numbers and returns a picture, `save` writes it.

Readable in grey: models and methods differ by mark and line, not by colour. Error bars are the standard deviation over
seeds, of times the range of the repetitions; one that would reach 0 on a logarithmic axis ends at the least seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import paper
from experiments.scores import TEACHER, Results, label, mean_and_spread, model_name, size_name
from experiments.stability import Curve
from gqa import files

# Mark, line, grey, hollow.
STYLES = (
    ("o", "-", "0.0", False),
    ("s", "--", "0.4", False),
    ("D", "-", "0.15", True),
    ("^", ":", "0.5", False),
    ("v", "-.", "0.3", True),
    ("P", "--", "0.6", True),
    ("X", ":", "0.2", False),
    ("<", "-", "0.6", False),
    (">", "-.", "0.1", True),
    ("h", "--", "0.5", True),
)
WIDE = 30  # largest by smallest loss from which on an axis of losses is logarithmic
# Of many methods, those that lines are drawn of.
LINES = ("mean", "mean+refit", "procrustes+renorm", "svd", "svd+group+refit", "svd+group+tune+refit")


def save(figure: Figure, path: Path) -> None:
    """Writes a picture in the format of its name, the same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "gqa", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with files.whole(path) as unfinished:
            figure.savefig(unfinished, dpi=150, metadata=metadata)


def quality_against_time(results: Results, times: Mapping[tuple[str, str], Sequence[float]], score: str) -> Figure:
    """GQA fig. 3: a mark a model, and the paper's T5 beside them.

    `times` are seconds a sample by teacher and model: median, least and most.
    """
    figure, axes = _panels(2, (10.5, 4.4))
    for teacher in results.teachers:
        own = results.of(teacher)
        cells, compared = own.cells(score), own.compared()
        kinds = list(dict.fromkeys(method for method, _, _ in compared))
        for method, kv_heads, alpha in compared:
            model = own.model(method, kv_heads)
            # Beside models that were uptrained stands the teacher that was, where there is one.
            if (teacher, model) not in times or (alpha == 0 and (method, kv_heads, own.alpha) in compared):
                continue
            time, least, most = times[teacher, model]
            quality, spread = mean_and_spread(cells[method, kv_heads, alpha])
            name = f"{teacher} {model}" if len(results.teachers) > 1 else model
            name += "" if method in (TEACHER, "mean") else f", {method}"
            axes[0].errorbar(
                time, quality, spread, [[time - least], [most - time]], label=name, **_style(kinds.index(method))
            )
            _name(axes[0], name, (time, quality))
    _titles(axes[0], f"α = {results.alpha:.0%}, {results.name}", "time per sample, s", label(score))
    for number, (name, (time, average, _)) in enumerate(paper.TABLE_1.items()):
        axes[1].errorbar(time, average, label=name, **_style(number))
        _name(axes[1], name, (time, average))
    _titles(axes[1], "the paper, T5 (Table 1)", "time per sample and TPU v4 chip, s", "average of seven tasks")
    for axis in axes:
        axis.margins(y=0.2)
        axis.set_xlim(0, 1.25 * axis.dataLim.x1)  # room for the name of the last point
    return figure


def methods(results: Results, score: str) -> Figure:
    """GQA fig. 4: the conversion methods of one teacher, by share of uptraining; at α = 5 % the paper's beside them."""
    cells = results.cells(score)
    names = [method for method in dict.fromkeys(method for method, _, _ in cells) if method != TEACHER]
    kv_heads = sorted({K for method, K, _ in cells if method != TEACHER}, reverse=True)
    shares = sorted({alpha for method, _, alpha in cells if method != TEACHER})
    if len(shares) > 3:  # the others are in fig. 5
        shares = [alpha for alpha in shares if alpha in (0.0, results.alpha)]
    beside = 0.05 in shares
    figure, axes = _panels(len(shares) + beside, (2.2 + 3.6 * (len(shares) + beside), 1.6 + 0.32 * max(5, len(names))))
    rows, scale = {method: row for row, method in enumerate(names)}, _scale(cells, score)
    for axis, alpha in zip(axes, shares, strict=False):
        for number, K in enumerate(kv_heads):
            found = {method: _bar(cells[method, K, alpha], scale) for method in names if (method, K, alpha) in cells}
            if found:
                quality, *spread = zip(*found.values(), strict=True)
                style = _style(number) | {"linestyle": "none"}
                axis.errorbar(quality, [rows[method] for method in found], xerr=spread, label=model_name(K), **style)
        _teacher_line(axis.axvline, cells, alpha)
        _titles(axis, f"α = {alpha:.0%}", label(score), "")
        axis.set_xscale(scale)
        _method_axis(axis, names)
    if beside:
        ranges = paper.FIGURE_4_READ_OFF
        middle = [(low + high) / 2 for low, high in ranges.values()]
        half = [(high - low) / 2 for low, high in ranges.values()]
        style = dict(marker="*", markersize=11, color="black", linestyle="none", capsize=3)  # no mark of ours
        axes[-1].errorbar(middle, range(len(ranges)), xerr=half, label="MQA (bars: as far as it can be read)", **style)
        title = "the paper, T5-Large, α = 5%,\nread off its fig. 4"
        _titles(axes[-1], title, "average score (higher is better)", "")
        _method_axis(axes[-1], list(ranges))
    _legend(figure)
    return figure


def quality_against_alpha(results: Results, score: str) -> Figure:
    """GQA fig. 5: one teacher's models against the share of the pre-training that uptraining takes.

    A model that was never uptrained is no line and is left out.
    """
    cells = results.cells(score)
    uptrained = {(method, K) for method, K, alpha in cells if alpha}
    cells = {cell: values for cell, values in cells.items() if cell[:2] in uptrained}
    scale = _scale(cells, score)
    figure, (axis,) = _panels(1, (6.8, 4.4))
    kinds = list(dict.fromkeys((method, K) for method, K, _ in cells))
    for number, (method, K) in enumerate(kinds):
        points = sorted(
            (alpha, *_bar(values, scale)) for (*kind, alpha), values in cells.items() if kind == [method, K]
        )
        alphas, quality, *spread = zip(*points, strict=True)
        name = results.model(method, K) + ("" if method == TEACHER else f", {method}")
        axis.errorbar([100 * alpha for alpha in alphas], quality, spread, label=name, **_style(number))
    _titles(axis, _seeds(cells), "α: share of the pre-training steps, %", label(score))
    axis.set_yscale(scale)
    _legend(figure)
    return figure


def quality_against_groups(results: Results, score: str) -> Figure:
    """One teacher's models against their key/value heads, a panel a share of uptraining."""
    cells = results.cells(score)
    scale = _scale(cells, score)
    names = [method for method in dict.fromkeys(method for method, _, _ in cells) if method != TEACHER]
    if len(names) > len(STYLES):
        names = [method for method in names if method in LINES]
    shares = sorted({alpha for method, _, alpha in cells if method in names})
    figure, axes = _panels(len(shares), (1.5 + 4.5 * len(shares), 4.8), sharey=True)
    for axis, alpha in zip(axes, shares, strict=True):
        _teacher_line(axis.axhline, cells, alpha)
        for number, method in enumerate(names):
            points = sorted(
                (K, *_bar(values, scale))
                for (name, K, share), values in cells.items()
                if (name, share) == (method, alpha)
            )
            if points:
                K, quality, *spread = zip(*points, strict=True)
                axis.errorbar(K, quality, spread, label=method, **_style(number))
        _heads_axis(axis, sorted({K for method, K, _ in cells if method in names}))
        _titles(axis, f"α = {alpha:.0%}", "key/value heads", label(score))
        axis.set_yscale(scale)
    _legend(figure)
    return figure


def time_against_groups(results: Mapping[str, Any], name: str | None = None) -> Figure:
    """GQA fig. 6: time per sample against key/value heads, and what reading the input and the steps' bytes alone would
    take, of the results of `experiments.timing`, in a folder `name`. Beside T5-XXL the paper's.

    Where a step itself is faster than the copy, as weights in a cache are, the copy is no bound and its times are left
    out.
    """
    config = results["config"]
    rows = first_format(results)
    K = [row["kv_heads"] for row in rows]
    times = np.array([row["seconds_per_sample"] for row in rows])
    spread = np.abs(np.array([row["seconds_per_sample_range"] for row in rows]).T - times)
    figure, (axes,) = _panels(1, (6.8, 4.8))
    copy = 1e9 * results["copy_gb_per_second"]
    parts = {"reading the input": [row["reading_seconds"] / row["batch_size"] for row in rows]}
    faster = any(row["gb_per_second"] / results["copy_gb_per_second"] > 1 for row in rows)
    for part in () if faster else ("weights", "self_cache", "cross_cache"):
        of_sample = [config["new_tokens"] * row["step_bytes"][part] / row["batch_size"] for row in rows]
        if any(of_sample):
            parts[f"{part.replace('_', ' ')} at copy speed"] = [number / copy for number in of_sample]
    axes.stackplot(K, *parts.values(), labels=parts.keys(), colors=["0.9", "0.78", "0.66", "0.54"][: len(parts)])
    axes.errorbar(K, times, spread, label="measured", **_style(0))
    if size_name(config) == "t5_1_1_xxl":
        axes.plot(
            *zip(*paper.XXL_SECONDS.items(), strict=True), "k*", markersize=11, label="the paper (Table 1, TPU v4)"
        )
    for number, row in zip(K, rows, strict=True):
        _name(axes, f"batch {row['batch_size']}", (number, row["seconds_per_sample"]))
    _heads_axis(axes, K)
    axes.margins(x=0.15, y=0.1)  # room for the names of the points
    axes.set_ylim(bottom=0)
    title = f"{size_name(config, name)}: input {config['inputs_length']}, {config['new_tokens']} new tokens"
    if faster:
        title += f"\nsteps read their bytes faster than a copy's {results['copy_gb_per_second']:.3g} GB/s"
    _titles(axes, title, "key/value heads", "time per sample, s")
    _legend(figure)
    return figure


def throughput(results: Mapping[str, Any], name: str | None = None) -> Figure:
    """Llama 2, fig. 24: new tokens a second against the batch and against a step's time, of `experiments.throughput`,
    in a folder `name`.

    A cross stands where the next batch does not fit.
    """
    config = results["config"]
    figure, axes = _panels(2, (11, 4.4), sharey=True)
    for number, K in enumerate(sorted({row["kv_heads"] for row in results["rows"]}, reverse=True)):
        of_model = [row for row in results["rows"] if row["kv_heads"] == K]
        rows = [row for row in of_model if row["tokens_per_second"] is not None]
        if not rows:
            continue
        rates = np.array([row["tokens_per_second"] for row in rows])
        spread = np.abs(np.array([row["tokens_per_second_range"] for row in rows]).T - rates)
        for axis, x in zip(axes, ("batch_size", "step_ms"), strict=True):
            axis.errorbar([row[x] for row in rows], rates, spread, label=f"K = {K}", **_style(number))
        too_large = [row["batch_size"] for row in of_model if row["tokens_per_second"] is None]
        axes[0].plot(too_large, [rates[-1]] * len(too_large), "x", color="black", markersize=9)
    title = f"{size_name(config, name)}: context {config['context']}, {results['memory_bytes'] / 1e9:.3g} GB"
    _titles(axes[0], title, "batch; x: does not fit", "new tokens a second")
    _titles(axes[1], "a mark a batch", "time of a step, ms", "")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    _legend(figure)
    return figure


def first_format(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `experiments.timing` in the first of the config's formats, by key/value heads."""
    config = results["config"]
    wanted = (config["weights"][0], config["cache"][0])
    return [row for row in results["rows"] if (row["weights"], row["cache"]) == wanted]


def stability(curves: Sequence[Curve]) -> Figure:
    """GQA appendix A: training losses with their spikes, spikes a run, and the last held-out loss, over seeds."""
    models = list(dict.fromkeys(curve.model for curve in curves))
    figure, axes = _panels(3, (12.5, 1.6 + 0.3 * max(9, len(models))), widths=(2, 1, 1))
    for row, model in enumerate(models):
        style = _style(row)
        runs = [curve for curve in curves if curve.model == model]
        for number, curve in enumerate(runs):
            line = dict(color=style["color"], linestyle=style["linestyle"], linewidth=0.9)
            axes[0].plot(curve.steps, curve.losses, label=model if number == 0 else None, **line)
            axes[0].plot(curve.steps[curve.spikes], curve.losses[curve.spikes], "x", color="black", markersize=7)
        heldout = [curve.heldout for curve in runs if curve.heldout is not None]
        for axis, values in ((axes[1], [len(curve.spikes) for curve in runs]), (axes[2], heldout)):
            if values:
                mean, spread = mean_and_spread(np.array(values))
                axis.errorbar(mean, row, xerr=spread, label=model, **style)
    _titles(axes[0], "a line a seed; x: a spike", "step", "training loss, nats a token")
    _titles(axes[1], "spikes", "spikes a run", "")
    _titles(axes[2], "spread over seeds", "last held-out loss, nats a token", "")
    _method_axis(axes[1], models)
    _method_axis(axes[2], [""] * len(models))
    _legend(figure)
    return figure


_POSTTRAINING_LABELS = {"accuracy": "accuracy on held-out pairs", "reward": "reward, SD", "kl": "nats a response"}


def posttraining(report: Mapping[str, Any]) -> Figure:
    """A panel for each of the report's curves, and one for the best and the median of N samples (Llama 2 fig. 7)."""
    count = len(report["curves"]) + 1
    figure, axes = _panels(count, (3.2 * count, 3.2))
    for axis, (title, curve) in zip(axes, report["curves"].items(), strict=False):
        axis.plot(curve["steps"], curve["values"], color="0.0", marker="o", markersize=3)
        _titles(axis, title, "iteration" if "PPO" in title else "step", _POSTTRAINING_LABELS[curve["score"]])
    for number, curve in enumerate(report["rejection"]):
        for name, line in (("max", "-"), ("median", ":")):
            label = f"{'best' if name == 'max' else name}, T = {curve['temperature']:g}"
            axes[-1].plot(range(1, len(curve[name]) + 1), curve[name], line, color=STYLES[number][2], label=label)
    _titles(axes[-1], "rejection sampling", "samples a prompt", "score")
    axes[-1].legend(fontsize=7, loc="upper left")
    return figure


def _panels(count: int, size: tuple[float, float], widths=None, **shared) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, width_ratios=widths, **shared)[0]


def _style(number: int) -> dict[str, Any]:
    mark, line, grey, hollow = STYLES[number % len(STYLES)]
    return dict(marker=mark, linestyle=line, color=grey, markerfacecolor="white" if hollow else grey, capsize=3)


def _titles(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


def _name(axis: Axes, text: str, point: tuple[float, float]) -> None:
    axis.annotate(text, point, xytext=(5, 6), textcoords="offset points", fontsize=8)


def _legend(figure: Figure) -> None:
    """One for all panels, under them, where it covers no point."""
    entries = [axis.get_legend_handles_labels() for axis in figure.axes]
    found = {name: handle for handles, names in entries for handle, name in zip(handles, names, strict=True)}
    columns = min(4, int(figure.get_figwidth() / 2))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _heads_axis(axis: Axes, kv_heads: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(kv_heads, [str(K) for K in kv_heads])
    axis.minorticks_off()


def _method_axis(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)


def _teacher_line(draw, cells: Mapping[tuple[str, int, float], np.ndarray], alpha: float) -> None:
    """MHA uptrained as long, or the teacher as it is where there is none."""
    found = {share: values for (method, _, share), values in cells.items() if method == TEACHER}
    values = found.get(alpha, found.get(0.0))
    if values is not None:
        name = f"MHA, α = {alpha if alpha in found else 0:.0%}"
        draw(mean_and_spread(values)[0], color="0.5", linestyle="-.", label=name)


def _scale(cells: Mapping[tuple[str, int, float], np.ndarray], score: str) -> str:
    values = np.concatenate(list(cells.values()))
    return "log" if score == "loss" and 0 < WIDE * values.min() < values.max() else "linear"


def _bar(values: np.ndarray, scale: str) -> tuple[float, float, float]:
    """The mean over seeds, and how far its error bar goes down and up."""
    mean, spread = mean_and_spread(values)
    return mean, mean - float(values.min()) if scale == "log" and spread >= mean else spread, spread


def _seeds(cells: Mapping[tuple[str, int, float], np.ndarray]) -> str:
    least, most = min(map(len, cells.values())), max(map(len, cells.values()))
    number = f"{least} to {most}" if least < most else str(most)
    return f"mean and standard deviation of {number} seeds" if most > 1 else "one seed"
