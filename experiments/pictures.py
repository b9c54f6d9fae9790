"""The paper's figures, drawn from results: every function takes numbers and returns a picture, `save` writes it.

Readable in grey: models and methods differ by mark and line, not by colour. Error bars are the standard deviation over
seeds, of times the range of the repetitions; one that would reach 0 on a logarithmic axis ends at the least seed. Where
points are of different numbers of seeds, hollow ones are of a single one.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from experiments import paper
from experiments.scores import TEACHER, Results, label, mean_and_spread, size_name
from experiments.stability import Curve
from gqa import files

# Mark, line, grey.
STYLES = (
    ("o", "-", "0.0"),
    ("s", "--", "0.4"),
    ("D", "-.", "0.15"),
    ("^", ":", "0.5"),
    ("v", "-", "0.3"),
    ("P", "--", "0.6"),
    ("X", ":", "0.2"),
    ("<", "-", "0.6"),
    (">", "-.", "0.1"),
    ("h", "--", "0.5"),
    ("p", ":", "0.0"),
    ("d", "-", "0.45"),
    ("H", "-.", "0.25"),
)
PAPER = ("*", "1", "2", "+")  # the paper's marks, none of ours
WIDE = 30  # largest by smallest loss from which on an axis of losses is logarithmic
NEAR = 0.01  # nats from MHA below which the axis of distances is linear, where some are better than MHA
# Of many methods, those that lines are drawn of.
LINES = ("mean", "mean+refit", "procrustes+renorm", "svd", "svd+group+refit", "svd+group+tune+refit")


def save(figure: Figure, path: Path) -> None:
    """Writes a picture in the format of its name, the same bytes for the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "gqa", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with files.whole(path) as unfinished:
            figure.savefig(unfinished, dpi=150, metadata=metadata)


def timed(results: Results, times: Mapping[tuple[str, int], Any]) -> list[tuple[str, str, int, float]]:
    """Teacher, method, key/value heads and α of the models of fig. 3 that have a time.

    Beside models that were uptrained stands the teacher that was, where there is one.
    """
    found = []
    for teacher in results.teachers:
        own = results.of(teacher)
        compared = own.compared()
        for method, kv_heads, alpha in compared:
            stands_uptrained = alpha == 0 and (method, kv_heads, own.alpha) in compared
            if (teacher, kv_heads) in times and not stands_uptrained:
                found.append((teacher, method, kv_heads, alpha))
    return found


def quality_against_time(results: Results, times: Mapping[tuple[str, int], Sequence[float]], score: str) -> Figure:
    """GQA fig. 3: a mark a model, and the paper's T5 beside them.

    `times` are seconds a sample by teacher and key/value heads: median, least and most; of one model at least.
    """
    figure, axes = _panels(2, (10.5, 5.2))
    points = {}
    for teacher, method, kv_heads, alpha in timed(results, times):
        own = results.of(teacher)
        model = own.model(method, kv_heads)
        name = f"{teacher} {model}" if len(results.teachers) > 1 else model
        name += "" if method in (TEACHER, "mean") else f", {method}"
        points[name] = own.cells(score)[method, kv_heads, alpha], times[teacher, kv_heads]
    mixed = _mixed(values for values, _ in points.values())
    for number, (name, (values, (time, least, most))) in enumerate(points.items()):
        quality, spread = mean_and_spread(values)
        style = _style(number, hollow=mixed and len(values) == 1)
        axes[0].errorbar(time, quality, spread, [[time - least], [most - time]], label=name, **style)
    seeds = _seeds(({name: values for name, (values, _) in points.items()}, "linear"))
    _titles(axes[0], f"α = {results.alpha:.0%}, {results.name}\n{seeds}", "time per sample, s", label(score))
    for mark, (name, (time, average, _)) in zip(PAPER, paper.TABLE_1.items(), strict=True):
        style = dict(marker=mark, markersize=12, markeredgewidth=1.8, color="black", linestyle="none")
        axes[1].errorbar(time, average, label=name, **style)
    _titles(axes[1], "the paper, T5 (Table 1)", "time per sample and TPU v4 chip, s", "average of seven tasks")
    for axis, side in zip(axes, ("left", "right"), strict=True):
        axis.margins(y=0.2)
        axis.set_xlim(0, 1.1 * axis.dataLim.x1)
        # A legend each: the panels share no model.
        handles = axis.get_legend_handles_labels()
        figure.legend(*handles, loc=f"outside lower {side}", ncols=2, fontsize=8, frameon=False)
    return figure


def methods(results: Results, score: str) -> Figure:
    """GQA fig. 4: the conversion methods of one teacher, by share of uptraining; at α = 5 % the paper's beside them.

    A loss is drawn by its distance to MHA's of the same α where there is one: the best methods lose so little that
    otherwise all are on MHA's line.
    """
    cells = results.cells(score)
    names = [method for method in dict.fromkeys(method for method, _, _ in cells) if method != TEACHER]
    kv_heads = sorted({K for method, K, _ in cells if method != TEACHER}, reverse=True)
    shares = sorted({alpha for method, _, alpha in cells if method != TEACHER})
    if len(shares) > 3:  # the others are in fig. 5
        shares = [alpha for alpha in shares if alpha in (0.0, results.alpha)]
    cells = {cell: values for cell, values in cells.items() if cell[0] == TEACHER or cell[2] in shares}
    beside = 0.05 in shares
    figure, axes = _panels(len(shares) + beside, (2.2 + 3.6 * (len(shares) + beside), 2.2 + 0.36 * max(5, len(names))))
    distances = _distances(cells, score)
    drawn = distances or {cell: values for cell, values in cells.items() if cell[0] != TEACHER}
    mixed, scale = _mixed(drawn.values()), "linear" if distances else _scale(cells.values(), score)
    panels = []
    for axis, alpha in zip(axes, shares, strict=False):
        present = [method for method in names if any((method, K, alpha) in drawn for K in kv_heads)]
        here = {cell: values for cell, values in drawn.items() if cell[2] == alpha}
        if distances:
            scale = _distance_scale(here)
        panels.append((here, scale))
        for number, K in enumerate(kv_heads):
            # The models of a method stand one under the other: they are often as good.
            below = 0.24 * len(present) / len(names) * (number - (len(kv_heads) - 1) / 2)
            row = {method: row + below for row, method in enumerate(present)}
            points = {row[method]: here[method, K, alpha] for method in present if (method, K, alpha) in here}
            _points(axis, points, scale, mixed, results.model(names[0], K), _style(number) | {"linestyle": "none"}, "x")
        if distances:
            title = f"α = {alpha:.0%}, {results.teacher_name}'s loss {_number(cells, alpha)}"
            _titles(axis, title, _distance_label(results, scale), "")
        else:
            _teacher_line(axis.axvline, results, cells, alpha)
            _titles(axis, f"α = {alpha:.0%}", label(score).replace(" (", "\n("), "")
        _set_scale(axis, "x", scale)
        _method_axis(axis, present)
    if beside:
        ranges = paper.FIGURE_4_READ_OFF
        middle = [(low + high) / 2 for low, high in ranges.values()]
        half = [(high - low) / 2 for low, high in ranges.values()]
        style = dict(marker=PAPER[0], markersize=11, color="black", linestyle="none", capsize=3)
        axes[-1].errorbar(middle, range(len(ranges)), xerr=half, label="MQA (bars: as far as it can be read)", **style)
        title = "the paper, T5-Large, α = 5%,\nread off its fig. 4"
        _titles(axes[-1], title, "average score (higher is better)", "")
        _method_axis(axes[-1], list(ranges))
    figure.suptitle(_seeds(*panels), fontsize=10)
    _legend(figure)
    return figure


def quality_against_alpha(results: Results, score: str) -> Figure:
    """GQA fig. 5: one teacher's models against the share of the pre-training that uptraining takes.

    A model that was never uptrained is no line and is left out. Beside losses stands their distance to MHA's of the
    same α, where there is one and the losses are too alike for their own axis to be logarithmic.
    """
    cells = results.cells(score)
    uptrained = {(method, K) for method, K, alpha in cells if alpha}
    cells = {cell: values for cell, values in cells.items() if cell[:2] in uptrained}
    distances = _distances(cells, score)
    panels, names = [(cells, _scale(cells.values(), score))], [("", label(score))]
    if distances:
        panels.append((distances, scale := _distance_scale(distances)))
        names.append((f"distance to {results.teacher_name} of the same α", _distance_label(results, scale)))
    figure, axes = _panels(len(panels), (2.2 + 4.6 * len(panels), 4.8))
    kinds = list(dict.fromkeys((method, K) for method, K, _ in cells))
    mixed = _mixed(cells.values())
    for axis, (drawn, scale), (title, name) in zip(axes, panels, names, strict=True):
        for number, (method, K) in enumerate(kinds):
            points = {100 * alpha: values for (*kind, alpha), values in drawn.items() if kind == [method, K]}
            model = results.model(method, K) + ("" if method == TEACHER else f", {method}")
            _points(axis, points, scale, mixed, model, _style(number))
        _titles(axis, title, "α: share of the pre-training steps, %", name)
        _set_scale(axis, "y", scale)
    figure.suptitle(_seeds(*panels), fontsize=10)
    _legend(figure)
    return figure


def quality_against_groups(results: Results, score: str) -> Figure:
    """One teacher's models against their key/value heads, a panel a share of uptraining."""
    cells = results.cells(score)
    scale = _scale(cells.values(), score)
    names = [method for method in dict.fromkeys(method for method, _, _ in cells) if method != TEACHER]
    if len(names) > len(STYLES):
        names = [method for method in names if method in LINES]
    drawn = {cell: values for cell, values in cells.items() if cell[0] in names}
    shares, mixed = sorted({alpha for _, _, alpha in drawn}), _mixed(drawn.values())
    figure, axes = _panels(len(shares), (1.5 + 4.5 * len(shares), 5.1), sharey=True)
    for axis, alpha in zip(axes, shares, strict=True):
        _teacher_line(axis.axhline, results, cells, alpha)
        for number, method in enumerate(names):
            points = {K: values for (name, K, share), values in drawn.items() if (name, share) == (method, alpha)}
            _points(axis, points, scale, mixed, method, _style(number))
        _heads_axis(axis, sorted({K for _, K, _ in drawn}))
        _titles(axis, f"α = {alpha:.0%}", "key/value heads", label(score))
        axis.set_yscale(scale)
    figure.suptitle(_seeds((drawn, scale)), fontsize=10)
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


def stability(curves: Sequence[Curve], name: str) -> Figure:
    """GQA appendix A: training losses with their spikes, spikes a run, and the last held-out loss, over seeds.

    Losses have a panel for each way to train: uptraining takes far fewer steps than training from scratch.
    """
    models = list(dict.fromkeys(curve.model for curve in curves))
    kinds = list(dict.fromkeys(curve.kind for curve in curves))
    size = (6.2 + 4.6 * len(kinds), 1.8 + 0.3 * max(9, len(models)))
    figure, axes = _panels(len(kinds) + 2, size, widths=[1.5] * len(kinds) + [1, 1])
    figure.suptitle(name, fontsize="medium")
    counts, ends = axes[-2:]
    for row, model in enumerate(models):
        runs = [curve for curve in curves if curve.model == model]
        axis = axes[kinds.index(runs[0].kind)]
        for number, curve in enumerate(runs):
            line = _style(row) | dict(linewidth=0.9, markersize=3.5, markevery=max(1, len(curve.steps) // 8))
            del line["capsize"]  # of error bars
            axis.plot(curve.steps, curve.losses, label=model if number == 0 else None, **line)
            axis.plot(curve.steps[curve.spikes], curve.losses[curve.spikes], "x", color="black", markersize=7)
        spikes = [len(curve.spikes) for curve in runs if curve.countable]
        heldout = [curve.heldout for curve in runs if curve.heldout is not None]
        for axis, values in ((counts, spikes), (ends, heldout)):
            if values:
                mean, spread = mean_and_spread(np.array(values))
                axis.errorbar(mean, row, xerr=spread, label=model, **_style(row))
        if not spikes:
            place = counts.get_yaxis_transform()
            counts.text(
                0.5, row, "too few lines", transform=place, ha="center", va="center", fontsize=8, style="italic"
            )
    for axis, kind in zip(axes, kinds, strict=False):
        runs = [curve for curve in curves if curve.kind == kind]
        countable = any(curve.countable for curve in runs)
        title = f"{kind}: a line a seed" + ("; x: a spike" if countable else "")
        _titles(axis, title, "step", "training loss, nats a token")
        # A spike is a difference of losses: an axis that shows some is linear.
        scale = "linear" if countable else _scale([curve.losses for curve in runs], "loss")
        axis.set_yscale(scale)
    counts.set_xlim(right=max(1.0, counts.get_xlim()[1]))  # where there is none, fractions of one say nothing
    _titles(counts, "mean and standard deviation", "spikes a run", "")
    _titles(ends, "over seeds", "last held-out loss,\nnats a token", "")
    _method_axis(counts, models)
    _method_axis(ends, [""] * len(models))
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


def _style(number: int, hollow: bool = False) -> dict[str, Any]:
    mark, line, grey = STYLES[number % len(STYLES)]
    return dict(marker=mark, linestyle=line, color=grey, markerfacecolor="white" if hollow else grey, capsize=3)


def _points(axis: Axes, points: Mapping[float, np.ndarray], scale: str, mixed: bool, name: str, style, along="y"):
    """Means and error bars of `{place: the score of each seed}`; where numbers of seeds are `mixed`, one is hollow."""
    if not points:
        return
    places = sorted(points)
    quality, *spread = zip(*(_bar(points[place], scale) for place in places), strict=True)
    data = (quality, places) if along == "x" else (places, quality)
    axis.errorbar(*data, **{f"{along}err": spread}, label=name, **style)
    single = [index for index, place in enumerate(places) if mixed and len(points[place]) == 1]
    hollow = dict(marker=style["marker"], color=style["color"], markerfacecolor="white", linestyle="none", zorder=3)
    axis.plot(*([numbers[index] for index in single] for numbers in data), **hollow)


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


def _teacher_line(draw, results: Results, cells: Mapping[tuple[str, int, float], np.ndarray], alpha: float) -> None:
    """The teacher uptrained as long, or the teacher as it is where there is none."""
    found = {share: values for (method, _, share), values in cells.items() if method == TEACHER}
    values = found.get(alpha, found.get(0.0))
    if values is not None:
        name = f"{results.teacher_name}, α = {alpha if alpha in found else 0:.0%}"
        draw(mean_and_spread(values)[0], color="0.5", linestyle="-.", label=name)


def _scale(cells: Iterable[np.ndarray], score: str) -> str:
    values = np.concatenate(list(cells))
    return "log" if score == "loss" and 0 < WIDE * values.min() < values.max() else "linear"


def _distances(cells: Mapping[tuple[str, int, float], np.ndarray], score: str) -> dict[tuple, np.ndarray]:
    """The losses of conversions less MHA's mean of the same α; none where an α has no MHA, or an axis of the losses
    themselves is logarithmic and tells them apart.
    """
    converted = {cell: values for cell, values in cells.items() if cell[0] != TEACHER}
    reference = {alpha: values.mean() for (method, _, alpha), values in cells.items() if method == TEACHER}
    if (
        score != "loss"
        or _scale(cells.values(), score) == "log"
        or not {alpha for *_, alpha in converted} <= set(reference)
    ):
        return {}
    return {cell: values - reference[cell[2]] for cell, values in converted.items()}


def _distance_scale(distances: Mapping[tuple[str, int, float], np.ndarray]) -> str:
    return "log" if all(values.min() > 0 for values in distances.values()) else "symlog"


def _distance_label(results: Results, scale: str) -> str:
    note = f"\nlinear below {NEAR:g}" if scale == "symlog" else ""
    return f"held-out loss above {results.teacher_name}'s,\nnats a token (lower is better){note}"


def _set_scale(axis: Axes, direction: str, scale: str) -> None:
    getattr(axis, f"set_{direction}scale")(scale, **({"linthresh": NEAR} if scale == "symlog" else {}))
    if scale == "log":
        low, high = getattr(axis.dataLim, f"interval{direction}")
        if high < 300 * low:  # powers of ten would be one or two marks, and those between them too many
            side = getattr(axis, f"{direction}axis")
            side.set_major_locator(LogLocator(subs=(1, 3)))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(NullFormatter())


def _number(cells: Mapping[tuple[str, int, float], np.ndarray], alpha: float) -> str:
    """MHA's, with the deviation over seeds where there are several."""
    (values,) = (values for (method, _, share), values in cells.items() if (method, share) == (TEACHER, alpha))
    mean, spread = mean_and_spread(values)
    return f"{mean:.4f} ± {spread:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _mixed(cells: Iterable[np.ndarray]) -> bool:
    """Whether some are of one seed and others of more."""
    numbers = {len(values) for values in cells}
    return 1 in numbers and len(numbers) > 1


def _bar(values: np.ndarray, scale: str) -> tuple[float, float, float]:
    """The mean over seeds, and how far its error bar goes down and up."""
    mean, spread = mean_and_spread(values)
    return mean, mean - float(values.min()) if _cut(values, scale) else spread, spread


def _cut(values: np.ndarray, scale: str) -> bool:
    """Whether an error bar would reach 0 on a logarithmic axis."""
    mean, spread = mean_and_spread(values)
    return scale == "log" and spread >= mean


def _seeds(*panels: tuple[Mapping[tuple[str, int, float], np.ndarray], str]) -> str:
    """What marks and error bars are, of panels with these cells and scales."""
    found = [(values, scale) for cells, scale in panels for values in cells.values()]
    numbers = [len(values) for values, _ in found]
    number = f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else str(max(numbers))
    text = f"mean and standard deviation of {number} seeds" if max(numbers) > 1 else "one seed"
    if _mixed(values for values, _ in found):
        text += "; hollow: one seed"
    if any(_cut(values, scale) for values, scale in found):
        text += "\nlower bars to the least seed where the deviation reaches 0"
    return text
