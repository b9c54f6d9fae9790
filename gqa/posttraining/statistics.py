"""What more samples are worth: the best and the median score of n samples, by temperature (Llama 2 figures 7 and 8)."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CURVES = ("max", "median")
Curves = Mapping[float, Mapping[str, list[float]]]  # temperature -> {"max": [...], "median": [...]} for n = 1, 2, …


def curves(scores_PN: np.ndarray) -> dict[str, list[float]]:
    """The expected maximum and median of n of the N scores of a prompt, mean over prompts, for n = 1 … N.

    The expectation is over all subsets of n, exact: no curve depends on the order of the samples.
    """
    N = scores_PN.shape[1]
    mean_N = np.sort(scores_PN.astype(np.float64), axis=1).mean(axis=0)  # the k-th least score
    found = {name: [] for name in CURVES}
    for n in range(1, N + 1):
        middle = [_rank(N, n, (n - 1) // 2) @ mean_N, _rank(N, n, n // 2) @ mean_N]
        found["max"].append(float(_rank(N, n, n - 1) @ mean_N))
        found["median"].append(float(np.mean(middle)))
    return found


def _rank(N: int, n: int, below: int) -> np.ndarray:
    """How probable each of N values, in order, is to be the one of a subset of n with `below` others under it."""
    ways = [math.comb(k, below) * math.comb(N - 1 - k, n - 1 - below) for k in range(N)]
    return np.array([way / math.comb(N, n) for way in ways])


def table(by_temperature: Curves) -> str:
    """The curves in Markdown, at 1, 2, 4, … samples and all of them; the best temperature of each row in bold."""
    N = len(next(iter(by_temperature.values()))["max"])
    shown = sorted({2**k for k in range(N.bit_length())} | {N})
    lines = ["| samples | " + " | ".join(f"{name}, T = {t:g}" for name in CURVES for t in by_temperature) + " |"]
    lines.append("|--:|" + "--:|" * (len(CURVES) * len(by_temperature)))
    for n in shown:
        cells = [f"{n}"]
        for name in CURVES:
            values = [curve[name][n - 1] for curve in by_temperature.values()]
            cells += [f"**{value:.3f}**" if value == max(values) else f"{value:.3f}" for value in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(by_temperature: Curves, path: Path) -> None:
    """The picture: one line a temperature, the maximum on the left and the median on the right."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for axes, name in zip(both, CURVES, strict=True):
        for number, (temperature, curve) in enumerate(by_temperature.items()):
            color = plt.get_cmap("viridis")(number / max(len(by_temperature) - 1, 1) * 0.85)
            axes.plot(range(1, len(curve[name]) + 1), curve[name], color=color, label=f"T = {temperature:g}")
        axes.set_xlabel("samples a prompt")
        axes.set_title({"max": "best score", "median": "median score"}[name], fontsize=10)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("score, mean over prompts")
    both[0].legend(loc="lower right")
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
