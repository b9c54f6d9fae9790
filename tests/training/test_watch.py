"""What a run says about its speed, and which of its steps are traced."""

import jax
import pytest

from gqa.errors import InputError
from gqa.training.watch import Profiler, Trace, peak_tflops


def test_a_peak_is_given_or_known_or_none():
    assert peak_tflops(2.5) == 2.5 * jax.device_count()
    assert peak_tflops(None) is None  # a CPU's


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:3", "3:0", "a:3", "3:-1", "3:1:2"])
def test_steps_that_cannot_be_traced(text):
    with pytest.raises(InputError, match=rf"^--profile={text}; expected START:STEPS, such as 10:3"):
        Trace.parse(text)


@pytest.mark.parametrize("text", ["6:16", "21:1"])
def test_steps_that_a_run_does_not_take(text):
    with pytest.raises(InputError, match=rf"^--profile={text} is not of the run's steps; expected some of 1\.\.20$"):
        Trace.parse(text).check(20)


@pytest.mark.parametrize(("text", "is_past"), [("2:2", True), ("5:3", True), ("6:1", False), (None, False)])
def test_a_run_that_goes_on_behind_its_trace(tmp_path, text, is_past):
    lines = []
    Profiler(text and Trace.parse(text), 5, tmp_path, lines.append)
    line = f"--profile={text} is past: the run goes on from step 5, without a trace"
    assert lines == [line] * is_past
