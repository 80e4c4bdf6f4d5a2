"""A plan beside what a trace or a measurement found, by phase and by category."""

from __future__ import annotations

from collections.abc import Iterator

import click

from fsdpq.cli.plan_text import LABELS, PHASES
from fsdpq.cli.render import render_table
from fsdpq.plan.host import early_process_bytes
from fsdpq.plan.result import Moment, Plan
from fsdpq.plan.traced import Traced
from fsdpq.run_files.amounts import format_bytes, format_duration

MAX_DIFFERENCE = 0.05
"""Between plan and trace; more is a mistake in one of them."""

_APART = ("context", "fragmentation", "workspace")
"""Categories that no operator of a trace allocates."""


def render_comparison(plan: Plan, found: Traced) -> Iterator[str]:
    """Yields the lines: peaks of the phases, then the categories of the highest one."""
    if found.how == "measure" and plan.device_type == "cpu":
        yield from _resident(plan, found)
        return
    done = "traced" if found.how == "trace" else "measured"
    took = format_duration(found.seconds)
    yield from ["", f"planned and {done} ({took}), tensors of rank 0 on its device"]
    yield from render_table([("phase", "planned", done, ""), *_phases(plan, found)], indent="  ")
    peak = found.device.peak
    planned = plan.device.phase_peak(peak.phase)
    if found.how == "trace" and planned is not None:
        yield f"at the peak of {peak.phase}, {peak.name}"
        yield from render_table(_parts(planned, peak), indent="  ")
    for what, size in (("reserved", found.reserved_bytes), ("taken", found.device_bytes)):
        if size is not None:
            words = "by torch" if what == "reserved" else "from the device, CUDA included"
            yield f"  {format_bytes(size)} {what} {words}; the plan says {_whole(plan)}"
    yield from (f"  {note}" for note in found.notes)


def _resident(plan: Plan, found: Traced) -> Iterator[str]:
    """Yields what the process of a rank took on a CPU, libraries and all, as the host plans it."""
    ranks = 1 if plan.workload is None else plan.workload.num_local_ranks
    peak, planned = found.device.peak, early_process_bytes(plan.host, ranks)
    yield from ["", f"planned and measured ({format_duration(found.seconds)}), memory of a process"]
    row = (f"peak, in {peak.phase}", *_beside(planned, peak.total))
    yield from render_table([("", "planned", "measured", ""), row], indent="  ")
    yield from (f"  {note}" for note in found.notes)


def _phases(plan: Plan, found: Traced) -> Iterator[tuple[str, ...]]:
    for phase in PHASES:
        planned, other = plan.device.phase_peak(phase), found.device.phase_peak(phase)
        if planned is not None and other is not None:
            mine, theirs = (
                moment.allocated - (moment.parts.get("workspace", 0) if found.how == "trace" else 0)
                for moment in (planned, other)
            )
            yield phase, *_beside(mine, theirs)


def _parts(planned: Moment, other: Moment) -> Iterator[tuple[str, ...]]:
    for name in dict.fromkeys((*LABELS, *planned.parts, *other.parts)):
        mine, theirs = planned.parts.get(name, 0), other.parts.get(name, 0)
        if name not in _APART and (mine or theirs):
            yield LABELS.get(name, name), *_beside(mine, theirs)


def _beside(planned: int, other: int) -> tuple[str, str, str]:
    """Returns both sizes and the difference; red where it is more than it may be."""
    sizes = format_bytes(planned).rjust(10), format_bytes(other).rjust(10)
    if not other:
        return *sizes, ""
    difference = planned / other - 1
    text = f"{100 * difference:+.1f} %"
    return *sizes, click.style(text, fg="red") if abs(difference) > MAX_DIFFERENCE else text


def _whole(plan: Plan) -> str:
    return format_bytes(plan.device.peak.total)
