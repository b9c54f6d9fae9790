"""Watching a run: speed, step times, shares of time that are lost, the summary at its end; a trace of some steps."""

import collections
import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from gqa.distributed import is_primary
from gqa.errors import InputError

# Metrics that differ between two runs of the same steps.
RATES = ("tokens_per_second", "model_tflops_per_second", "mfu", "memory_gib", "data_wait", "goodput")
RATES += ("step_seconds_p50", "step_seconds_p90", "step_seconds_p99")

# Dense bfloat16 TFLOP/s of a device as JAX counts them, from its maker's data sheet, by the start of `device_kind`.
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA A100": 312.0,
}
PROFILE = "profile"
_RECENT = 1000  # steps that the percentiles are of


class Work(NamedTuple):
    """What a run's steps are measured against."""

    steps: int  # to the run's end
    flops: int  # of a step, over all devices
    share: float  # part of each batch that this process reads
    peak_tflops: float | None  # of all devices together; None: not known, and no MFU is given
    started: float  # when the run was started for the first time, in seconds since 1970


def peak_tflops(given: float | None) -> float | None:
    """Peak TFLOP/s of all devices together: as `given` for one of them, else known for their kind, else `None`."""
    kind = jax.devices()[0].device_kind
    known = next((peak for name, peak in PEAK_TFLOPS.items() if kind.startswith(name)), None)
    one = known if given is None else given
    return None if one is None else one * jax.device_count()


class Watch:
    """The progress bar, and the times that go into the metrics.

    A step's time is that between the ends of two steps. One step is under way while the next is handed to the device,
    which therefore never waits for the host; what the loop does between `settle` and `resume` belongs to no step.

    Args:
      start: step that this process goes on from.
      useful_seconds: time of the steps before, those that were lost left out.
      skipped: of these, how many updates were left out.
      work: what they are measured against.
    """

    def __init__(self, start: int, useful_seconds: float, skipped: int, work: Work):
        self.useful_seconds = useful_seconds
        self._skipped = skipped
        self._work = work
        look = dict(unit="step", desc="train", dynamic_ncols=True, mininterval=1.0)
        self._bar = tqdm(total=work.steps, initial=start, disable=not is_primary(), **look)
        self._compiled = False
        self._pending = None
        self._last = time.perf_counter()
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._since_report = _Spent()
        self._total = _Spent()
        self._saves, self._save_seconds = 0, 0.0
        self._tokens = 0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the request for a batch."""
        before = time.perf_counter()
        yield
        waited = time.perf_counter() - before
        self._since_report.data += waited
        self._total.data += waited

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what the loop itself does for a save."""
        self.settle()
        before = time.perf_counter()
        yield
        self._saves += 1
        self._save_seconds += time.perf_counter() - before
        self.resume()

    def step(self, metrics: Mapping[str, jax.Array]) -> None:
        """A step was handed to the device, these will be its metrics: waits for the one before it."""
        self._end_of_pending()
        self._pending = metrics
        if not self._compiled:  # the first call compiles: no time of a step
            self._compiled = True
            jax.block_until_ready(metrics)
            self._pending = None
            self._since_report.data = self._total.data = 0.0
            self.resume()

    def settle(self) -> None:
        """Waits for the step under way."""
        self._end_of_pending()

    def resume(self) -> None:
        """The loop goes on with steps; what it did since `settle` was no step."""
        self._last = time.perf_counter()

    def _end_of_pending(self) -> None:
        if self._pending is None:
            return
        jax.block_until_ready(self._pending)
        self._pending = None
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._recent.append(seconds)
        self.useful_seconds += seconds
        for spent in (self._since_report, self._total):
            spent.steps += 1
            spent.seconds += seconds

    def report(self, step: int, batch: Mapping, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the step that `settle` waited for, with the rates since the last report; also shown."""
        spent, self._since_report = self._since_report, _Spent()
        metrics = {name: float(value) for name, value in metrics.items()}
        tokens = sum(int(np.count_nonzero(array)) for name, array in batch.items() if name.endswith("_segments"))
        self._tokens = tokens / self._work.share
        metrics |= self._rates(spent) | {"memory_gib": _peak_memory() / 2**30}
        self._bar.update(step - self._bar.n)
        speed = f", {metrics['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in metrics else ""
        self._bar.set_postfix_str(f"loss {metrics['loss']:.3f}{speed}")
        skipped = int(metrics["skipped_steps"])
        if skipped > self._skipped:
            new = skipped - self._skipped
            self.say(f"step {step}: {new} update(s) left out, as loss or gradient was not finite or too high")
        self._skipped = skipped
        return metrics

    def say(self, line: str) -> None:
        """Prints a line above the bar, in the first process."""
        if is_primary():
            self._bar.write(line)

    def back_to(self, step: int, useful_seconds: float, skipped: int) -> None:
        """The run goes on from an earlier step."""
        self._bar.reset(self._bar.total)
        self._bar.update(step)
        self.useful_seconds, self._skipped = useful_seconds, skipped
        self._pending = None
        self.resume()

    def summary(self, step: int, losses: Mapping[int, float]) -> str:
        """The run in one line."""
        parts = [f"{step} steps"]
        if self._total.steps:
            rates = self._rates(self._total)
            times = [rates[f"step_seconds_p{p}"] for p in (50, 90, 99)]
            parts.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{rates['model_tflops_per_second']:.3g} TFLOP/s")
            parts += [f"MFU {100 * rates['mfu']:.1f} %"] if "mfu" in rates else []
            parts.append("step " + "/".join(f"{1000 * seconds:.0f}" for seconds in times) + " ms (p50/p90/p99)")
            parts.append(f"data wait {100 * rates['data_wait']:.2f} %")
            if self._saves:
                cost = self._save_seconds / self._saves / times[0]
                parts.append(f"a save costs {cost:.2f} steps")
            parts.append(f"goodput {100 * rates['goodput']:.0f} %")
            parts.append(f"{self._skipped} updates left out")
        if losses:
            best = min(losses, key=losses.__getitem__)
            parts.append(f"best held-out loss {losses[best]:.4f} at step {best}")
        return ", ".join(parts)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _rates(self, spent: "_Spent") -> dict[str, float]:
        if not spent.steps:
            return {}
        tflops = self._work.flops * spent.steps / spent.seconds / 1e12
        p50, p90, p99 = np.percentile(self._recent, [50, 90, 99])
        rates = {
            "tokens_per_second": self._tokens * spent.steps / spent.seconds,
            "model_tflops_per_second": tflops,
            "step_seconds_p50": float(p50),
            "step_seconds_p90": float(p90),
            "step_seconds_p99": float(p99),
            "data_wait": spent.data / spent.seconds,
            "goodput": min(self.useful_seconds / (time.time() - self._work.started), 1.0),
        }
        if self._work.peak_tflops is not None:
            rates["mfu"] = tflops / self._work.peak_tflops
        return rates


class _Spent:
    """Steps, their time, and what of it was waiting for data."""

    def __init__(self):
        self.steps, self.seconds, self.data = 0, 0.0, 0.0


class Trace(NamedTuple):
    """Steps of which a profile is written."""

    first: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Trace":
        """From `START:STEPS`; raises `InputError` for anything else."""
        first, separator, steps = text.partition(":")
        if not (separator and first.isdecimal() and steps.isdecimal() and int(first) and int(steps)):
            raise InputError(f"--profile={text}; expected START:STEPS, such as 10:3 for steps 10, 11 and 12")
        return cls(int(first), int(steps))

    def check(self, steps: int) -> None:
        """Raises `InputError` for steps that a run of `steps` does not take."""
        if self.first + self.steps - 1 > steps:
            raise InputError(
                f"--profile={self.first}:{self.steps} is not of the run's steps; expected some of 1..{steps}"
            )


class Profiler:
    """Writes the trace of some steps into a folder, for TensorBoard's profile page or Perfetto.

    Where the run goes on from `start`, in or behind these steps, none is written, and `say` gets a line: the command
    that was stopped is started again as it was.
    """

    def __init__(self, trace: Trace | None, start: int, folder: Path, say: Callable[[str], None]):
        if trace is not None and trace.first <= start:
            say(f"--profile={trace.first}:{trace.steps} is past: the run goes on from step {start}, without a trace")
            trace = None
        self._trace, self._folder = trace, folder
        self._running = False

    @contextlib.contextmanager
    def step(self, step: int, watch: Watch) -> Iterator[None]:
        """Around what hands a step to the device."""
        if self._trace is not None and step == self._trace.first:
            watch.settle()
            jax.profiler.start_trace(self._folder)
            self._running = True
            watch.resume()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._running and step == self._trace.first + self._trace.steps - 1:
            watch.settle()
            self.close()
            watch.say(f"the trace of {self._trace.steps} steps is in {self._folder}")
            watch.resume()

    def close(self) -> None:
        """Writes what there is of a trace when the run ends before the trace does."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _peak_memory() -> int:
    """Most bytes in use so far: of the device where it tells, else of this process."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
