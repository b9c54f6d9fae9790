"""Flags of a backend's compiler: where they are set, and that the installed compiler knows them."""

import pytest

from gqa import compiler_flags


def test_the_users_flags_stay():
    environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"}
    compiler_flags.set_flags("gpu", environment)
    assert environment["XLA_FLAGS"].split() == [
        "--xla_gpu_enable_latency_hiding_scheduler=false",
        "--xla_dump_to=/tmp/x",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
    ]


def test_each_backend_has_its_own_variable():
    environment = {}
    compiler_flags.set_flags("cpu", environment)
    assert environment == {}
    compiler_flags.set_flags("tpu", environment)
    assert set(environment) == {"LIBTPU_INIT_ARGS"}
    assert "--xla_tpu_enable_async_collective_fusion=true" in environment["LIBTPU_INIT_ARGS"].split()


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", "cpu"), ("cuda,cpu", "gpu"), ("tpu", "tpu"), ("", "cpu"), ("metal", "cpu")]
)
def test_the_backend_that_will_start(platforms, expected, tmp_path):
    """An empty folder stands for /dev: neither a TPU nor a GPU is in this machine."""
    assert compiler_flags.expected({"JAX_PLATFORMS": platforms}, tmp_path) == expected


def test_the_installed_compiler_knows_the_flags(run_python):
    """XLA ends a process whose XLA_FLAGS it does not know; the flags of GPUs are known to every build."""
    environment = {}
    compiler_flags.set_flags("gpu", environment)
    process = run_python("-c", "import jax; print(jax.numpy.ones(2).sum())", **environment)
    assert (process.returncode, process.stdout) == (0, "2.0\n"), process.stderr
