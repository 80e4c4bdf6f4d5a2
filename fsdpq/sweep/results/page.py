"""The page of a sweep, ``report.html``: one file that loads nothing and runs nothing.

What recipes and errors say is untrusted and escaped. Rows of the table and lines of the charts
that belong to one trial light up together, by style alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fsdpq.launch.runs.lock_file import as_list, as_mapping
from fsdpq.pages.environment import page_environment
from fsdpq.run_files.amounts import format_duration
from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.results.curves import describe_line, draw_curves, grade_trials
from fsdpq.sweep.results.effects import list_effects
from fsdpq.sweep.results.leaderboard import build_columns, counts_line, list_troubles
from fsdpq.sweep.results.measures import format_measure
from fsdpq.sweep.results.parallel import build_parallel
from fsdpq.sweep.results.results import Results
from fsdpq.sweep.results.written import render_best, train_command

TEMPLATE = "page.html.jinja"
SHOWN_ROWS = 25
"""Rows of the table before one has to ask for the others."""

MANY = 24
"""With more trials than this, curves are thin and have no dots."""

MOST_LIGHTS = 300
"""Trials whose lines light up together."""


@dataclass(frozen=True)
class Tile:
    """A headline number: what it is, its value, and a note below it."""

    label: str
    value: str
    note: str


def write_page(files: SweepFiles, results: Results) -> None:
    """Writes the page, whole or not at all.

    Raises:
        OSError: the directory cannot be written.
    """
    write_whole(files.page, render_page(files, results).encode(errors="replace"))


def render_page(files: SweepFiles, results: Results) -> str:
    """Returns the page of a sweep, finished or not.

    Args:
        files: the sweep directory, where runs and frozen recipes lie.
        results: of the sweep.
    """
    measure = results.goal.measure
    environment = page_environment(
        Path(__file__).parent, Path(__file__).parents[2] / "reports",
        filters={"goal": lambda value: format_measure(measure, value)},
    )  # fmt: skip
    best = results.best
    return environment.get_template(TEMPLATE).render(
        results=results,
        counts=counts_line(results),
        tiles=_tiles(results),
        best=best,
        command=train_command(best) if best else "",
        best_recipe=render_best(files, results),
        columns=build_columns(results),
        places={trial.id: index for index, trial in enumerate(results.trials)},
        grades=grade_trials(results),
        links=_links(files, results),
        shown_rows=SHOWN_ROWS,
        num_lights=min(MOST_LIGHTS, len(results.trials)),
        many=len(results.trials) > MANY,
        curves=draw_curves(files, results),
        parallel=build_parallel(results),
        describe=partial(describe_line, results),
        effects=list_effects(results),
        troubles=list_troubles(results),
        environment=_environment_rows(results.environment),
    )


def _tiles(results: Results) -> list[Tile]:
    goal = results.goal
    values = [t.measures[goal.measure] for t in results.trials if t.rank is not None]
    seconds = [t.measures["wall_s"] for t in results.trials if "wall_s" in t.measures]
    tiles = [Tile("trials", str(len(results.trials)), counts_line(results).partition(": ")[2])]
    if values:
        best, worst, middle = values[0], values[-1], statistics.median(values)
        shown = [format_measure(goal.measure, value) for value in (best, middle, worst)]
        tiles.insert(0, Tile(f"best {goal.measure}", shown[0], f"{goal.better} is better"))
        if len(values) > 1:
            note = f"the worst has {shown[2]}"
            tiles.insert(1, Tile(f"median {goal.measure}", shown[1], note))
    if seconds:
        mean = format_duration(sum(seconds) / len(seconds))
        tiles.append(Tile("time of all trials", format_duration(sum(seconds)), f"{mean} a trial"))
    return tiles


def _links(files: SweepFiles, results: Results) -> dict[str, str]:
    """Returns id -> address of the run's own report from the page, where there is one."""
    reports = {trial.id: files.run(trial.id).report_html for trial in results.trials}
    return {
        trial_id: path.relative_to(files.root).as_posix()
        for trial_id, path in reports.items()
        if path.is_file()
    }


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            rows += _environment_rows(as_mapping(value))
        elif value not in (None, [], ""):
            shown = ", ".join(map(str, as_list(value))) if isinstance(value, list) else str(value)
            rows.append((name, shown))
    return rows
