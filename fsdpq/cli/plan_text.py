"""A plan as text: the verdict first, then what it follows from, then what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import click

from fsdpq.cli.render import render_table
from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.result import Category, Edit, Phase, Plan, StepTime, Transfer
from fsdpq.run_files.amounts import format_bytes, format_count, format_duration

BAR = 24
PHASES: tuple[Phase, ...] = ("load", "init", "forward", "backward", "optimizer")
LABELS: dict[Category, str] = {
    "codes": "quantized base, own share",
    "scales": "its scales",
    "plain": "unquantized weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "gathered": "gathered layers",
    "communication": "communication buffers",
    "dequantized": "dequantized matrix",
    "layer_inputs": "inputs of layers",
    "recomputed": "activations inside layers",
    "attention": "attention",
    "loss": "loss of one chunk",
    "load": "loading and quantizing",
    "workspace": "workspace of products",
    "context": "CUDA and its libraries",
    "fragmentation": "fragmentation",
}
_ON_CPU: dict[Category, str] = {**LABELS, "context": "the process itself"}


def render_plan(plan: Plan) -> Iterator[str]:
    """Yields the lines of a plan."""
    yield _verdict(plan)
    yield ""
    yield from render_table(_overview(plan), indent="  ")
    yield from render_table(_question(plan), indent="  ")
    for shortage in plan.shortages:
        yield "  " + click.style("short:", fg="red", bold=True) + f" {shortage}"
    yield from _edits(plan)
    yield from _section(_device_title(plan), _device(plan))
    yield from _section("peak of each phase", _phases(plan))
    yield from _section("host memory", _host(plan))
    yield from _section("disk", _disk(plan))
    yield from _section("time", _time(plan))
    yield from _section("how far it can go", _limits(plan))
    yield from _section("other ways to hold the model", _variants(plan))
    if plan.notes:
        yield from ["", "notes", *(f"  {note}" for note in plan.notes)]


def describe_machine(machine: Machine) -> str:
    """Returns the machine in words: ``2 x RTX 4090, 64.00 GiB of memory``."""
    words: list[str] = []
    if machine.gpus:
        words.append(f"{len(machine.gpus)} x {machine.gpus[0].name}")
    elif machine.gpus is not None:
        words.append("a CPU")
    if machine.ram_bytes is not None:
        words.append(f"{format_bytes(machine.ram_bytes)} of memory")
    return ", ".join(words)


def _verdict(plan: Plan) -> str:
    num_nodes, machine = _num_nodes(plan), describe_machine(plan.machine)
    if num_nodes > 1:
        machine += f", on each of {num_nodes} machines"
    if plan.fits is None:
        needs = "each of its GPUs" if plan.device_type == "cuda" else "each rank"
        text = f"{plan.name} needs {format_bytes(plan.device.peak.total)} on {needs}"
        fits_on = f": {' or '.join(plan.fits_on)} will do" if plan.fits_on else ""
        return click.style(text + fits_on, bold=True)
    if plan.fits:
        return click.style(f"{plan.name} fits: {machine}", fg="green", bold=True)
    return click.style(f"{plan.name} does not fit: {machine}", fg="red", bold=True)


def _num_nodes(plan: Plan) -> int:
    work = plan.workload
    return 1 if work is None else work.num_ranks // work.num_local_ranks


def _overview(plan: Plan) -> Iterator[tuple[str, ...]]:
    peak, on_gpu = plan.device.peak, plan.device_type == "cuda"
    has = plan.machine.gpu_bytes if on_gpu else None
    yield "each GPU" if on_gpu else "each rank", _of(peak.total, has), _bar(peak.total, has)
    ram = plan.machine.ram_bytes
    yield "host", _of(plan.host.peak, ram), _bar(plan.host.peak, ram)
    yield "disk", _of(plan.disk.total, None), ""


def _question(plan: Plan) -> Iterator[tuple[str, ...]]:
    time = plan.time
    if time.tokens_per_s is not None:
        words = [f"{time.tokens_per_s:,.0f} tokens/s"]
        words += [] if time.total_s is None else [f"{format_duration(time.total_s)} in all"]
        words += [_prices(plan)] if plan.machine.price_per_hour is not None else []
        yield "speed   ", ", ".join(words)
    yield "model   ", plan.model
    if (work := plan.workload) is not None:
        ranks = "1 rank" if work.num_ranks == 1 else f"{work.num_ranks} ranks"
        ranks += f" on {number} machines" if (number := _num_nodes(plan)) > 1 else ""
        batches = f"{work.micro_batches} micro-batch{'es' if work.micro_batches > 1 else ''}"
        step = f"{work.global_rows} rows of {work.seq_len:,} tokens a step"
        yield "batch   ", f"{step}: {ranks}, {batches} of {work.rows}"


def _prices(plan: Plan) -> str:
    """Returns the price of the run, where its steps are known, and of a million tokens."""
    time, hour = plan.time, plan.machine.price_per_hour or 0.0
    million = hour / 3600 * 1e6 / (time.tokens_per_s or math.inf)
    whole = "" if time.price is None else f"{time.price:,.2f}, "
    return f"price {whole}{million:,.2f} a million tokens"


def _device_title(plan: Plan) -> str:
    where = "each GPU" if plan.device_type == "cuda" else "each rank"
    return f"{where} at its peak, {plan.device.peak.name}"


def _device(plan: Plan) -> Iterator[tuple[str, ...]]:
    parts, total = plan.device.peak.parts, plan.device.peak.total
    labels = LABELS if plan.device_type == "cuda" else _ON_CPU
    for category, label in labels.items():
        if size := parts.get(category, 0):
            yield label, format_bytes(size).rjust(10), "#" * round(BAR * size / total)
    yield "together", format_bytes(total).rjust(10), ""


def _phases(plan: Plan) -> Iterator[tuple[str, ...]]:
    for phase in PHASES:
        if (moment := plan.device.phase_peak(phase)) is not None:
            yield phase, format_bytes(moment.total).rjust(10), moment.name


def _host(plan: Plan) -> Iterator[tuple[str, ...]]:
    host = plan.host
    for name, size in sorted(host.parts.items(), key=lambda item: -item[1]):
        if size:
            yield name, format_bytes(size).rjust(10)
    if host.load_bytes > host.total:
        yield "while loading, in all", format_bytes(host.load_bytes).rjust(10)
    if host.file_backed_bytes:
        size = format_bytes(host.file_backed_bytes).rjust(10)
        yield "of the disk's file, where there is room", size


def _disk(plan: Plan) -> Iterator[tuple[str, ...]]:
    disk = plan.disk
    rows = {
        "download": disk.download_bytes,
        "cache": disk.cache_bytes,
        "checkpoints": disk.checkpoint_bytes,
        "export": disk.export_bytes,
    }
    for name, size in rows.items():
        if size:
            yield name, format_bytes(size).rjust(10)


def _time(plan: Plan) -> Iterator[tuple[str, ...]]:
    time = plan.time
    flops = f"{format_flops(time.flops)} a {'GPU' if plan.device_type == 'cuda' else 'rank'}"
    yield "a step", _seconds(time.step_s), flops
    if time.compute_s is not None:
        yield "computing", _seconds(time.compute_s), ""
    for transfer in time.transfers:
        yield transfer.link, _seconds(transfer.seconds), _moved(transfer)
    if time.total_steps is not None:
        yield "the run", _seconds(time.total_s), f"{time.total_steps:,} steps{_price(time)}"
    for settings, reason in time.advice:
        yield "faster", "", f"{' '.join(settings)}: {reason}"


def _edits(plan: Plan) -> Iterator[str]:
    if plan.fits is not False:
        return
    if plan.edits:
        yield from ["", "it fits with one of these lines added to the command, fastest first"]
        yield from render_table([_edit(edit) for edit in plan.edits], indent="  ")
    elif plan.shortages:
        yield from ["", "no change of the recipe that is known here makes it fit"]
    if plan.fits_on:
        yield f"  or, as it is, on {' or '.join(plan.fits_on)}"


def _edit(edit: Edit) -> tuple[str, ...]:
    slower = "" if edit.slowdown is None else f"{edit.slowdown:.2f}x the time"
    note = "  (another result)" if edit.changes_result else ""
    host = f"host {format_bytes(edit.host_bytes)}"
    return format_bytes(edit.peak_bytes), host, slower, " ".join(edit.settings) + note


def _limits(plan: Plan) -> Iterator[tuple[str, ...]]:
    for limit in plan.limits:
        value = "nothing fits" if limit.value is None else f"up to {limit.value:,}"
        speed = "" if limit.tokens_per_s is None else f", {limit.tokens_per_s:,.0f} tokens/s"
        peak = f"{format_bytes(limit.peak_bytes)}{speed}" if limit.value is not None else ""
        yield limit.setting, value, f"now {limit.now:,}", peak, f"then {limit.bound}"


def _variants(plan: Plan) -> Iterator[tuple[str, ...]]:
    if not plan.variants:
        return
    yield "strategy", "offload", "checkpointing", "peak", "host", "tokens/s", ""
    for each in plan.variants:
        marks = ["" if each.fits is not False else "does not fit"]
        marks += ["" if each.settings else "<- the recipe"]
        yield (
            each.strategy, each.offload, each.activation_checkpointing,
            format_bytes(each.peak_bytes), format_bytes(each.host_bytes),
            "" if each.tokens_per_s is None else f"{each.tokens_per_s:,.0f}",
            " ".join(mark for mark in marks if mark),
        )  # fmt: skip


def format_flops(flops: float) -> str:
    """Returns a number of operations: ``1.24 PFLOP``."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{format_count(flops)} FLOP"


def _section(title: str, rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    table: Sequence[tuple[str, ...]] = list(rows)
    if table:
        yield from ["", title, *render_table(table, indent="  ")]


def _moved(transfer: Transfer) -> str:
    text = f"{format_bytes(transfer.num_bytes)} a step"
    if transfer.seconds is None and transfer.hiding_bandwidth is not None:
        return f"{text}, less than computing from {transfer.hiding_bandwidth / 1e9:.2f} GB/s"
    if transfer.hiding_tokens is None:
        return text
    return f"{text}, less than computing from {transfer.hiding_tokens:,} tokens a micro-batch"


def _price(time: StepTime) -> str:
    return "" if time.price is None else f", price {time.price:.2f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else format_duration(seconds)


def _of(size: int, has: int | None) -> str:
    text = f"{size / 2**30:7.2f}"
    return f"{text} GiB" if has is None else f"{text} of {has / 2**30:.2f} GiB"


def _bar(size: int, has: int | None) -> str:
    if not has:
        return ""
    filled = min(BAR, round(BAR * size / has))
    text = "[" + "#" * filled + "." * (BAR - filled) + "]"
    return click.style(text, fg="red" if size > has else "green")
