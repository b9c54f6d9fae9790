"""Tables and a picture of the runs of `experiments.conversion_methods`."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from gqa import files


def report(results: dict[str, Any], folder: Path, name: str) -> str:
    """Writes NAME.md and NAME.png into `folder`; gives the text."""
    teacher = next(run["loss"] for run in results["runs"] if run["method"] == "teacher" and run["alpha"] == 0)
    cells = defaultdict(list)
    for run in results["runs"]:
        cells[run["sites"], run["alpha"], run["kv_heads"], run["method"]].append(run["loss"])
    description = results["teacher"]
    lines = [
        f"Teacher: {teacher:.4f} nats a token over {description['heldout']['target_tokens']:,} held-out tokens.",
        "Without its "
        + "; without its ".join(
            f"{site} attention {cost:+.2f}, directions that hold 99 % of its keys / values, by layer: "
            + ", ".join(f"{k} / {v}" for k, v in description["directions_of_99_percent"][site])
            for site, cost in description["cost_without"].items()
        )
        + ".",
    ]
    for sites in dict.fromkeys(key[0] for key in cells):
        for alpha in sorted({key[1] for key in cells if key[0] == sites}):
            lines += ["", *_table(cells, teacher, sites, alpha)]
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    made = dict.fromkeys((run["commit"], run["cpu"]) for run in results["runs"] if "commit" in run)
    origins = "; ".join(f"commit {commit} on {cpu}" for commit, cpu in made)
    files.write_text(folder / f"{name}.md", text + f"\n\n`{results['command']}`; {origins}.\n")
    draw(results, folder / f"{name}.png")
    return text


def _table(cells: dict, teacher: float, sites: str, alpha: float) -> list[str]:
    kv_heads = sorted({key[2] for key in cells if key[:2] == (sites, alpha) and key[3] != "teacher"}, reverse=True)
    methods = list(dict.fromkeys(key[3] for key in cells if key[:2] == (sites, alpha) and key[3] != "teacher"))
    control = cells.get((sites, alpha, max((key[2] for key in cells), default=0), "teacher"))
    reference = float(np.mean(control)) if control else teacher
    beside = "control" if control else "the teacher as it is"
    heading = f"{sites.replace('+', ' and ')}, α = {alpha:.0%}" + (f" ({beside} {reference:.4f})" if alpha else "")
    lines = [f"**{heading}**", "", "| method | " + " | ".join(f"K = {K} | gap closed" for K in kv_heads) + " |"]
    lines += ["|---|" + "--:|--:|" * len(kv_heads)]
    for method in methods:
        row = []
        for K in kv_heads:
            losses, pooled = (cells.get((sites, alpha, K, name)) for name in (method, "mean"))
            if not losses:
                row += ["", ""]
                continue
            loss = np.mean(losses)
            spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
            gap = np.mean(pooled) - reference if pooled else 0.0
            closed = "" if method == "mean" or gap < 0.01 else f"{(gap + reference - loss) / gap:.0%}"
            row += [f"{loss:.4f}{spread}", closed]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """The losses of conversions at all sites against their key/value heads."""
    from experiments import pictures, scores

    found = scores.Results(path.stem, scores.of_conversions(results, path.stem))
    pictures.save(pictures.quality_against_groups(found, "loss"), path)
