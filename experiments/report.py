"""python -m experiments.report --runs=runs/quickstart --output=runs/quickstart/report

The quickstart's report: held-out loss and decoding time of the teacher, of its GQA-2 and MQA conversions (mean pooled,
and by a calibrated method) and of the uptrained GQA-2, measured now, beside the committed results of α = 5 % uptraining
(`make uptrain-full`). Writes report.md, report.json and quality_vs_latency.png into the output folder and prints the
table.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from gqa import command_line
from gqa.errors import InputError

COMMITTED = Path(__file__).parent / "results" / "uptrain_full" / "results.json"
TEACHER = Path("assets/teacher")

# Long inputs and a batch: what decoding reads is then mostly the key/value cache, as in the paper's measurements.
TIMING = dict(batch_size=32, inputs_length=512, num_tokens=32, repetitions=5)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        type=Path,
        required=True,
        help="folder with gqa2/, mqa/, gqa2_best/, mqa_best/ and the uptraining run uptrain/",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the report; must not exist")
    parser.add_argument(
        "--teacher", type=Path, default=TEACHER, help=f"the unconverted checkpoint (default: {TEACHER})"
    )
    arguments = command_line.parse_arguments(parser)
    folders = {
        "MHA": arguments.teacher,
        "GQA-2 converted": arguments.runs / "gqa2",
        "GQA-2 uptrained": arguments.runs / "uptrain" / "model",
        "MQA converted": arguments.runs / "mqa",
        "GQA-2 best conversion": arguments.runs / "gqa2_best",
        "MQA best conversion": arguments.runs / "mqa_best",
    }
    for path in folders.values():
        if not path.is_dir():
            raise InputError(f"{path} is missing; expected the folders of make quickstart in {arguments.runs}")
    if arguments.output.exists():
        raise InputError(f"--output={arguments.output} exists already; name a new folder")

    from gqa.checkpoints import hf_config

    run = hf_config.read_json(arguments.runs / "uptrain" / "config.json")
    report = measure(folders, run)
    unfinished = arguments.output.with_name(f".{arguments.output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    (unfinished / "report.md").write_text(text)
    draw(report, unfinished / "quality_vs_latency.png")
    unfinished.rename(arguments.output)
    print(f"\n{text}\nWritten to {arguments.output}: report.md, report.json, quality_vs_latency.png")


def measure(folders: dict[str, Path], run: dict) -> dict:
    """Everything in the report; `run` is the configuration of the uptraining run."""
    from experiments.measure import commit, decode_times, machine
    from gqa import checkpoints, sharding
    from gqa.data import loader
    from gqa.models.t5 import T5Config
    from gqa.training import config as run_config
    from gqa.training import loop

    config = run_config.parse(run)
    teacher = folders["MHA"]
    if not isinstance(checkpoints.read_config(teacher, **config.model.run_choices()), T5Config):
        raise InputError(f"--teacher={teacher} is a decoder; expected the encoder-decoder of make quickstart")
    mesh = sharding.make_mesh(config.mesh)
    batches = loader.heldout_batches(config.prepared_records(), config.train.batch_size, config.train.eval_examples)
    models = {name: checkpoints.load(path, **config.model.run_choices()) for name, path in folders.items()}
    rows = []
    # Decoding time depends on shapes alone, so a conversion before and after uptraining shares one measurement.
    times = decode_times({name: models[name] for name in ("MHA", "GQA-2 converted", "MQA converted")}, **TIMING)
    times["GQA-2 uptrained"] = times["GQA-2 best conversion"] = times["GQA-2 converted"]
    times["MQA best conversion"] = times["MQA converted"]
    for name, model in models.items():
        scores = loop.heldout_metrics(model, batches, mesh, show_progress=True)
        sites = {site: model.config.kv_heads(site) for site in ("encoder_self", "decoder_self", "cross")}
        rows.append({"model": name, "kv_heads": sites, **scores, "decode": times[name]})
    return {
        "measured": {
            "rows": rows,
            "alpha": config.uptrain.alpha,
            "uptraining_steps": config.steps,
            "original_steps": config.uptrain.original_steps,
            "timing": TIMING,
            "unigram_loss": batches.manifest.unigram_cross_entropy,
            "source": config.data.source,
            "corpus_digests": batches.manifest.corpus_digests,
            "machine": machine(),
            "commit": commit(),
            "command": " ".join(["python -m experiments.report", *sys.argv[1:]]),
        },
        "committed": json.loads(COMMITTED.read_text()) if COMMITTED.exists() else None,
    }


def as_markdown(report: dict) -> str:
    """The report as tables."""
    measured, committed = report["measured"], report["committed"]
    rows, timing = measured["rows"], measured["timing"]
    base = rows[0]
    lines = [
        "# From multi-head to grouped-query attention",
        "",
        "## Measured just now",
        "",
        "| model | K decoder, cross | held-out loss, nats | to the teacher | decoding step, ms | against MHA |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        heads = ", ".join(str(row["kv_heads"][site][0]) for site in ("decoder_self", "cross"))
        speedup = base["decode"]["median_ms"] / row["decode"]["median_ms"]
        lines.append(
            f"| {row['model']} | {heads} | {row['loss']:.3f} | {row['loss'] - base['loss']:+.3f} "
            f"| {row['decode']['median_ms']:.1f} | {speedup:.2f}x |"
        )
    lines += [
        "",
        f"Loss over {base['target_tokens']:,} held-out target tokens of `{measured['source']}` "
        f"(digest {measured['corpus_digests']['heldout']}; the unigram model has {measured['unigram_loss']:.3f}). "
        f"Uptraining: {measured['uptraining_steps']} of {measured['original_steps']} steps, "
        f"α = {measured['alpha']:.1%}; the best conversions are not uptrained (`docs/conversion.md`). "
        f"Decoding: batch {timing['batch_size']}, input {timing['inputs_length']}, {timing['num_tokens']} tokens, "
        f"float32, median of {timing['repetitions']}, on {measured['machine']['cores']} cores "
        f"({measured['machine']['cpu']}).",
    ]
    if committed:
        lines += ["", f"## Committed: α = {committed['alpha']:.0%}, {committed['num_seeds']} seeds", ""]
        lines += [*committed["table"], "", f"From `{committed['command']}`, commit {committed['commit']}."]
    return "\n".join(lines) + "\n"


def draw(report: dict, path: Path) -> None:
    """Quality against latency: what was measured now, and the committed α = 5 % results as hollow marks."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = {row["model"]: row for row in report["measured"]["rows"]}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    marks = {"MHA": "s", "GQA-2 converted": "v", "GQA-2 uptrained": "o", "MQA converted": "^"}
    marks |= {"GQA-2 best conversion": "*", "MQA best conversion": "P"}
    for name, row in rows.items():
        point = (row["decode"]["median_ms"], row["loss"])
        axes.plot(*point, marks[name], color="black", markersize=8, label=f"{name} (now)")
        # Names of points near the teacher's loss would cover each other.
        offset = {"GQA-2 best conversion": (8, -12), "MQA best conversion": (8, -26)}.get(name, (8, 4))
        axes.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=9)
    before, after = rows["GQA-2 converted"], rows["GQA-2 uptrained"]
    axes.annotate(
        "",
        xy=(after["decode"]["median_ms"], after["loss"]),
        xytext=(before["decode"]["median_ms"], before["loss"]),
        arrowprops={"arrowstyle": "->", "color": "grey"},
    )
    committed = report["committed"]
    if committed:
        timed = {"MHA": "MHA", "GQA-2": "GQA-2 converted", "MQA": "MQA converted"}
        label = f"uptrained, α = {committed['alpha']:.0%}, {committed['num_seeds']} seeds (committed)"
        for row in committed["rows"]:
            if row["uptrained"]:
                # Scored on more held-out text than what is scored now: drawn at the distance to the teacher there.
                loss = rows["MHA"]["loss"] + row["loss_mean"] - committed["teacher_loss"]
                axes.errorbar(
                    rows[timed[row["model"]]]["decode"]["median_ms"],
                    loss,
                    yerr=row["loss_spread"],
                    fmt="D",
                    color="tab:blue",
                    markerfacecolor="none",
                    markersize=8,
                    label=label,
                )
                label = None
    axes.set_xlabel("time of a decoding step, ms (lower is better)")
    axes.set_ylabel("held-out loss, nats a token (lower is better)")
    axes.set_title("Quality against latency")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    command_line.run(main)
