"""The figures' numbers are the results', read from what is drawn; what has no results is named with its command."""

import json
import os
import warnings

import numpy as np
import pytest

from experiments import figures, paper, pictures, scores, stability
from experiments.scores import Results, Score, of_sweep
from gqa.errors import InputError

LOSSES = {  # method, key/value heads, α: by seed
    ("none", 8, 0.0): [2.0],
    ("none", 8, 0.02): [1.95],
    ("none", 8, 0.05): [1.9, 1.92],
    ("mean", 4, 0.05): [2.0, 2.02],
    ("mean", 2, 0.0): [4.0],
    ("mean", 2, 0.02): [2.6],
    ("mean", 2, 0.05): [2.1, 2.2],
    ("mean", 1, 0.05): [2.4, 2.8],
    ("first", 2, 0.05): [2.3],
    ("random", 2, 0.05): [2.5, 2.6],
}
RUNS = [
    dict(teacher="t5", method=method, kv_heads=K, alpha=alpha, seed=seed, loss=loss, accuracy=loss / 10, seconds=1.0)
    for (method, K, alpha), losses in LOSSES.items()
    for seed, loss in enumerate(losses, 1)
]
SECONDS = {1: 0.1, 2: 0.2, 4: 0.4, 8: 0.8}
TIMING = dict(
    config=dict(
        size="t5_1_1_small",
        changes={},
        weights=[None],
        cache=[None],
        kv_heads=list(SECONDS),
        inputs_length=64,
        new_tokens=10,
    ),
    copy_gb_per_second=2.0,
    rows=[
        dict(
            kv_heads=K,
            weights=None,
            cache=None,
            batch_size=4,
            seconds_per_sample=time,
            seconds_per_sample_range=[0.9 * time, 1.3 * time],
            reading_seconds=0.04,
            gb_per_second=1.5,
            step_bytes=dict(weights=8_000_000, self_cache=K * 1_000_000, cross_cache=K * 4_000_000),
        )
        for K, time in SECONDS.items()
    ],
)


@pytest.fixture
def sweep():
    return Results("groups", [of_sweep(run) for run in RUNS])


ABOVE = "held-out loss above MHA's"


def hollow(axis):
    """The points that are marked as those of a single seed, and the mark of each."""
    lines = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    return {(*map(float, point), line.get_marker()) for line in lines for point in line.get_xydata()}


def drawn(axis, direction="y"):
    """`{label: [(x, y, half of the error bar)]}` of the error bars of a panel; without bars the half is 0."""
    found = {}
    for container in axis.containers:
        line, _, bars = container.lines
        segments = bars[0].get_segments() if bars else [[(0, 0), (0, 0)]] * len(line.get_xdata())
        side = "xy".index(direction)
        halves = [float(np.ptp([point[side] for point in segment])) / 2 for segment in segments]
        points = zip(*map(list, (line.get_xdata(), line.get_ydata())), halves, strict=True)
        found.setdefault(container.get_label(), []).extend(tuple(map(float, point)) for point in points)
    return found


def of(method, K, alpha):
    """Mean and spread, from the literals above."""
    losses = LOSSES[method, K, alpha]
    return np.mean(losses), np.std(losses, ddof=1) if len(losses) > 1 else 0.0


def test_quality_against_alpha(sweep):
    found = drawn(pictures.quality_against_alpha(sweep, "loss").axes[0])
    wanted = [(100 * alpha, *of("mean", 2, alpha)) for alpha in (0.0, 0.02, 0.05)]
    np.testing.assert_allclose(found["GQA-2, mean"], wanted, atol=1e-9)
    np.testing.assert_allclose(found["MHA"][2], (5, *of("none", 8, 0.05)), atol=1e-9)
    (panel,) = pictures.quality_against_alpha(sweep, "accuracy").axes
    assert drawn(panel)["GQA-2, mean"][0][1] == pytest.approx(0.4)


def test_distance_to_multi_head_against_alpha(sweep):
    losses, distances = pictures.quality_against_alpha(sweep, "loss").axes
    assert distances.get_ylabel().startswith(ABOVE) and (losses.get_yscale(), distances.get_yscale()) == (
        "linear",
        "log",
    )
    found = drawn(distances)
    wanted = [(100 * alpha, of("mean", 2, alpha)[0] - of("none", 8, alpha)[0]) for alpha in (0.0, 0.02, 0.05)]
    np.testing.assert_allclose([point[:2] for point in found["GQA-2, mean"]], wanted)
    assert "MHA" not in found and "MHA" in drawn(losses)
    # Without MHA of every α there are none.
    without = Results("x", [score for score in sweep.scores if (score.method, score.alpha) != ("none", 0.02)])
    assert len(pictures.quality_against_alpha(without, "loss").axes) == 1


def test_what_is_better_than_multi_head_is_on_the_picture():
    losses = {("none", 8): [2.0, 2.0], ("mean", 2): [2.5, 2.6], ("best", 2): [1.99, 1.995]}
    found = [
        Score("t", method, K, alpha, seed, {"loss": loss})
        for (method, K), both in losses.items()
        for alpha in (0.0, 0.01, 0.05)
        for seed, loss in enumerate(both, 1)
    ]
    panels = pictures.quality_against_alpha(Results("x", found), "loss").axes
    assert panels[1].get_yscale() == "symlog" and panels[1].get_ylabel().endswith("linear below 0.01")
    assert panels[1].get_ylim()[0] < -0.01
    assert drawn(panels[1])["GQA-2, best"][0][1] == pytest.approx(-0.0075)
    assert pictures.methods(Results("x", found), "loss").axes[0].get_xlim()[0] < -0.01


def test_points_of_one_seed_are_hollow_beside_others(sweep):
    figure = pictures.quality_against_alpha(sweep, "loss")
    assert figure.get_suptitle() == "mean and standard deviation of 1 to 2 seeds; hollow: one seed"
    places = {point[:2] for point in hollow(figure.axes[0])}
    assert places == {(0.0, 2.0), (2.0, 1.95), (0.0, 4.0), (2.0, 2.6), (5.0, 2.3)}
    # No mark of several seeds is hollow by itself, nor any where all are of one.
    assert not any(container.lines[0].get_markerfacecolor() == "white" for container in figure.axes[0].containers)
    single = Results("x", [score for score in sweep.scores if score.seed == 1])
    figure = pictures.quality_against_alpha(single, "loss")
    assert figure.get_suptitle() == "one seed" and not hollow(figure.axes[0])
    (panel,) = pictures.methods(sweep, "accuracy").axes[2:3]
    assert [point[0] for point in hollow(panel)] == pytest.approx([0.23])


def test_methods_and_what_the_paper_reads(sweep):
    *_, ours, papers = pictures.methods(sweep, "loss").axes
    assert [text.get_text() for text in ours.get_yticklabels()] == ["mean", "first", "random"]
    assert ours.get_xlabel().startswith(ABOVE) and ours.get_xscale() == "log"
    found = drawn(ours, "x")
    for row, method in enumerate(("mean", "first", "random")):
        mean, spread = of(method, 2, 0.05)
        np.testing.assert_allclose(found["GQA-2"][row], (mean - 1.91, row, spread), atol=1e-9)
    np.testing.assert_allclose(found["MQA"], [(2.6 - 1.91, 0.24, of("mean", 1, 0.05)[1])], atol=1e-9)
    assert ours.get_title() == "α = 5%, MHA's loss 1.9100 ± 0.0141"
    (read,) = drawn(papers, "x").values()
    np.testing.assert_allclose(read, [(55.6, 0, 0), (55.25, 1, 0.15), (54.9, 2, 0.3)], atol=1e-9)
    assert "read off" in papers.get_title()
    marks = [{line.get_marker() for c in axis.containers for line in c.lines[:1]} for axis in (ours, papers)]
    assert not marks[0] & marks[1]
    # A panel has the rows that it has points in.
    first = pictures.methods(sweep, "loss").axes[0]
    assert [text.get_text() for text in first.get_yticklabels()] == ["mean"]
    without = Results("t5", [score for score in sweep.scores if score.alpha == 0])
    assert [axis.get_title() for axis in pictures.methods(without, "loss").axes] == ["α = 0%, MHA's loss 2.0000"]
    accuracy = pictures.methods(sweep, "accuracy").axes[-2]
    assert "accuracy" in accuracy.get_xlabel() and drawn(accuracy, "x")["MQA"][0][0] == pytest.approx(0.26)


def test_few_powers_of_ten_have_labels_between(sweep):
    ours = pictures.methods(sweep, "loss").axes[-2]
    ours.figure.draw_without_rendering()
    low, high = ours.get_xlim()
    shown = [text.get_text() for text in ours.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert shown == ["0.1", "0.3", "1"] and not any(text.get_text() for text in ours.get_xticklabels(minor=True))


def test_many_shares_and_losses_of_all_sizes():
    shares = (0.0, 0.01, 0.02, 0.05, 0.1)
    of_recall = Results(
        "recall", [Score("t", "mean", 1, alpha, 1, {"loss": 3 * 10 ** (-30 * alpha)}) for alpha in shares]
    )
    figure = pictures.methods(of_recall, "loss")
    assert [axis.get_title() for axis in figure.axes[:-1]] == ["α = 0%", "α = 5%"]
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log", "linear"]
    assert pictures.quality_against_alpha(of_recall, "loss").axes[0].get_yscale() == "log"


def test_quality_against_time_with_table_1_beside(sweep):
    times = figures.sample_times({"t5": TIMING})
    ours, papers = pictures.quality_against_time(sweep, times, "loss").axes
    found = drawn(ours)
    # Every model at α = 5 %, the multi-head one as well.
    assert sorted(found) == ["GQA-2", "GQA-2, first", "GQA-2, random", "GQA-4", "MHA", "MQA"]
    for name, K, method in (("MHA", 8, "none"), ("GQA-4", 4, "mean"), ("MQA", 1, "mean")):
        assert found[name][0][:2] == pytest.approx((SECONDS[K], of(method, K, 0.05)[0]))
    assert {name: points[0][:2] for name, points in drawn(papers).items()} == {
        name: row[:2] for name, row in paper.TABLE_1.items()
    }
    # A legend names the points, by marks that are no other point's of either panel.
    legends = [[text.get_text() for text in legend.get_texts()] for legend in ours.figure.legends]
    assert legends == [list(found), list(paper.TABLE_1)] and not ours.texts and not papers.texts
    marks = [container.lines[0].get_marker() for axis in (ours, papers) for container in axis.containers]
    assert len(set(marks)) == len(marks) == 10
    assert {point[1] for point in hollow(ours)} == {2.3}
    assert ours.get_title() == "α = 5%, groups\nmean and standard deviation of 1 to 2 seeds; hollow: one seed"


def test_what_is_trained_with_all_heads_is_multi_head(tmp_path):
    scratch = [
        dict(teacher="t5", method="scratch", kv_heads=K, alpha=1.0, seed=1, loss=2.0, commands=["x"]) for K in (8, 2, 1)
    ]
    for name, runs in (("scratch", scratch), ("groups", RUNS)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"runs": runs}))
    alone = scores.read(tmp_path / "scratch" / "results.json")
    beside = scores.read(tmp_path / "groups" / "results.json")
    # Eight of unknown many heads are the paper's GQA-8, and stay it where the teacher has more.
    assert [alone.model("scratch", K) for K in (8, 2, 1)] == ["GQA-8", "GQA-2", "MQA"]
    assert [beside.model(method, K) for method, K in (("none", 8), ("mean", 4))] == ["MHA", "GQA-4"]
    shared, _ = scores.share_heads([alone, beside])
    assert "| MHA, scratch | 100% | one seed |" in figures.table_1(shared, {})
    (tmp_path / "scratch" / "sweep.json").write_text(json.dumps({"overrides": {}, "teachers.t5": {"kv_heads": 64}}))
    own = scores.read(tmp_path / "scratch" / "results.json")
    assert own.model("scratch", 8) == scores.share_heads([own, beside])[0].model("scratch", 8) == "GQA-8"
    assert own.model("scratch", 64) == "MHA"


def test_a_teacher_that_is_grouped_is_no_multi_head_model(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"runs": RUNS}))
    settings = {"teachers.t5": {"kv_heads": 8}, "query_heads.t5": 16}
    (tmp_path / "sweep.json").write_text(json.dumps(settings))
    grouped = scores.read(tmp_path / "results.json")
    assert [grouped.model(method, K) for method, K in (("none", 8), ("mean", 16))] == ["GQA-8", "MHA"]
    assert "| GQA-8 | 5% | 2 |" in figures.table_1(grouped, {}) and "MHA" not in figures.table_1(grouped, {})[:400]
    other = Results("other", [score for score in grouped.scores])
    assert scores.share_heads([grouped, other])[1].model("none", 8) == "GQA-8"
    for figure in (pictures.methods(grouped, "loss"), pictures.quality_against_alpha(grouped, "loss")):
        texts = [
            text.get_text() for axis in figure.axes[:2] for text in (axis.title, axis.xaxis.label, axis.yaxis.label)
        ]
        assert any("GQA-8" in text for text in texts) and not any("MHA" in text for text in texts)


def test_models_from_scratch_beside_conversions(sweep):
    scratch = [Score("t5", "scratch", K, 1.0, 1, {"loss": 2.0, "accuracy": 0.2}) for K in (8, 4, 2)]
    both = Results("x", [*sweep.scores, *scratch])
    assert both.alpha == 0.05
    table = figures.table_1(both, {})
    assert "| GQA-4, scratch | 100% | one seed |" in table and "| GQA-2, mean | 5% | 2 |" in table
    drawn = {name: results for name, _, results in figures._of_a_teacher(both)}
    assert set(drawn) == {"fig4", "fig5", "heads"}
    assert drawn["fig4"].scores == drawn["fig5"].scores == sweep.scores and drawn["heads"] is both
    ten = [score._replace(alpha=0.1 if score.alpha else 0.0) for score in sweep.scores if score.alpha in (0, 0.05)]
    assert "| GQA-2, mean | 10% | 2 |" in figures.table_1(Results("x", [*ten, *scratch]), {})


def test_times_are_of_the_same_number_of_heads(sweep, folder, tmp_path, monkeypatch):
    """Of a timing without the teacher's own, and of one that has no model of the sweep yet."""
    for heads, row in (((1, 2, 4), "| MHA | 5% | 2 |  |"), ((16,), "| MHA | 5% | 2 |  |")):
        rows = [row | {"kv_heads": K} for K, row in zip(heads, TIMING["rows"], strict=False)]
        timing = TIMING | {"config": TIMING["config"] | {"kv_heads": list(heads)}, "rows": rows}
        assert row in figures.table_1(sweep, figures.sample_times({"t5": timing}))
        (folder / "timing" / "t5" / "timing.json").write_text(json.dumps(timing))
        output = tmp_path / f"of_{len(heads)}"
        run_figures(monkeypatch, f"--runs={folder}", f"--output={output}")
        assert (output / "fig3_groups.png").exists() == (16 not in heads)


def test_results_of_the_folder_one_is_in(folder, monkeypatch):
    """They are named by it, and pictures may be put beside them."""
    monkeypatch.chdir(folder / "groups")
    run_figures(monkeypatch, "--runs=.", "--output=.")
    assert {"fig4_groups.png", "table1_groups.md"} < {path.name for path in (folder / "groups").iterdir()}


def test_a_run_that_diverged(sweep):
    worse = [score._replace(values={"loss": np.inf, "accuracy": 0.0}) for score in sweep.scores if score.kv_heads == 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "inf ± nan" in figures.table_1(Results("x", [*sweep.scores, *worse]), {})


def test_quality_against_groups(sweep):
    axis = pictures.quality_against_groups(sweep, "loss").axes[-1]
    assert axis.get_title() == "α = 5%"
    np.testing.assert_allclose(drawn(axis)["mean"], [(K, *of("mean", K, 0.05)) for K in (1, 2, 4)], atol=1e-9)
    teacher = next(line for line in axis.lines if line.get_label() == "MHA, α = 5%")
    assert teacher.get_ydata()[0] == pytest.approx(1.91)


def test_time_against_groups_and_the_byte_model():
    axis = pictures.time_against_groups(TIMING).axes[0]
    (measured,) = drawn(axis).values()
    np.testing.assert_allclose([point[:2] for point in measured], list(SECONDS.items()))
    assert [2 * point[2] for point in measured] == pytest.approx([0.4 * time for time in SECONDS.values()])
    # At K = 8: 0.04 s for 4 samples, and 10 steps of 8 + 8 + 32 MB for 4 samples at 2 GB/s.
    top = max(point[1] for area in axis.collections[:4] for path in area.get_paths() for point in path.vertices)
    assert top == pytest.approx(0.01 + 10 * 48e6 / 4 / 2e9)
    # A step that is faster than a copy says that a copy's time is no bound.
    rows = [row | {"gb_per_second": 2.1 if row["kv_heads"] == 4 else 1.5} for row in TIMING["rows"]]
    (faster,) = pictures.time_against_groups(TIMING | {"rows": rows}).axes
    assert "faster than a copy's 2 GB/s" in faster.get_title() and "copy" not in axis.get_title()
    areas = [[name for name in panel.get_legend_handles_labels()[1] if "copy" in name] for panel in (axis, faster)]
    assert len(areas[0]) == 3 and not areas[1]
    xxl = pictures.time_against_groups(TIMING | {"config": TIMING["config"] | {"size": "t5_1_1_xxl"}})
    stars = next(line for line in xxl.axes[0].lines if "the paper" in str(line.get_label()))
    assert dict(zip(stars.get_xdata(), stars.get_ydata(), strict=True)) == {64: 1.51, 8: 0.28, 1: 0.24}


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}])
def test_the_title_says_which_model_it_is(changes):
    config = TIMING["config"] | {"size": "t5_1_1_xxl", "changes": changes}
    axis = pictures.time_against_groups(TIMING | {"config": config}, "mine").axes[0]
    # One size may be in two folders.
    assert axis.get_title().startswith("mine (t5_1_1_xxl, changed): " if changes else "mine (t5_1_1_xxl): ")
    assert scores.size_name(config, "t5_1_1_xxl").startswith("t5_1_1_xxl" + " (t5_1_1_xxl, changed)" * bool(changes))
    # The paper's times are of its own shapes.
    assert any("the paper" in str(line.get_label()) for line in axis.lines) == (not changes)
    # The names of the marks end inside the frame.
    figure = axis.figure
    figure.draw_without_rendering()
    frame = axis.get_window_extent()
    names = [text.get_window_extent() for text in axis.texts]
    assert all(name.x1 < frame.x1 and name.y1 < frame.y1 for name in names)


def test_bars_on_a_logarithmic_axis_end_at_the_least_seed():
    losses = {0.0: [3.0, 3.2], 0.02: [0.01, 0.5], 0.05: [0.2, 0.21]}
    found = [Score("t", "mean", 2, alpha, 1, {"loss": loss}) for alpha, both in losses.items() for loss in both]
    figure = pictures.quality_against_alpha(Results("x", found), "loss")
    (container,) = figure.axes[0].containers
    lowest = [segment[:, 1].min() for segment in container.lines[2][0].get_segments()]
    np.testing.assert_allclose(lowest, [3.1 - np.sqrt(0.02), 0.01, 0.205 - 0.01 / np.sqrt(2)])
    note = "lower bars to the least seed where the deviation reaches 0"
    assert note in figure.get_suptitle()
    assert note in pictures.quality_against_groups(Results("x", found), "loss").get_suptitle()
    assert note in pictures.methods(Results("x", found), "loss").get_suptitle()
    none = [score for score in found if score.alpha != 0.02]
    figure = pictures.quality_against_alpha(Results("x", [*none, none[-1]._replace(values={"loss": 0.001})]), "loss")
    assert figure.axes[0].get_yscale() == "log" and note not in figure.get_suptitle()


def test_table_1(sweep):
    lines = figures.table_1(sweep, figures.sample_times({"t5": TIMING})).splitlines()
    assert lines[0] == "| model | α | seeds | time per sample, s | loss | accuracy |"
    assert "| MHA | 0% | one seed | 0.8000 | 2.000 | 0.200 |" in lines
    assert "| MHA | 5% | 2 | 0.8000 | 1.910 ± 0.014 | 0.191 ± 0.001 |" in lines
    assert "| MQA, mean | 5% | 2 | 0.1000 | 2.600 ± 0.283 | 0.260 ± 0.028 |" in lines
    assert "| GQA-8-XXL | 0.28 | 47.1 | 43.5 | 45.4 | 47.7 | 36.3 | 47.2 | 28.4 | 81.6 |" in lines
    assert not any("2.600" in line and "2%" in line for line in lines)  # α = 2 % is no row
    assert any(line.startswith("Mean and standard deviation over seeds, of one seed its own number.") for line in lines)
    single = Results("x", [score for score in sweep.scores if score.seed == 1])
    assert any(line.startswith("One seed. ") for line in figures.table_1(single, {}).splitlines())


def wave(spikes=()):
    """A falling loss with noise that is no spike, and jumps at `spikes`."""
    losses = 3 - 0.01 * np.arange(60) + 0.03 * np.tile([1, -1, 0], 20)
    losses[list(spikes)] += 1.0
    return losses


def test_spikes_are_what_jumps_up():
    assert stability.spikes(wave()).tolist() == []
    assert stability.spikes(wave([20, 41])).tolist() == [20, 41]
    diverged = wave()
    diverged[-2:] = np.nan
    assert stability.spikes(diverged).tolist() == [58, 59]
    assert stability.spikes(np.array([1.0, np.nan])).tolist() == [1]


def write_run(folder, losses, heldout, result=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 10 * i, "split": "train", "loss": float(loss)} for i, loss in enumerate(losses)]
    lines.append({"step": 10 * len(losses), "split": "heldout", "loss": heldout})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result:
        (folder / "result.json").write_text(json.dumps(result))


def test_labels_of_a_task_s_scores():
    assert scores.label("docstring rouge1") == "docstring ROUGE-1"
    assert scores.label("docstring loss") == "docstring, held-out loss, nats a token (lower is better)"


def test_stability_of_runs_and_of_a_sweep(tmp_path):
    tmp_path = tmp_path / "checkpoints"  # what is in a folder of that name inside is no run; the folder itself may be
    write_run(tmp_path / "mqa_scratch-s1" / "checkpoints" / "x-s1", wave(), 2.0)
    write_run(tmp_path / "mqa_scratch-s2" / "checkpoints" / "x-s2", wave(), 2.0)
    write_run(tmp_path / "mqa_scratch-s1", wave([20, 41]), 2.9)
    write_run(tmp_path / "mqa_scratch-s2", wave(), 2.5)
    write_run(tmp_path / "alone-s1", wave(), 2.0)  # one seed has no spread
    for seed in (1, 2):
        for method, K, alpha in (("mean", 2, 0.05), ("mean", 2, 0.02), ("first", 2, 0.05), ("scratch", 8, 1.0)):
            result = {"teacher": "t5", "method": method, "kv_heads": K, "alpha": alpha}
            folder = tmp_path / "sweep" / f"t5-{method}-k{K}-a{alpha:g}-s{seed}"
            write_run(folder, wave([30]) if seed == 1 or method != "mean" else wave()[:5], 2.0 + seed / 10, result)
        result = {"teacher": "t5", "method": "none", "kv_heads": 8, "alpha": 0.05}
        write_run(tmp_path / "sweep" / f"t5-none-k8-a0.05-s{seed}", wave()[: stability.WINDOW], 2.0, result)
        small = result | {"teacher": "small", "alpha": 0.1}  # another teacher has a share and a picture of its own
        write_run(tmp_path / "sweep" / f"small-none-k8-a0.1-s{seed}", wave(), 2.0, small)
    write_run(tmp_path / "again" / "alone-s1", wave(), 2.0)  # the same run
    curves = stability.read([tmp_path], {"t5": 8})
    assert {name: [(curve.model, curve.seed) for curve in each] for name, each in curves.items()} == {
        "runs": [("mqa_scratch", 1), ("mqa_scratch", 2)],
        "small": [("MHA, uptrained", 1), ("MHA, uptrained", 2)],
        "t5": [
            (model, seed) for model in ("MHA, from scratch", "MHA, uptrained", "GQA-2, uptrained") for seed in (1, 2)
        ],
    }
    unknown = stability.read([tmp_path])["t5"]
    assert {curve.model for curve in unknown} > {"GQA-8, from scratch", "MHA, uptrained"}
    trained, spikes, heldout = pictures.stability(curves["runs"], "runs").axes
    np.testing.assert_allclose(drawn(spikes, "x")["mqa_scratch"], [(1.0, 0, np.sqrt(2))])
    np.testing.assert_allclose(drawn(heldout, "x")["mqa_scratch"], [(2.7, 0, 0.4 / np.sqrt(2))])
    scratch, uptrained, spikes, heldout = pictures.stability(curves["t5"], "t5").axes
    found = drawn(spikes, "x")
    # Eleven lines have none before them that say what is usual: no mark, not one at 0; a model's other runs count.
    assert "MHA, uptrained" not in found and found["GQA-2, uptrained"] == [(1.0, 2.0, 0.0)]
    assert [(text.get_text(), text.get_position()[1]) for text in spikes.texts] == [("too few lines", 1)]
    np.testing.assert_allclose(drawn(heldout, "x")["GQA-2, uptrained"], [(2.15, 2, 0.1 / np.sqrt(2))])
    marked = [
        [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "x"]
        for axis in (trained, scratch, uptrained)
    ]
    assert marked == [[[200, 410], []], [[300], [300]], [[], [], [300], []]]
    # Uptraining's few steps have an axis of their own.
    write_run(tmp_path / "sweep" / "t5-mean-k2-a0.05-s1", wave()[:5], 2.1, result | {"method": "mean", "kv_heads": 2})
    short = pictures.stability(stability.read([tmp_path], {"t5": 8})["t5"], "t5").axes[1]
    assert short.get_xlim()[1] < 120 and "spike" not in short.get_title() and "spike" in trained.get_title()


def test_results_of_every_experiment_are_read(tmp_path):
    committed = figures.RESULTS
    uptrained = scores.read(committed / "uptrain_full" / "results.json")
    raw = json.loads((committed / "uptrain_full" / "results.json").read_text())
    cells = uptrained.cells("loss")
    row = next(row for row in raw["rows"] if row["model"] == "GQA-2" and row["uptrained"])
    assert scores.mean_and_spread(cells["mean", 2, 0.05]) == pytest.approx((row["loss_mean"], row["loss_spread"]))
    assert cells["none", 8, 0.0].tolist() == [raw["teacher_loss"]]
    conversions = scores.read(committed / "conversion_methods" / "t5.json")
    assert conversions.name == "conversion_methods_t5" and conversions.alpha == 0.05
    raw = json.loads((committed / "conversion_methods" / "t5.json").read_text())
    runs = [run for run in raw["runs"] if (run["method"], run["kv_heads"]) == ("svd+group", 2)]
    assert conversions.cells("loss")["svd+group", 2, 0.0].tolist() == [run["loss"] for run in runs]
    assert scores.read(committed / "train_step" / "mini_t5.json") is None
    values = of_sweep(RUNS[0] | {"target_tokens": 5, "commands": ["x"], "docstring R1": 20})
    assert values == Score("t5", "none", 8, 0.0, 1, {"loss": 2.0, "accuracy": 0.2, "docstring R1": 20.0})


def run_figures(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["figures", *map(str, arguments)])
    figures.main()


@pytest.fixture
def folder(tmp_path):
    for name, content in (("groups/results.json", {"runs": RUNS}), ("timing/t5/timing.json", TIMING)):
        (tmp_path / "runs" / name).parent.mkdir(parents=True)
        (tmp_path / "runs" / name).write_text(json.dumps(content))
    return tmp_path / "runs"


def test_command(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures"
    run_figures(monkeypatch, f"--runs={folder}", f"--output={output}", "--redraw")
    names = ["fig3_groups", "fig4_groups", "fig5_groups", "heads_groups", "fig6_t5"]
    wanted = [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    assert sorted(path.name for path in output.iterdir()) == sorted([*wanted, "table1_groups.md"])
    assert (folder / "timing" / "t5" / "timing.png").read_bytes() == (output / "fig6_t5.png").read_bytes()
    assert "α = 5%, groups" in (output / "fig3_groups.svg").read_text()
    (left_out,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert (
        left_out.startswith("stability: left out, too few results for it: ") and "configs/sweeps/alpha.py" in left_out
    )


def test_quality_against_time_is_a_tasks_where_there_is_one(folder, tmp_path, monkeypatch):
    runs = [{**run, "docstring rouge1": 20 - run["loss"]} for run in RUNS]
    (folder / "groups" / "results.json").write_text(json.dumps({"runs": runs}))
    for arguments, label in (([], "docstring ROUGE-1"), (["--score=loss"], "held-out loss")):
        run_figures(monkeypatch, f"--runs={folder}", f"--output={tmp_path / label}", *arguments)
        drawn = {name: (tmp_path / label / f"{name}_groups.svg").read_text() for name in ("fig3", "heads")}
        assert label in drawn["fig3"] and "held-out loss" in drawn["heads"]


def test_what_is_committed_is_of_the_committed_results(tmp_path, monkeypatch):
    committed, output = figures.RESULTS / "figures", tmp_path / "figures"
    monkeypatch.setattr(pictures, "save", lambda figure, path: path.touch())  # what pictures show has tests of its own
    run_figures(monkeypatch, f"--output={output}")
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in committed.iterdir())
    for table in committed.glob("*.md"):
        assert (output / table.name).read_text() == table.read_text()


def test_bad_input(folder, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"--score=los is in no results; expected one of accuracy, loss; nearest: loss"
    ):
        run_figures(monkeypatch, f"--runs={folder}", f"--output={tmp_path / 'out'}", "--score=los")
    with pytest.raises(InputError, match=r"is no folder"):
        run_figures(monkeypatch, f"--runs={folder / 'nothing'}", f"--output={tmp_path / 'out'}")
    for content, message in (("", "is not readable JSON"), ("{}", "is no result of experiments.timing")):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "timing.json").write_text(content)
        with pytest.raises(InputError, match=message):
            run_figures(monkeypatch, f"--runs={tmp_path / 'damaged'}", f"--output={tmp_path / 'out'}")
    (tmp_path / "more" / "groups").mkdir(parents=True)
    os.link(folder / "groups" / "results.json", tmp_path / "more" / "groups" / "results.json")
    with pytest.raises(InputError, match="two results are named groups"):
        run_figures(monkeypatch, f"--runs={folder}", f"--runs={tmp_path / 'more'}", f"--output={tmp_path / 'out'}")
    (tmp_path / "more" / "t5").mkdir()
    os.link(folder / "timing" / "t5" / "timing.json", tmp_path / "more" / "t5" / "timing.json")
    (tmp_path / "more" / "groups" / "results.json").unlink()
    with pytest.raises(InputError, match="two timings are named t5"):
        run_figures(monkeypatch, f"--runs={folder}", f"--runs={tmp_path / 'more'}", f"--output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_stand_beside_each_other(tmp_path):
    """Not another seed, and not scored on the same text."""
    path = tmp_path / "results.json"
    for runs, message in (
        ([RUNS[0], RUNS[0] | {"loss": 9.0}], "2 results of one run .*seed="),
        ([RUNS[0] | {"target_tokens": 7}, RUNS[1] | {"target_tokens": 9}], "are scored on 7, 9 tokens; expected one"),
    ):
        path.write_text(json.dumps({"runs": runs}))
        with pytest.raises(InputError, match=message):
            scores.read(path)


@pytest.mark.parametrize(
    ("name", "content", "experiment"),
    [
        ("results.json", {"runs": [{"teacher": "x"}]}, "sweep"),
        ("results.json", {"runs": [RUNS[0] | {"alpha": None}]}, "sweep"),
        ("results.json", {"runs": [{"sites": "a"}]}, "conversion_methods"),
        ("results.json", {"rows": [{"loss_mean": 1}]}, "uptrain_full"),
        ("results.json", {"rows": [{"loss_mean": 1, "model": "Foo", "uptrained": False}]}, "uptrain_full"),
        ("timing.json", {name: value for name, value in TIMING.items() if name != "config"}, "timing"),
        ("timing.json", TIMING | {"rows": []}, "timing"),
        ("timing.json", TIMING | {"copy_gb_per_second": 0.0}, "timing"),
        ("throughput.json", {}, "throughput"),
        ("throughput.json", {"rows": [{}], "memory_bytes": 1}, "throughput"),
        ("conversion_methods/x.json", {}, "conversion_methods"),
        ("quickstart/report.json", {}, "report"),
        ("posttraining/report.json", {}, "posttraining"),
        ("a-s1/result.json", {}, "sweep"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, monkeypatch, name, content, experiment):
    write_run(tmp_path / "a-s1", [2.0], 2.0)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=rf"{path.name} is no result of experiments\.{experiment}; expected one"
    ) as error:
        run_figures(monkeypatch, f"--runs={tmp_path}", f"--output={tmp_path / 'out'}", "--redraw")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", [{"step": 1, "split": "train"}, {"step": 1, "loss": 2.0}, 5])
def test_metrics_of_another_program_are_named(tmp_path, line):
    (tmp_path / "a-s1").mkdir()
    (tmp_path / "a-s1" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is no result of gqa\.train; expected one"):
        stability.read([tmp_path])
