"""python -m gqa.plan --config=configs/NAME.py --topology=v4:4x4x8 [--search] [--quick] [--price=USD] [--output=FILE]

Will it fit, and how fast will it be? Compiles the very training step of the config (or, for a config of decoding, the
very loop) for a topology that need not be there, and says per device: memory by part, FLOPs and memory traffic with
scans counted in full, collectives by kind and bytes, the step's time at the chips' peaks and what binds it, the time
and cost of the run. It is compiled without the flags by which a run's collectives overlap with computation
(`gqa/compiler_flags.py`): their buffers come on top, and what they cut into pieces is counted whole.

With --quick libtpu compiles at XLA's effort level O1: a training step in a quarter to half of the time and with about
half of this machine's memory. It is another program: the table says by how much full ones differ.

Topologies: v4:4x4x8, v5p:4x4x8 (3D), v5e:16x16, v6e:16x16 (2D): compiled by libtpu, `pip install 'jax[tpu]'`, no TPU
needed; cpu:8: forced host devices; gpu or gpu:h100:8: compiled where the GPUs are, else an estimate, labelled so.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import resource
import sys
from pathlib import Path

from gqa import command_line, files
from gqa.errors import InputError
from gqa.training.memory import share_heaps


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_config_argument(parser)
    parser.add_argument("--topology", required=True, help="v4:4x4x8, v5e:16x16, v5p:4x4x8, v6e:16x16, cpu:8, gpu, …")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, micro-batches and remat policies, recommend the fastest"
    )
    parser.add_argument(
        "--quick", action="store_true", help="compile with less effort, for a first answer; TPU topologies alone"
    )
    parser.add_argument("--price", type=float, help="USD per chip-hour, instead of the list price")
    parser.add_argument("--output", type=Path, help="file for the plan as JSON")
    arguments, raw_config = command_line.parse(parser)
    share_heaps()
    from gqa.planning import chips

    topology = chips.parse_topology(arguments.topology)
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise InputError(f"--price={arguments.price}; expected USD per chip-hour, at least 0")
    if arguments.output and not arguments.output.parent.is_dir():
        raise InputError(f"--output={arguments.output}: there is no folder {arguments.output.parent}")
    if arguments.output and arguments.output.is_dir():
        raise InputError(f"--output={arguments.output} is a folder; nearest: {arguments.output / 'plan.json'}")
    if arguments.quick and topology.chip.platform != "tpu":
        raise InputError(f"--quick is for what libtpu compiles; found --topology={topology}, expected one of a TPU")
    # Before JAX is imported, which reads them once. Warnings of the partitioner are of no use to who reads a plan.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if arguments.quick:
        os.environ["JAX_OPTIMIZATION_LEVEL"] = "O1"
    if topology.chip.platform != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if topology.chip.platform == "cpu":
        count = f"--xla_force_host_platform_device_count={topology.num_devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    from tqdm import tqdm

    bar = tqdm(total=1, desc=f"compiling for {topology}", delay=1, bar_format="{desc}: {elapsed}", leave=False)
    with contextlib.closing(bar):
        plan, text = make_plan(
            raw_config.to_dict(),
            topology,
            search=arguments.search,
            price=arguments.price,
            named=":" in arguments.topology,
        )
    if arguments.quick:
        from gqa.planning import report

        text += f"\n{report.QUICK}"
    usage = resource.getrusage(resource.RUSAGE_SELF)
    plan["planning"] = {
        "quick": arguments.quick,
        "command": " ".join(["python -m gqa.plan", *sys.argv[1:]]),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss * 1024 / 2**30,
        "versions": _versions(),
    }
    print(text)
    if arguments.output:
        files.write_json(arguments.output, plan)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def make_plan(raw: dict, topology, *, search: bool, price: float | None, named: bool = True) -> tuple[dict, str]:
    """The plan of a config as plain values and as a text; not `named`: a GPU topology is of the GPUs that are here."""
    import jax

    from gqa.planning import chips, decode, report, train
    from gqa.planning import search as searching
    from gqa.training import config as run_config

    found = True
    if topology.chip.platform == "gpu":
        kinds = [device.device_kind for device in jax.devices() if device.platform == "gpu"]
        local = chips.local_gpus(topology, kinds, named=named)
        found, topology = local is not None, local or topology
    given = price is not None
    price = price if given else topology.chip.price
    if "train" not in raw:
        config = decode.DecodeConfig.of(raw)
        if search:
            plan, ranked = decode.search(config, topology, price, estimate=not found)
            plan["candidates"] = ranked[:8]
            texts = [report.decoding(plan, topology), "", f"Recommended: {searching.mesh_overrides(plan)}"]
        else:
            plan = decode.plan(config, topology, price, estimate=not found)
            texts = [report.decoding(plan, topology)]
    else:
        config = run_config.parse(raw)
        architecture = config.model.architecture()
        if search:
            plan, ranked = searching.search(config, architecture, topology, price)
        else:
            plan = (train.plan if found else train.estimate)(config, architecture, topology, price)
        texts = [report.training(plan, topology)]
        if plan["memory"]["fits"] is False:
            plan["would_fit"] = searching.advice(config, architecture, topology, price)
            texts.append(f"What would fit: {plan['would_fit']}")
        elif search:
            plan["candidates"] = ranked[:8]
            texts += ["", report.candidates(ranked), "", f"Recommended: {searching.describe(plan)}"]
        texts.append(report.prices_line(price, given))
    return plan, "\n".join(filter(None, texts)) if not search else "\n".join(texts)


if __name__ == "__main__":
    command_line.run(main)
