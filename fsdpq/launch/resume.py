"""Going on with a run: ``fsdpq resume RUN``, and ``fsdpq train`` with ``checkpoint.resume: auto``.

A run goes on in its own directory. It is refused where the result would be that of another run
(`fsdpq.recipe.continuation`), unless the user insists; the lock keeps what was insisted on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.launch.fit import keep_plan
from fsdpq.launch.inputs.base_cache import held_inputs
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.nodes.first import First
from fsdpq.launch.nodes.join import joined
from fsdpq.launch.nodes.member import Part, take_part
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.torchrun import WORKER
from fsdpq.launch.ready import Settled, gather_inputs, settle
from fsdpq.launch.run_ranks import run_ranks
from fsdpq.launch.runs.lock_file import as_list
from fsdpq.launch.runs.ownership import owned
from fsdpq.launch.runs.recorded import RecordedRun, open_recorded
from fsdpq.launch.runs.run_dir import JOB_FOLDER, empty_run_dir, newest_run_dir
from fsdpq.launch.runs.saved_run import (
    Change,
    SavedRun,
    list_versions,
    open_saved_run,
    refusal,
)
from fsdpq.launch.runs.trained_run import NAME_A_RUN
from fsdpq.launch.screen import Screen
from fsdpq.launch.slurm.training_job import check_no_job
from fsdpq.recipe.load import LoadedRecipe, dump_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

INSIST = "go on all the same with `--force`, or start a new run with `fsdpq train`"
UNDO = (
    "undo the change, or start a new run: another `--run-dir`, or `checkpoint.resume=never`; to "
    "insist, give the change to `fsdpq resume` with `--force`"
)


@dataclass(frozen=True)
class Continuation:
    """How a run is to go on.

    Attributes:
        overrides: of the command line.
        force: go on although it becomes another run.
        from_start: the recipe is given anew: start at the first step where there is no checkpoint.
        hint: what to do where it is refused.
    """

    overrides: tuple[str, ...] = ()
    force: bool = False
    from_start: bool = False
    hint: str = INSIST


def resume(
    run_dir: Path,
    overrides: Sequence[str],
    *,
    screen: Screen,
    force: bool = False,
    node_rank: int | None = None,
    trust_remote_code: bool = False,
    worker: Sequence[str] = WORKER,
) -> RunFiles:
    """Goes on with the run in ``run_dir`` from its newest whole checkpoint; returns its directory.

    Args:
        run_dir: of a run that did not come to its end.
        overrides: of its recipe.
        screen: shows what happens.
        force: go on although settings, rows or the base are others than before.
        node_rank: place of this machine among several; None takes any.
        trust_remote_code: let the ranks run Python code that the model brings.
        worker: arguments of torchrun that name the worker.

    Raises:
        UsageError: there is no such run, it has no checkpoint, or it would become another run.
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    files = RunFiles(run_dir)
    if not files.lock.is_file():
        raise UsageError(f"`{run_dir}` is no run directory", hint=NAME_A_RUN)
    recorded = open_recorded(run_dir, trust_remote_code=trust_remote_code)
    loaded = load_for_this_machine(recorded, overrides, screen=screen)
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    settled = settle(loaded, screen=screen, trust_remote_code=trust_remote_code)
    wanted = Continuation(tuple(overrides), force=force)
    worker = (*worker, TRUST_FLAG) if trust_remote_code else worker
    with joined(
        settled, node_rank=node_rank, run_dir=run_dir, screen=screen, worker=worker
    ) as nodes:
        if isinstance(nodes, Part):
            return take_part(nodes)
        return go_on(files, settled, wanted, screen=screen, worker=worker, nodes=nodes)


def load_for_this_machine(
    recorded: RecordedRun, overrides: Sequence[str], *, screen: Screen
) -> LoadedRecipe:
    """Returns a run's recipe; what its machine decided is for this machine to decide again.

    More ranks than there are GPUs become as many as there are: the rows of a step stay the same.

    Raises:
        RecipeError: an override is wrong, or does not fit the recipe.
    """
    told = {text.lstrip("+~").partition("=")[0] for text in overrides}
    again = [f"{key}=auto" for key in as_list(recorded.lock.get("auto")) if key not in told]
    loaded = recorded.load([*again, *overrides])
    launch, num_gpus = loaded.recipe.launch, len(list_gpus())
    ranks = launch.nproc_per_node
    if launch.device != "cuda" or ranks == "auto" or "launch.nproc_per_node" in told:
        return loaded
    if 0 < num_gpus < ranks:
        screen.report(f"note: {num_gpus} ranks instead of {ranks}: this machine has no more GPUs")
        return recorded.load([*again, *overrides, f"launch.nproc_per_node={num_gpus}"])
    return loaded


def find_run(recipe: Recipe, run_dir: Path | None) -> RunFiles | None:
    """Returns the run that a recipe with ``checkpoint.resume: auto`` goes on with, if any.

    Args:
        recipe: resolved.
        run_dir: as the user gave it; None takes the newest one of the recipe in ``runs/``.

    Raises:
        UsageError: ``run_dir`` holds something that is no run.
    """
    directory = run_dir or newest_run_dir(recipe)
    if directory is None or not directory.exists():
        return None
    files = RunFiles(directory)
    if files.lock.is_file() and files.resolved.is_file():
        return files
    _clear_half_made(files)
    return None


def go_on(
    files: RunFiles,
    settled: Settled,
    wanted: Continuation,
    *,
    screen: Screen,
    worker: Sequence[str] = WORKER,
    nodes: First | None = None,
) -> RunFiles:
    """Runs the ranks from the newest checkpoint of a run directory to the end.

    Args:
        files: the run directory.
        settled: what is to run.
        wanted: how.
        screen: shows what happens.
        worker: arguments of torchrun that name the worker.
        nodes: the other machines, if any.

    Raises:
        UsageError: it is in use, has no checkpoint, or would become another run.
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    check_no_job(files)
    with owned(files, screen=screen):
        run = open_saved_run(files)
        if run.saved is not None or run.finished or not wanted.from_start:
            _check(run, run.settings_changes(settled), wanted)
        if run.finished and not wanted.overrides and not wanted.force:
            screen.report(f"the run `{files.root}` has finished: there is nothing left to do")
            screen.report("for more steps: `fsdpq resume RUN training.steps=N --force`")
            return files
        if run.saved is None and not wanted.from_start:
            raise _no_checkpoint(run)
        inputs = gather_inputs(settled, screen=screen)
        changes = run.all_changes(settled, inputs) if run.saved is not None else []
        _check(run, changes, wanted)
        for change in changes:
            screen.report(f"note: going on as another run: {change.text}")
        fresh = settled.describe(inputs)
        fresh |= {} if nodes is None else {"nodes": nodes.describe()}
        _write(run, settled, fresh, wanted, changes)
        keep_plan(files, settled, inputs)
        if nodes is not None:
            nodes.take_inputs(inputs)
        with held_inputs(inputs):
            run_ranks(
                files, settled.recipe, inputs=inputs, screen=screen, worker=worker, resumes=True,
                nodes=nodes,
            )  # fmt: skip
    return files


def _check(run: SavedRun, changes: list[Change], wanted: Continuation) -> None:
    new = [change for change in changes if not run.was_forced(change)]
    if new and not wanted.force:
        raise refusal(run, new, hint=wanted.hint)


def _no_checkpoint(run: SavedRun) -> UsageError:
    message = f"the run `{run.files.root}` has no checkpoint: it ended before it saved one"
    hint = f"start again with `fsdpq train {run.lock.get('recipe')}`; `checkpoint.interval=N` or "
    return UsageError(message, hint=hint + "`checkpoint.interval_minutes=N` saves earlier")


def _write(
    run: SavedRun,
    settled: Settled,
    fresh: dict[str, Any],
    wanted: Continuation,
    changes: list[Change],
) -> None:
    """Brings recipe and lock of the run directory up to date; what it started as stays on record.

    A run that starts at its first step gets a new lock.
    """
    given_anew = wanted.from_start
    if run.saved is None:
        lock = fresh
    else:
        entry = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": run.saved.step,
            "world_size": fresh["world_size"],
            "overrides": list(settled.loaded.overrides if given_anew else wanted.overrides),
            "forced": [change.as_json() for change in changes],
            "versions": list_versions(run.lock, fresh),
        }
        entry |= {"nodes": fresh["nodes"]} if "nodes" in fresh else {}
        now = {name: fresh[name] for name in ("inputs", "resolved", "provenance", "auto")}
        lock = {**run.lock, **now, "resumes": [*as_list(run.lock.get("resumes")), entry]}
    write_whole(run.files.lock, (json.dumps(lock, indent=2) + "\n").encode())
    write_whole(run.files.resolved, dump_recipe(settled.recipe).encode())
    if given_anew:
        write_whole(run.files.recipe, settled.loaded.raw)


def _clear_half_made(files: RunFiles) -> None:
    """Empties a run directory that a kill left before it was whole; refuses anything else."""
    own = {files.logs.name, files.recipe.name, files.resolved.name, JOB_FOLDER}
    found = {path.name for path in files.root.iterdir()} if files.root.is_dir() else {""}
    if not found <= own | {f".{name}.tmp" for name in (*own, files.lock.name)}:
        message = f"`{files.root}` exists and holds no run"
        raise UsageError(message, hint="name another directory with `--run-dir`")
    if files.root.is_dir():
        empty_run_dir(files)
