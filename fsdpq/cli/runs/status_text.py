"""How runs stand, as text: one in full, or those on their way as a table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from fsdpq.cli.render import clean, render_table
from fsdpq.launch.runs.pace import seconds_left
from fsdpq.launch.runs.status import RunStatus


def describe_run(status: RunStatus) -> Iterator[str]:
    """Yields the lines about one run: state and place, steps, losses, what ended it."""
    yield clean(str(status.root))
    where = f" ({status.where})" if status.where else ""
    phase = f", {status.phase}" if status.is_active and status.phase else ""
    yield f"  state   {status.state}{phase}{where}"
    if status.total_steps or status.step:
        total = f" of {status.total_steps}" if status.total_steps else ""
        left = (
            f", about {duration(rest)} left" if (rest := seconds_left(status)) is not None else ""
        )
        yield f"  step    {status.step}{total}{left}"
    losses = [
        f"{value:.4f} {name}"
        for name, value in (
            ("training", status.train_loss),
            ("held out", status.eval_loss),
            ("held out at best", status.best_eval_loss),
        )
        if value is not None and (name != "held out at best" or value != status.eval_loss)
    ]
    if losses:
        yield f"  loss    {', '.join(losses)}"
    if status.saved_step is not None:
        yield f"  saved   at step {status.saved_step}"
    if status.updated is not None:
        yield f"  wrote   {duration(time.time() - status.updated)} ago"
    if status.error:
        yield f"  error   {clean(status.error)}"


def list_active(stands: Sequence[RunStatus]) -> Iterator[str]:
    """Yields a table of the runs that are on their way, and how many others there are."""
    active = [status for status in stands if status.is_active]
    rows = [
        (
            clean(os.path.relpath(status.root)),
            status.state,
            f"{status.step}/{status.total_steps or '?'}",
            "" if status.train_loss is None else f"{status.train_loss:.4f}",
            clean(status.where),
        )
        for status in active
    ]
    if rows:
        rows.insert(0, ("run", "state", "step", "loss", "where"))
        yield from render_table(rows)
    others = len(stands) - len(active)
    runs = "1 other run is" if others == 1 else f"{others} other runs are"
    if not active:
        yield "no run is on its way" + (f"; {runs} in runs/" if others else "")
    elif others:
        yield f"{runs} not on their way: `fsdpq runs ls` lists them"


def duration(seconds: float) -> str:
    """Returns a length of time in its two largest units: ``3 min``, ``2 h 5 min``."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{max(0, int(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days"
