"""Plans as tables."""

from collections.abc import Sequence

from gqa.planning.chips import PRICES_OF, Topology
from gqa.planning.train import Plan
from gqa.sharding import describe_mesh

OTHERS = ("batch", "temporaries", "padding", "program")  # of decoding, as one column
QUICK = (
    "Compiled with less effort (--quick): in full, four training steps took from 17 % less to 13 % more memory and "
    "moved 1 to 18 % less. Where memory is nearly full, plan without it."
)
FITS = {True: "fits", False: "does not fit", None: "limit not known"}


def chip_line(topology: Topology) -> str:
    """The figures that a plan stands on, and where they are from."""
    chip = topology.chip
    if chip.hbm is None:
        return "No figures for this chip: memory and work are exact, times are left out."
    facts = f"{chip.name}: {gib(chip.hbm)} of memory a program may use, {chip.hbm_bandwidth / 1e9:.0f} GB/s, "
    facts += f"{chip.bf16_flops / 1e12:.0f} TFLOP/s bfloat16, {chip.link_bandwidth / 1e9:.0f} GB/s a link and direction"
    return f"{facts} ({chip.source})."


def training(plan: Plan, topology: Topology) -> str:
    """A training plan as Markdown."""
    memory, work, seconds, run = plan["memory"], plan["work"], plan["seconds"], plan["run"]
    mesh = describe_mesh(plan["mesh"].values())
    lengths = " / ".join(str(plan["lengths"][name]) for name in ("inputs", "targets") if name in plan["lengths"])
    lines = [
        f"{plan['parameters'] / 1e9:.2f} billion parameters, batch {plan['batch']} x {lengths} tokens in "
        f"{plan['accumulation']} micro-batch(es), remat {plan['remat']}",
        f"{plan['topology']}: {plan['devices']} devices as {mesh}; {_origin(plan)}",
        "",
        *_memory(memory),
        "",
        "| work of a step, per device | |",
        "|---|--:|",
        f"| model FLOPs | {work['model_flops_per_device']:.4g} |",
        f"| FLOPs with what is computed again | {work['executed_flops_per_device']:.4g} |",
    ]
    if work["bytes_per_device"] is not None:
        lines.append(f"| memory traffic | {work['bytes_per_device'] / 1e9:.1f} GB |")
    lines += ["", *_collectives(plan["collectives"])] if plan["collectives"] else []
    if seconds["step"] is not None:
        lines += [
            "",
            "| roofline | seconds a step |",
            "|---|--:|",
            f"| compute | {seconds['compute']:.3f} |",
            f"| HBM | {seconds['memory']:.3f} |",
            f"| ICI | {seconds['interconnect']:.3f} |",
            f"| **step, all overlapped: {seconds['binds']} binds** | **{seconds['step']:.3f}** |",
            f"| step, nothing overlapped | {seconds['without_overlap']:.3f} |",
            f"| MFU | {plan['mfu_without_overlap']:.0%} to {plan['mfu']:.0%} at most |",
            "",
            f"{run['steps']} steps: at least {run['hours']:.1f} hours, {run['chip_hours']:.0f} chip-hours"
            + _usd(run["usd"], run["price"]),
        ]
    return "\n".join([*lines, *(f"Note: {note}." for note in plan["notes"]), chip_line(topology)])


def _origin(plan: Plan) -> str:
    if plan["source"] == "estimated":
        return "**an analytic estimate**, nothing was compiled"
    return f"compiled in {plan['compile_seconds']:.0f} s"


def _usd(usd: float | None, price: float | None) -> str:
    return "" if usd is None else f", {usd:,.0f} USD at {price:.2f} a chip-hour"


def _memory(memory: Plan) -> list[str]:
    limit = "" if memory["limit"] is None else f" of {gib(memory['limit'])}"
    return [
        "| memory per device | |",
        "|---|--:|",
        *(f"| {name} | {gib(size)} |" for name, size in memory["parts"].items()),
        f"| **total: {FITS[memory['fits']]}** | **{gib(memory['total'])}{limit}** |",
    ]


def _collectives(collectives: Sequence[Plan]) -> list[str]:
    return [
        "| collective | devices | times | sent by each device |",
        "|---|--:|--:|--:|",
        *(f"| {each['kind']} | {each['group']} | {each['count']} | {_gb(each['sent'])} |" for each in collectives),
    ]


def decoding(plan: Plan, topology: Topology) -> str:
    """A decoding plan as Markdown."""
    mesh = describe_mesh(plan["mesh"].values())
    origin = "**an analytic estimate**" if plan["source"] == "estimated" else "the loop compiled"
    devices = plan["devices"]
    lines = [
        f"{plan['size']}, {plan['inputs_length']} tokens in, {plan['new_tokens']} out, batch {plan['batch_wanted']} "
        f"({plan['batch_wanted'] / devices:g} a chip)",
        f"{plan['topology']}: {devices} devices as {mesh}; {origin}",
        "",
        "| K | batch wanted | largest batch, computed (a chip) | planned at | parameters | cache | the rest | total "
        "| step | binds | s a sample and chip |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for row in plan["rows"]:
        parts, seconds = row["memory"]["parts"], row.get("seconds", {})
        known, largest = row["fits_wanted"] is not None, row["largest_batch"]
        fits = "**does not fit**" if row["fits_wanted"] is False else FITS[row["fits_wanted"]]
        lines.append(
            f"| {row['kv_heads']} | {fits} | {f'{largest} ({largest / devices:g})' if known else ''} "
            f"| {row['batch']} | {gib(parts['parameters'])} "
            f"| {gib(parts.get('cache', 0))} | {gib(sum(parts.get(name, 0) for name in OTHERS))} "
            f"| {gib(row['memory']['total'])} | {_ms(seconds.get('step'))} | {seconds.get('binds') or ''} "
            f"| {_number(seconds.get('sample_chip'))} |"
        )
    lines.append("")
    for row in plan["rows"]:
        if row["fits_wanted"] is False:
            needs = row["attempts"][0]["bytes"] if row["attempts"] else None
            what = f"needs {gib(needs)} a device" if needs else "does not fit"
            lines.append(
                f"K={row['kv_heads']} at batch {plan['batch_wanted']} {what}; the largest batch that fits is "
                f"{row['largest_batch']}, {row['largest_batch'] / devices:g} a chip."
            )
        lines += [f"Note: {note}." for note in row["notes"]]
    lines.append(
        "A sample's time is its share of reading the inputs, at peak FLOP/s, of the steps, each at its roofline, and "
        "of what the loop does once around them, such as a new layout of the cache. "
        "The loop is what must fit; inputs may be read in smaller batches."
    )
    return "\n".join([*lines, chip_line(topology)])


def candidates(plans: Sequence[Plan], most: int = 8) -> str:
    """The first of a search's estimates."""
    lines = ["| mesh | micro-batches | remat | memory | step | MFU at most |", "|---|--:|---|--:|--:|--:|"]
    for plan in plans[:most]:
        mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
        mfu = "" if plan["mfu"] is None else f"{plan['mfu']:.0%}"
        lines.append(
            f"| {mesh} | {plan['accumulation']} | {plan['remat']} | {gib(plan['memory']['total'])} "
            f"| {_ms(plan['seconds']['step'])} | {mfu} |"
        )
    return "\n".join([f"Estimates, the best {min(most, len(plans))} of {len(plans)}:", "", *lines])


def prices_line(price: float | None, given: bool) -> str:
    """Where a price is from."""
    if price is None:
        return "No price: give --price=USD per chip-hour."
    return "" if given else f"Price: list price on demand in the US, {PRICES_OF}; --price=USD replaces it."


def gib(size: float) -> str:
    """Bytes in GiB, in MiB below a tenth of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB" if size else "0"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f} ms"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
