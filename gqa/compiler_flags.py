"""Compiler flags that let devices compute while they exchange data, by backend; set before JAX starts.

A flag that the user has set, in the same variable, stays as it is.
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Backend -> the variable that its compiler reads, and the flags. A compiler refuses a flag that it does not know: the
# names are those of jaxlib 0.10.2 and libtpu 0.0.42, and the tests start the installed jaxlib with the first.
FLAGS: dict[str, tuple[str, Mapping[str, str]]] = {
    "gpu": (
        "XLA_FLAGS",
        {
            # Collectives start early and end late, with computation between (docs.jax.dev, GPU performance tips) …
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            # … and, of scanned layers, beside the layer before or after.
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
        },
    ),
    "tpu": (
        "LIBTPU_INIT_ARGS",
        {
            # As MaxText sets them: collectives run in the background of the matrix products beside them …
            "xla_enable_async_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            "xla_tpu_overlap_compute_collective_tc": "true",
            # … and gradients are summed over slices while the backward pass goes on.
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    ),
}
_PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}  # JAX_PLATFORMS -> backend
_GPU_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def expected(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str:
    """The backend that JAX will start on: `cpu`, `gpu` or `tpu`, told without starting it."""
    platform = environment.get("JAX_PLATFORMS", "").partition(",")[0].strip()
    if platform:
        return _PLATFORMS.get(platform, "cpu")
    if _installed("libtpu") and (any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))):
        return "tpu"
    if (devices / "nvidiactl").exists() and any(map(_installed, _GPU_PLUGINS)):
        return "gpu"
    return "cpu"


def set_flags(backend: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags of `backend` to its variable; those already there win."""
    if backend not in FLAGS:
        return
    variable, flags = FLAGS[backend]
    theirs = environment.get(variable, "").split()
    names = {word.lstrip("-").partition("=")[0] for word in theirs}
    ours = [f"--{name}={value}" for name, value in flags.items() if name not in names]
    environment[variable] = " ".join([*theirs, *ours])


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
