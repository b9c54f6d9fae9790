"""What the program that is being traced will run on."""

import jax
from jax.extend.backend import get_backend


def backend() -> str:
    """`cpu`, `tpu`, `cuda` or `rocm`: of the mesh that is set, else the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # not always of this machine: programs are planned, too
    name = jax.default_backend() if device is None else device.platform
    if name == "gpu":
        name = "cuda" if "cuda" in get_backend().platform_version else "rocm"
    return name
