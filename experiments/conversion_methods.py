"""python -m experiments.conversion_methods --teacher=t5 [--alphas=0,0.01,0.05] [--seeds=3] [--workdir=DIR]

What each conversion keeps: all methods at 2:1, 4:1 and MQA, without uptraining and after it, on a shipped teacher.
Without uptraining a seed draws the calibration text; after it, also the order of the data. The learning rate of each
method is the best on a split of its own (the first half of the held-out rows; losses are of the second), with one seed
at 4:1 and α = 5 %: from the schedule's own up or down until the next is worse. The unconverted teacher is uptrained the
same way. A run that ends at a larger share passes the smaller ones: schedules of uptraining do not know where they end.

Each finished run is one JSON file in the working folder: started again, the command goes on. Tables, a picture and all
runs go to --results (experiments/results/conversion_methods/), after every uptrained run and in the end. What that
folder holds of the same teacher on the same held-out rows is not run again, and stays there whatever this command runs.
Each run says the processor and the commit that made it.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gqa import command_line
from gqa.errors import InputError

RESULTS = Path(__file__).parent / "results" / "conversion_methods"
TEACHERS = {
    "t5": (Path("assets/teacher"), Path("configs/uptrain_t5_teacher.py"), ("decoder_self", "cross")),
    "t5_annealed": (
        Path("assets/teacher_annealed"),
        Path("configs/uptrain_t5_annealed.py"),
        ("decoder_self", "cross"),
    ),
    "llama": (Path("assets/teacher_llama"), Path("configs/uptrain_llama_teacher.py"), ("decoder_self",)),
}
METHODS = (
    "mean",
    "first",
    "random",
    "mean+renorm",
    "mean+refit",
    "procrustes",
    "procrustes+renorm",
    "procrustes+renorm+refit",
    "svd without text",
    "svd",
    "svd+refit",
    "svd+group",
    "svd+group+refit",
    "svd+group+tune+refit",
)
APART = (
    "mean",
    "mean+refit",
    "svd",
    "svd+group+refit",
    "svd+group+tune+refit",
)  # also at self- and at cross-attention alone
UPTRAINED = ("mean", "svd+group+tune+refit")  # unless told otherwise
DETERMINISTIC = ("mean", "first", "svd without text")  # one run whatever the number of seeds
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # multiples of the schedule's learning rate
CALIBRATION_ROWS, BATCH = 256, 32
COMPARED = 0.05  # the share of pre-training at which GQA compares methods (fig. 4)


class Run(NamedTuple):
    """One cell of the tables; `method` "teacher" is the control."""

    sites: str  # decoder_self+cross …
    method: str
    kv_heads: int
    alpha: float
    seed: int
    rate: float  # multiple of the learning rate; 0 without uptraining

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.sites}-{self.method}-k{self.kv_heads}-a{self.alpha:g}-s{self.seed}-r{self.rate:g}".replace(
            " ", "_"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, choices=TEACHERS, help="which shipped teacher")
    parser.add_argument("--methods", default=",".join(METHODS), help="those without uptraining (default: all)")
    parser.add_argument(
        "--uptrained", default=",".join(UPTRAINED), help=f"those that are uptrained (default: {','.join(UPTRAINED)})"
    )
    parser.add_argument("--alphas", default="0,0.01,0.05", help="shares of the pre-training (default: 0,0.01,0.05)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (default: 3)")
    parser.add_argument("--rows", type=int, default=2048, help="held-out rows, half of them for tuning (default: 2048)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/conversion_methods"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tables and pictures")
    arguments = command_line.parse_arguments(parser)
    alphas = sorted({_alpha(text) for text in arguments.alphas.split(",")})
    methods, uptrained = (_methods(arguments, name) for name in ("methods", "uptrained"))
    if arguments.seeds < 1 or arguments.rows < 2 * BATCH:
        raise InputError(f"--seeds={arguments.seeds} --rows={arguments.rows}; expected at least 1 and {2 * BATCH}")
    teacher, config, sites = TEACHERS[arguments.teacher]
    for path in (teacher, config):
        if not path.exists():
            raise InputError(f"{path} is missing; run from the root of the repository")
    from gqa.training.memory import keep_freed_memory

    keep_freed_memory()
    from experiments.conversion_report import report
    from experiments.measure import commit, machine, write_json

    path = arguments.results / f"{arguments.teacher}.json"
    earlier = _earlier(path, arguments.rows)
    # Runs on other rows are other runs.
    workdir = arguments.workdir / f"{arguments.teacher}-{arguments.rows}"
    bench = Bench(teacher, config, sites, arguments.rows, workdir)
    results = {
        "command": " ".join(["python -m experiments.conversion_methods", *sys.argv[1:]]),
        "machine": machine(),
        "commit": commit(),
        "teacher": bench.describe(),
        "tuning": bench.tuning,
        "runs": [],
    }
    if earlier:
        bench.know(earlier, path, results["teacher"])
    done = []

    def write() -> str:
        names = {_run_of(run) for run in done}
        rates = {(run["method"], run["alpha"]): run["rate"] for run in done}  # a method has one
        results["runs"] = done + [
            run
            for run in (earlier["runs"] if earlier else [])
            if _run_of(run) not in names and rates.get((run["method"], run["alpha"]), run["rate"]) == run["rate"]
        ]
        results["tuning"] = (earlier["tuning"] if earlier else {}) | bench.tuning
        write_json(path, results)
        return report(results, arguments.results, arguments.teacher)

    for run in bench.all(methods, uptrained, alphas, arguments.seeds):
        done.append(run)
        if run["alpha"] > 0:
            write()
    print(write())


def _tuned_at(alphas: Iterable[float]) -> float:
    """The share at which rates are chosen, for all: the paper's 5 %, else the next smaller, else the next larger."""
    shares = sorted(alpha for alpha in alphas if alpha > 0)
    return max((alpha for alpha in shares if alpha <= COMPARED), default=shares[0] if shares else 0.0)


def _run_of(row: Mapping[str, Any]) -> Run:
    return Run(*(row[name] for name in Run._fields))


def _earlier(path: Path, rows: int) -> dict[str, Any] | None:
    """The results that `path` holds; raises `InputError` where they are of other held-out rows."""
    from experiments.scores import reading
    from gqa.checkpoints import hf_config

    if not path.exists():
        return None
    earlier = hf_config.read_json(path)
    with reading(path, "experiments.conversion_methods"):
        found = earlier["teacher"]["rows"]
        _ = earlier["tuning"].items(), earlier["teacher"]["heldout"].items(), [_run_of(run) for run in earlier["runs"]]
    if found != rows:
        raise InputError(f"--rows={rows}: {path} holds runs on {found} rows; expected as many, or --results=DIR")
    return earlier


def _methods(arguments: argparse.Namespace, option: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(getattr(arguments, option).split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        raise InputError(f"--{option}: {unknown[0]!r} is unknown; expected of {', '.join(METHODS)}")
    return names


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1
    if not 0 <= alpha <= 1:
        raise InputError(f"--alphas: {text!r} is no share; expected numbers in 0..1, such as 0,0.05")
    return alpha


class Bench:
    """The teacher, its data, and runs that are done once."""

    def __init__(self, teacher: Path, config: Path, sites: tuple[str, ...], rows: int, workdir: Path):
        import jax

        from gqa import checkpoints, sharding
        from gqa.data import loader
        from gqa.training import config as run_config

        self._uptraining, self._sites, self._workdir, self._rows = config, sites, workdir, rows
        self.tuning: dict[str, dict[str, float]] = {}  # of each method the losses by the rates that were tried
        self._tried: tuple[float, dict[str, dict[str, float]]] = (0.0, {})  # in earlier results: the share, the same
        raw = command_line.load_config(config, [f"--config.model.checkpoint={teacher}"])
        self._raw, self._config = raw, run_config.parse(raw)
        self._mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
        self._records = self._config.prepared_records()
        self._heldout = loader.heldout_batches(self._records, BATCH, rows)
        self._teacher = checkpoints.load(teacher, mesh=self._mesh, **self._config.model.run_choices())
        self._num_heads = max(self._teacher.config.kv_heads(sites[0]))

    def know(self, earlier: Mapping, path: Path, description: Mapping) -> None:
        """Takes over the runs of earlier results in `path`; raises `InputError` where the teacher had other losses."""
        from experiments.measure import write_json

        of = [found["heldout"] for found in (earlier["teacher"], description)]
        if not all(np.isclose(of[0][name], of[1][name], rtol=1e-5) for name in of[1]):
            raise InputError(
                f"{path} is of another teacher or of other text: its loss is {of[0]['loss']:.4f}, this one's "
                f"{of[1]['loss']:.4f}; give another folder by --results=DIR"
            )
        for run in earlier["runs"]:
            own = self._path(_run_of(run))
            if not own.exists():
                write_json(own, run)
        self._tried = (_tuned_at({run["alpha"] for run in earlier["runs"]}), earlier["tuning"])

    def all(
        self, methods: tuple[str, ...], uptrained: tuple[str, ...], alphas: list[float], seeds: int
    ) -> Iterator[dict[str, Any]]:
        """Every run, done now or found done."""
        from tqdm import tqdm

        self._alphas = [alpha for alpha in alphas if alpha > 0]
        with tqdm(unit="run", desc="runs", dynamic_ncols=True) as bar:
            for run in self._runs(methods, uptrained, alphas, seeds):
                bar.set_postfix_str(run.name)
                yield self.once(run)
                bar.update()

    def _runs(
        self, methods: tuple[str, ...], uptrained: tuple[str, ...], alphas: list[float], seeds: int
    ) -> Iterator[Run]:
        together = "+".join(self._sites)
        apart = tuple(method for method in methods if method in APART)
        places = {together: methods} | ({site: apart for site in self._sites} if len(self._sites) > 1 else {})
        kv_heads = (self._num_heads // 2, self._num_heads // 4, 1)
        yield Run(together, "teacher", self._num_heads, 0.0, 0, 0.0)
        for sites, methods in places.items():
            for K in kv_heads:
                for method in methods:
                    for seed in range(1 if method in DETERMINISTIC else seeds):
                        yield Run(sites, method, K, 0.0, seed, 0.0)
        if not self._alphas:
            return
        best = {}
        for seed in range(seeds):  # of all cells the first one first: a command that is cut short leaves whole tables
            for K in (self._num_heads, kv_heads[1], kv_heads[2], kv_heads[0]):
                for method in ("teacher",) if self._num_heads == K else uptrained:
                    if method not in best:
                        best[method] = self._best_rate(Run(together, method, K, _tuned_at(self._alphas), 0, 1.0))
                    for alpha in self._alphas:
                        yield Run(together, method, K, alpha, seed, best[method])

    def _best_rate(self, run: Run) -> float:
        """The rate at which the next one, up or down, is worse on the split for tuning; the search begins at the best
        that was tried before."""
        alpha, tried = self._tried
        known = tried.get(run.method, {}) if alpha == run.alpha else {}
        losses = {float(rate): loss for rate, loss in known.items()}

        def loss(number: int) -> float:
            rate = RATES[number]
            if rate not in losses:
                losses[rate] = self.once(run._replace(rate=rate))["tuning_loss"]
            return losses[rate]

        best = RATES.index(min(losses, key=losses.get) if losses else run.rate)
        for step in (1, -1):
            while 0 <= best + step < len(RATES) and loss(best + step) < loss(best):
                best += step
        self.tuning[run.method] = {f"{rate:g}": losses[rate] for rate in sorted(losses)}
        return RATES[best]

    def _path(self, run: Run) -> Path:
        return self._workdir / f"{run.name}.json"

    def once(self, run: Run) -> dict[str, Any]:
        """The result of a run."""
        from experiments.measure import write_json

        if not self._path(run).exists():
            if run.alpha > 0:
                tuned_at = _tuned_at(self._alphas)  # the rates that turn out worse go no further
                self._uptrain(run._replace(alpha=tuned_at if run.alpha <= tuned_at else self._alphas[-1]))
            else:
                write_json(self._path(run), run._asdict() | self._converted(run) | _origin())
        return json.loads(self._path(run).read_text())

    @lru_cache(maxsize=4)  # noqa: B019 - one bench a process
    def _calibration(self, seed: int) -> tuple[list[Mapping], Any]:
        from gqa.convert import statistics, walk
        from gqa.data import loader

        batches = loader.train_batches(self._records, BATCH, seed=1000 + seed)
        batches = [batches(step) for step in range(CALIBRATION_ROWS // BATCH)]
        shell, load_layer = walk.shell_of(self._teacher), walk.layers_of(self._teacher)
        return batches, statistics.collect(shell, load_layer, batches, self._sites)

    def model(self, run: Run) -> tuple[Any, list]:
        """The converted model, and what was kept."""
        import jax

        from gqa import convert

        if run.method == "teacher":
            return self._teacher, []
        kv_heads = dict.fromkeys(run.sites.split("+"), run.kv_heads)
        key = jax.random.key(run.seed)
        if run.method in convert.METHODS:
            return convert.convert(self._teacher, kv_heads, run.method, key), []
        if run.method == "svd without text":
            return convert.convert_calibrated(self._teacher, kv_heads, "svd", key)
        batches, moments = self._calibration(run.seed)
        return convert.convert_calibrated(self._teacher, kv_heads, run.method, key, batches=batches, statistics=moments)

    def _converted(self, run: Run) -> dict[str, Any]:
        model, kept = self.model(run)
        return self.losses(model) | {"attention": kept}

    def losses(self, model) -> dict[str, float]:
        """Held-out losses of the two halves of the rows: for tuning, and to report."""
        from gqa.training.loop import heldout_metrics

        half = len(self._heldout) // 2
        tuning, reported = _Part(self._heldout, 0, half), _Part(self._heldout, half, len(self._heldout))
        scores = heldout_metrics(model, reported, self._mesh)
        return {
            "tuning_loss": heldout_metrics(model, tuning, self._mesh)["loss"],
            "loss": scores["loss"],
            "target_tokens": scores["target_tokens"],
        }

    def _uptrain(self, run: Run) -> None:
        """Uptrains to `run.alpha` in processes of its own, and scores all shares on the way."""
        import shutil
        import subprocess

        from experiments.measure import write_json
        from gqa import checkpoints
        from gqa.checkpoints import hf

        folder = self._workdir / "uptraining" / run.name
        start = folder / "converted"
        if not start.exists():
            model, _ = self.model(run)
            hf.save(model, start, dtype="float32")
        rate = self._config.optimizer.learning_rate * run.rate
        for alpha in (alpha for alpha in self._alphas if alpha <= run.alpha):
            path = self._path(run._replace(alpha=alpha))
            if path.exists():
                continue
            steps = round(alpha * self._config.uptrain.original_steps)
            if _finished(folder / "run") < steps:
                code = subprocess.run(
                    [
                        *(sys.executable, "-m", "gqa.train"),
                        *(f"--config={self._uptraining}", f"--workdir={folder / 'run'}"),
                        *(f"--config.model.checkpoint={start}", f"--config.train.seed={run.seed + 1}"),
                        *(f"--config.uptrain.alpha={alpha}", f"--config.optimizer.learning_rate={rate}"),
                        "--config.train.eval_every=1000000",
                    ],
                    check=False,
                    env=os.environ,
                ).returncode
                if code or _finished(folder / "run") < steps:  # stopped by a signal it saves and ends with 0
                    raise InputError(f"gqa.train ended with exit code {code}; started again, the runs go on from there")
            model = checkpoints.load(folder / "run" / "model", mesh=self._mesh, **self._config.model.run_choices())
            write_json(path, run._replace(alpha=alpha)._asdict() | self.losses(model) | _origin())
        shutil.rmtree(folder)

    def describe(self) -> dict[str, Any]:
        """What the results rest on: what removing each attention costs, and how many directions its keys take."""
        import jax
        import jax.numpy as jnp

        from gqa import models
        from gqa.convert.heads import read_heads
        from gqa.convert.plan import is_rotary
        from gqa.convert.walk import layers_of

        _, moments = self._calibration(0)
        load_layer, config = layers_of(self._teacher), self._teacher.config
        cost, directions = {}, {}
        teacher = self.losses(self._teacher)
        for site in self._sites:
            without = jax.tree.map(lambda leaf: leaf, self._teacher)
            for attention in models.site_attention(without, site):
                attention.out = attention.out.replace(jnp.zeros_like(attention.out[...]))
            cost[site] = self.losses(without)["loss"] - teacher["loss"]
            directions[site] = []
            for number in range(len(config.kv_heads(site))):
                name = "cross_attention" if site == "cross" else "self_attention"
                heads = read_heads(getattr(load_layer("decoder", number), name))
                sides = (
                    moments.moments(models.site_path(site, number)).of_keys(heads, centred=not is_rotary(config)),
                    moments.moments(models.site_path(site, number)).of_values(heads),
                )
                directions[site].append([_directions(sigma) for sigma in sides])
        return {"heldout": teacher, "cost_without": cost, "directions_of_99_percent": directions, "rows": self._rows}


def _origin() -> dict[str, str]:
    from experiments import measure

    return {"cpu": measure.cpu(), "commit": measure.commit()}


def _finished(run: Path) -> int:
    """The step at which a run of `gqa.train` last came to its end; 0: not yet."""
    path = run / "finished.json"
    return json.loads(path.read_text())["step"] if path.exists() else 0


def _directions(sigma: np.ndarray) -> int:
    """Eigenvectors that hold 99 % of the trace."""
    share = np.cumsum(np.linalg.eigvalsh(sigma)[::-1]) / np.trace(sigma)
    return int(np.searchsorted(share, 0.99)) + 1


class _Part:
    """Some batches of held-out rows, as `heldout_metrics` takes them."""

    def __init__(self, batches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __call__(self, step: int):
        return self._batches(self._start + step)


if __name__ == "__main__":
    command_line.run(main)
