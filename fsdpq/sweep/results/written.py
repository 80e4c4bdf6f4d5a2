"""The files that results are kept in: tables for scripts and spreadsheets, the best recipe."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdpq.run_files.sweep_paths import SweepFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.sweep.results.measures import KNOWN, format_measure
from fsdpq.sweep.results.results import Results, TrialResult


def write_tables(files: SweepFiles, results: Results) -> None:
    """Writes ``results.csv`` and ``results.json``, each whole or not at all.

    Raises:
        OSError: the directory cannot be written.
    """
    text = json.dumps(results.as_json(), indent=2, ensure_ascii=False, default=str)
    write_whole(files.results_json, (text + "\n").encode(errors="replace"))
    write_whole(files.results_csv, render_csv(results).encode(errors="replace"))


def render_csv(results: Results) -> str:
    """Returns one row a trial: rank, id, status, settings, measures, reason; nothing is empty."""
    names = [*KNOWN, *(name for name in results.measured if name not in KNOWN)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["rank", "id", "status", *results.settings, *names, "reason"])
    for trial in results.trials:
        rank = "" if trial.rank is None else trial.rank
        settings = [plain_text(trial.settings.get(key)) for key in results.settings]
        measures = [trial.measures.get(name, "") for name in names]
        writer.writerow([rank, trial.id, trial.status, *settings, *measures, trial.reason])
    return buffer.getvalue()


def write_best(files: SweepFiles, results: Results) -> None:
    """Writes the recipe of the best trial, complete; an old one goes where there is none.

    Raises:
        OSError: the directory cannot be written.
    """
    text = render_best(files, results)
    if text is None:
        files.best_recipe.unlink(missing_ok=True)
    else:
        write_whole(files.best_recipe, text.encode())


def render_best(files: SweepFiles, results: Results) -> str | None:
    """Returns the content of ``best.yaml``; None where no trial is best, or its recipe is gone."""
    best = results.best
    if best is None:
        return None
    try:
        recipe = files.recipe(best.id).read_text(encoding="utf-8")
    except OSError:
        return None
    return "".join(f"# {line}\n" for line in _header(results, best)) + recipe


def train_command(trial: TrialResult) -> str:
    """Returns the command line that trains what a trial trained, from the user's own recipe.

    A recipe below the current directory is named from there: pages are passed on.
    """
    return shlex.join(["fsdpq", "train", str(_from_here(trial.source)), *trial.overrides])


def plain_text(value: Any) -> str:
    """Returns a setting as a cell: numbers as Python writes them, YAML's words, lists as JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _header(results: Results, best: TrialResult) -> Iterator[str]:
    measure = results.goal.measure
    value = format_measure(measure, best.measures[measure])
    num_ranked = sum(trial.rank is not None for trial in results.trials)
    trials = f"{num_ranked} trial{'' if num_ranked == 1 else 's'}"
    yield f"The best of {trials} of the sweep {_one_line(results.name)}: {measure} {value}."
    if best.label:
        yield f"What the sweep chose: {_one_line(best.label)}."
    if results.smoke:
        yield "The trials were smoke runs of a tiny model over made-up rows: they show what works,"
        yield "not what is good."
    yield _one_line(train_command(best))
    yield "The same, complete, follows; its relative paths start from the directory of --base-dir:"
    base_dir = shlex.quote(str(_from_here(best.base_dir)))
    yield _one_line(f"fsdpq train best.yaml --base-dir {base_dir}")


def _from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
