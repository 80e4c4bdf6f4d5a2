"""The flow of ``fsdpq train``: everything between a command line and a trained adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fsdpq.launch.fit import keep_plan
from fsdpq.launch.inputs.base_cache import held_inputs
from fsdpq.launch.nodes.first import First
from fsdpq.launch.nodes.join import joined
from fsdpq.launch.nodes.member import Part, take_part
from fsdpq.launch.parent import end_with_parent
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.torchrun import WORKER
from fsdpq.launch.ready import Settled, gather_inputs, settle
from fsdpq.launch.resume import UNDO, Continuation, find_run, go_on
from fsdpq.launch.run_ranks import run_ranks
from fsdpq.launch.runs.ownership import owned
from fsdpq.launch.runs.run_dir import check_run_dir, create_run_dir
from fsdpq.launch.screen import Screen
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.run_files.paths import RunFiles

CheckInputs = Callable[[dict[str, Any]], None]
"""Looks at ``inputs`` of the lock before any rank starts; raises where they will not do."""


def train(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    screen: Screen,
    smoke: bool = False,
    node_rank: int | None = None,
    trust_remote_code: bool = False,
    worker: Sequence[str] = WORKER,
) -> RunFiles:
    """Trains the recipe and returns its run directory.

    Args:
        recipe_path: the recipe's file.
        overrides: from the command line.
        run_dir: a new directory; None takes one in ``runs/``.
        screen: shows what happens.
        smoke: train a few steps of a tiny random model of the same family instead, on the CPU.
        node_rank: place of this machine among several; None takes any.
        trust_remote_code: let the ranks run Python code that the model brings. It goes to the
            ranks as an argument, so neither a recipe nor a run directory can ask for it.
        worker: arguments of torchrun that name the worker.

    Raises:
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    return train_loaded(
        load_recipe(recipe_path, overrides),
        run_dir=run_dir,
        screen=screen,
        smoke=smoke,
        node_rank=node_rank,
        trust_remote_code=trust_remote_code,
        worker=worker,
    )


def train_loaded(
    loaded: LoadedRecipe,
    *,
    run_dir: Path | None,
    screen: Screen,
    smoke: bool = False,
    node_rank: int | None = None,
    trust_remote_code: bool = False,
    worker: Sequence[str] = WORKER,
    check_inputs: CheckInputs | None = None,
) -> RunFiles:
    """Trains a loaded recipe; see `train`.

    Args:
        loaded: the recipe.
        run_dir: see `train`, as for all others.
        screen: shows what happens.
        smoke: train a tiny random model.
        node_rank: place of this machine among several.
        trust_remote_code: let the ranks run the model's code.
        worker: arguments of torchrun that name the worker.
        check_inputs: is given the inputs of the lock when all are there, and may raise.

    Raises:
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    end_with_parent()
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    # What is reproduced begins anew, also where the recipe would find the run itself.
    goes_on = loaded.recipe.checkpoint.resume == "auto" and not smoke and check_inputs is None
    is_new = run_dir is not None and not goes_on
    if run_dir is not None and is_new and loaded.recipe.launch.max_nodes == 1:
        check_run_dir(run_dir)
    settled = settle(loaded, screen=screen, smoke=smoke, trust_remote_code=trust_remote_code)
    worker = (*worker, TRUST_FLAG) if trust_remote_code else worker
    with joined(
        settled, node_rank=node_rank, run_dir=run_dir, screen=screen, worker=worker
    ) as nodes:
        if isinstance(nodes, Part):
            return take_part(nodes)
        if goes_on and (found := find_run(settled.recipe, run_dir)) is not None:
            wanted = Continuation(from_start=True, hint=UNDO)
            return go_on(found, settled, wanted, screen=screen, worker=worker, nodes=nodes)
        if run_dir is not None and is_new:
            check_run_dir(run_dir)
        return _begin(
            settled, nodes, run_dir, screen=screen, worker=worker, check_inputs=check_inputs
        )


def _begin(
    settled: Settled,
    nodes: First | None,
    run_dir: Path | None,
    *,
    screen: Screen,
    worker: Sequence[str],
    check_inputs: CheckInputs | None,
) -> RunFiles:
    """Makes the inputs and the run directory, and runs the ranks to their end."""
    recipe = settled.recipe
    inputs = gather_inputs(settled, screen=screen)
    if check_inputs is not None:
        check_inputs(inputs)
    lock = settled.describe(inputs)
    if nodes is not None:
        nodes.take_inputs(inputs)
        lock["nodes"] = nodes.describe()
    with held_inputs(inputs):
        files = create_run_dir(recipe, raw=settled.loaded.raw, lock=lock, run_dir=run_dir)
        keep_plan(files, settled, inputs)
        with owned(files, screen=screen):
            run_ranks(files, recipe, inputs=inputs, screen=screen, worker=worker, nodes=nodes)
    return files
