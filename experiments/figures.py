"""python -m experiments.figures [--runs=DIR …] --output=DIR [--score=NAME] [--redraw]

The paper's figures and its Table 1, drawn from results alone, as PNG and SVG, with the paper's own numbers beside them
where they compare:

    fig3       quality against time per sample; as in the paper that of a task, where a sweep fine-tunes on one
    fig4       conversion methods
    fig5       quality against α
    fig6       time per sample against key/value heads, and what the bytes alone would take
    heads      quality against key/value heads
    table1     models by time and quality, Markdown
    stability  loss spikes and spread over seeds (GQA, appendix A), for each teacher; "runs" are those of gqa.train

--runs are folders that hold results, at any depth: of experiments.sweep, experiments.conversion_methods,
experiments.uptrain_full and experiments.timing; for the last figure, runs of gqa.train in folders NAME-s1, NAME-s2 ….
A timing.json in a folder named as a sweep's teacher gives its models' times. What has no results is left out, with
the command that makes them.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import conversion_report, paper, pictures, report, scores, stability
from experiments.scores import TEACHER, Results, mean_and_spread
from experiments.sweep import SCRATCH
from gqa import command_line, files
from gqa.checkpoints.hf_config import read_json
from gqa.errors import InputError, nearest

RESULTS = Path(__file__).parent / "results"
PATTERNS = ("results.json", "timing.json", "throughput.json", "conversion_methods/*.json")
PATTERNS += ("quickstart/report.json", "posttraining/report.json")
FORMATS = (".png", ".svg")

_SWEEP = "python -m experiments.sweep --config=configs/sweeps/{}.py --workdir=DIR"
_TIMING = "python -m experiments.timing --config=configs/timing/{}.py --output=DIR/{}"
MADE_BY = {
    "fig3": f"{_SWEEP.format('groups')} and {_TIMING.format('teacher_t5', 't5')}",
    "fig4": _SWEEP.format("methods"),
    "fig5": _SWEEP.format("alpha"),
    "fig6": _TIMING.format("t5_xxl", "t5_xxl"),
    "heads": _SWEEP.format("groups"),
    "table1": _SWEEP.format("groups"),
    "stability": f"{_SWEEP.format('alpha')}, whose runs are read, not results.json alone",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"folder of results; may be repeated ({RESULTS.name}/)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the figures")
    parser.add_argument(
        "--score", help="what is drawn of a sweep's scores (default: loss; in fig. 3 the first of a task, if any)"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="also draw again, in their places, the pictures beside the results"
    )
    arguments = command_line.parse_arguments(parser)
    folders = arguments.runs or [RESULTS]
    # Results are named by their folders: "." has no name.
    folders = [folder.resolve() if folder.name in ("", "..") else folder for folder in folders]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--runs={folder} is no folder; expected one with results of the experiments")
    paths = sorted({path for folder in folders for pattern in PATTERNS for path in folder.rglob(pattern)})
    drawn = set()
    for figure, path in draw(paths, folders, arguments.score, arguments.output):
        drawn.add(figure)
        print(path)
    if arguments.redraw:
        for path in redraw(paths):
            print(path)
    for figure, command in MADE_BY.items():
        if figure not in drawn:
            print(f"{figure}: left out, too few results for it: {command}")


def draw(paths: Sequence[Path], folders: Sequence[Path], score: str | None, output: Path) -> Iterator[tuple[str, Path]]:
    """Writes every figure that there are results for; its name and file, one after the other.

    Of what `score` names; `None`: the loss, and in fig. 3 the first score of a task where there is one.
    """
    timed = [path for path in paths if path.name == "timing.json"]
    _check_names("timings", [path.parent.name for path in timed])
    timings = {path.parent.name: _timing(path) for path in timed}
    found = [results for path in paths if path.name != "timing.json" and (results := scores.read(path))]
    found = scores.share_heads(found)
    _check_names("results", [results.name for results in found])
    known = sorted({name for results in found for name in results.names})
    given, score = score, score or "loss"
    if known and score not in known:
        closest = nearest(score, known)
        raise InputError(f"--score={score} is in no results; expected one of {', '.join(known)}; nearest: {closest}")
    times = sample_times(timings)
    steady = stability.read(folders, _multi_head(found))
    for results in (results for results in found if score in results.names):
        if results.alpha is not None:
            yield "table1", _write(output / f"table1_{results.name}.md", table_1(results, times))
        if results.alpha is not None and pictures.timed(results, times):
            quality = given or next((name for name in results.names if scores.is_of_task(name)), score)
            yield from _save("fig3", results.name, pictures.quality_against_time(results, times, quality), output)
        for teacher in results.teachers:
            own = results.of(teacher)
            name = results.name if len(results.teachers) == 1 else f"{results.name}_{teacher}"
            for figure, drawing, drawn in _of_a_teacher(own):
                yield from _save(figure, name, drawing(drawn, score), output)
    for name, results in timings.items():
        yield from _save("fig6", name, pictures.time_against_groups(results, name), output)
    for name, curves in steady.items():
        yield from _save("stability", name, pictures.stability(curves, name), output)


def _multi_head(found: Sequence[Results]) -> dict[str, int]:
    """The number of heads at which a model of a teacher is MHA, by teacher, as far as it is known."""
    heads = {teacher: number for results in found for teacher, number in results.heads.items()}
    return heads | {teacher: number for results in found for teacher, number in results.query_heads.items()}


def _check_names(kind: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two {kind} are named {name}; expected different names of their folders")


def _of_a_teacher(own: Results) -> Iterator[tuple[str, Callable, Results]]:
    """The figures that one teacher's results are enough for, and those that each is drawn of."""
    made = [score for score in own.scores if score.method != TEACHER]
    converted = [score for score in made if score.method != SCRATCH]
    if len({score.method for score in converted}) > 2:
        yield "fig4", pictures.methods, own.without_scratch()
    if len({score.alpha for score in converted}) > 2:
        yield "fig5", pictures.quality_against_alpha, own.without_scratch()
    if len({score.kv_heads for score in made}) > 2 and own.alpha is not None:
        yield "heads", pictures.quality_against_groups, own


def sample_times(timings: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Seconds a sample, median, least and most, by teacher and key/value heads."""
    return {
        (teacher, row["kv_heads"]): (row["seconds_per_sample"], *row["seconds_per_sample_range"])
        for teacher, timing in timings.items()
        for row in pictures.first_format(timing)
    }


def table_1(results: Results, times: Mapping[tuple[str, int], Sequence[float]]) -> str:
    """Markdown laid out as GQA's Table 1: ours, then the paper's."""
    names = results.names
    lines = [
        f"| model | α | seeds | time per sample, s | {' | '.join(names)} |",
        "|---|--:|--:|--:|" + "--:|" * len(names),
    ]
    numbers = []  # of seeds, a row each
    for teacher in results.teachers:
        own = results.of(teacher)
        cells = {name: own.cells(name) for name in names}
        for key in own.compared():
            method, kv_heads, alpha = key
            numbers.append(number := len(cells[names[0]][key]))
            model = own.model(method, kv_heads)
            time = f"{times[teacher, kv_heads][0]:.4f}" if (teacher, kv_heads) in times else ""
            row = [
                model
                + ("" if method == TEACHER else f", {method}")
                + (f" ({teacher})" if results.teachers[1:] else ""),
                f"{alpha:.0%}",
                str(number) if number > 1 else "one seed",
                time,
            ]
            for name in names:
                mean, spread = mean_and_spread(cells[name][key])
                row.append(f"{mean:.3f} ± {spread:.3f}" if number > 1 else f"{mean:.3f}")
            lines.append(f"| {' | '.join(row)} |")
    over = "One seed" if max(numbers) == 1 else "Mean and standard deviation over seeds"
    over += ", of one seed its own number" if min(numbers) == 1 < max(numbers) else ""
    lines += ["", f"{over}. The paper's (GQA, Table 1; T5, α = 5%):", ""]
    lines.append(f"| model | time per sample and TPU v4 chip, s | average | {' | '.join(paper.TABLE_1_COLUMNS)} |")
    lines.append("|---|" + "--:|" * (2 + len(paper.TABLE_1_COLUMNS)))
    for model, (time, average, tasks) in paper.TABLE_1.items():
        lines.append(f"| {model} | {time} | {average} | {' | '.join(map(str, tasks))} |")
    return "\n".join(lines) + "\n"


def redraw(paths: Sequence[Path]) -> Iterator[Path]:
    """Draws the pictures again that the experiments themselves have put beside `paths`."""
    for path in paths:
        if path.name == "timing.json":
            picture = path.with_suffix(".png")
            pictures.save(pictures.time_against_groups(_timing(path), path.parent.name), picture)
        elif path.name == "throughput.json":
            picture = path.with_suffix(".png")
            with scores.reading(path, "experiments.throughput"):
                content = read_json(path)
                if not content["rows"]:
                    raise ValueError("no rows")
                drawing = pictures.throughput(content, path.parent.name)
            pictures.save(drawing, picture)
        elif path.parent.name == "conversion_methods":
            picture = path.with_suffix(".png")
            with scores.reading(path, "experiments.conversion_methods"):
                conversion_report.draw(read_json(path), picture)
        elif path.parent.name == "quickstart":
            picture = path.with_name("quality_vs_latency.png")
            with scores.reading(path, "experiments.report"):
                report.draw(read_json(path), picture)
        elif path.parent.name == "posttraining":
            picture = path.with_name("curves.png")
            with scores.reading(path, "experiments.posttraining"):
                drawing = pictures.posttraining(read_json(path))
            pictures.save(drawing, picture)
        else:
            continue
        yield picture


def _timing(path: Path) -> dict[str, Any]:
    content = read_json(path)
    with scores.reading(path, "experiments.timing"):  # all that is drawn of it, before anything is written
        if not sample_times({path.parent.name: content}):
            raise ValueError("no rows")
        pictures.time_against_groups(content)
    return content


def _save(figure: str, name: str, picture: Figure, output: Path) -> Iterator[tuple[str, Path]]:
    for suffix in FORMATS:
        path = output / f"{figure}_{name}{suffix}"
        pictures.save(picture, path)
        yield figure, path


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)
    return path


if __name__ == "__main__":
    command_line.run(main)
