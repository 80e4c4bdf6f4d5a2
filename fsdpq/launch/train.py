"""The flow of ``fsdpq train``: everything between a command line and a trained adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fsdpq.errors import LaunchError, RunStoppedError
from fsdpq.launch.inputs.base_cache import find_base, held_inputs, remove_damaged_base
from fsdpq.launch.inputs.fetched import fetch_inputs, make_inputs, shrink
from fsdpq.launch.inputs.harness_data import fetch_task_data
from fsdpq.launch.inputs.prepare import prepare_inputs
from fsdpq.launch.lock_file import describe_run
from fsdpq.launch.machine.devices import check_bf16, list_gpus
from fsdpq.launch.machine.kernels import check_kernels
from fsdpq.launch.machine.resolve import explain_dtype, resolve_launch
from fsdpq.launch.quantize import QUANTIZER, QuantizeJob
from fsdpq.launch.ranks.failure import count_oom_kills, explain_failure
from fsdpq.launch.ranks.keeper import RunKeeper
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.torchrun import WORKER, Row, check_endpoint, run_torchrun
from fsdpq.launch.ranks.watch import HangWatch
from fsdpq.launch.run_dir import check_run_dir, create_run_dir
from fsdpq.launch.screen import Screen
from fsdpq.recipe.checks.facts import told_dtype
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.registry import check_packages
from fsdpq.run_files import RunFiles

CheckInputs = Callable[[dict[str, Any]], None]
"""Looks at ``inputs`` of the lock before any rank starts; raises where they will not do."""


def train(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    screen: Screen,
    smoke: bool = False,
    trust_remote_code: bool = False,
    worker: Sequence[str] = WORKER,
    quantizer: Sequence[str] = QUANTIZER,
) -> RunFiles:
    """Trains the recipe and returns its run directory.

    Args:
        recipe_path: the recipe's file.
        overrides: from the command line.
        run_dir: a new directory; None takes one in ``runs/``.
        screen: shows what happens.
        smoke: train a few steps of a tiny random model of the same family instead, on the CPU.
        trust_remote_code: let the ranks run Python code that the model brings. It goes to the
            ranks as an argument, so neither a recipe nor a run directory can ask for it.
        worker: arguments of torchrun that name the worker.
        quantizer: the same for the worker that makes the quantized base.

    Raises:
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    return train_loaded(
        load_recipe(recipe_path, overrides),
        run_dir=run_dir,
        screen=screen,
        smoke=smoke,
        trust_remote_code=trust_remote_code,
        worker=worker,
        quantizer=quantizer,
    )


def train_loaded(
    loaded: LoadedRecipe,
    *,
    run_dir: Path | None,
    screen: Screen,
    smoke: bool = False,
    trust_remote_code: bool = False,
    worker: Sequence[str] = WORKER,
    quantizer: Sequence[str] = QUANTIZER,
    check_inputs: CheckInputs | None = None,
) -> RunFiles:
    """Trains a loaded recipe; see `train`.

    Args:
        loaded: the recipe.
        run_dir: see `train`, as for all others.
        screen: shows what happens.
        smoke: train a tiny random model.
        trust_remote_code: let the ranks run the model's code.
        worker: arguments of torchrun that name the worker.
        quantizer: the same for the worker that makes the quantized base.
        check_inputs: is given the inputs of the lock when all are there, and may raise.

    Raises:
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    if run_dir is not None:
        check_run_dir(run_dir)
    gpus = [] if smoke else list_gpus()
    recipe = _resolve_here(loaded, gpus, screen=screen, smoke=smoke)
    inputs = (
        make_inputs(loaded, screen=screen)
        if smoke
        else fetch_inputs(loaded, screen=screen, trust_remote_code=trust_remote_code)
    )
    job = QuantizeJob(loaded, recipe, gpus, inputs["model"], trust_remote_code, quantizer)
    base = find_base(job, screen=screen)
    inputs |= {"base": base} if base is not None else {}
    inputs |= prepare_inputs(recipe, inputs, screen=screen, trust_remote_code=trust_remote_code)
    if check_inputs is not None:
        check_inputs(inputs)
    lock = describe_run(
        loaded,
        recipe,
        gpus=gpus,
        inputs=inputs,
        trust_remote_code=trust_remote_code,
        smoke=smoke,
    )
    worker = (*worker, TRUST_FLAG) if trust_remote_code else worker
    with held_inputs(inputs):
        files = create_run_dir(recipe, raw=loaded.raw, lock=lock, run_dir=run_dir)
        run_ranks(files, recipe, inputs=inputs, screen=screen, worker=worker)
    return files


def _resolve_here(loaded: LoadedRecipe, gpus: list[str], *, screen: Screen, smoke: bool) -> Recipe:
    """Returns the recipe as it runs on this machine, which has all that it needs."""
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    wanted = shrink(loaded, screen=screen) if smoke else loaded.recipe
    recipe = resolve_launch(wanted, num_gpus=len(gpus))
    if why := explain_dtype(wanted, recipe):
        screen.report(f"note: {why}")
    check_packages(recipe)
    check_kernels(recipe)
    if recipe.launch.device == "cuda":
        check_bf16(told_dtype(recipe), gpus)
    check_endpoint(recipe.launch)
    if recipe.evaluation.tasks:
        fetch_task_data(recipe.evaluation.tasks, screen=screen)
    return recipe


def run_ranks(
    files: RunFiles,
    recipe: Recipe,
    *,
    inputs: dict[str, Any],
    screen: Screen,
    worker: Sequence[str],
) -> None:
    """Runs the ranks of a training run to their end.

    Args:
        files: the run directory.
        recipe: resolved.
        inputs: those of the lock.
        screen: shows what happens.
        worker: arguments of torchrun that name the worker.

    Raises:
        RunStoppedError: a signal stopped them.
        FsdpqError: what the first of them to fail reports.
    """
    screen.open_run(files)
    num_ranks, limit_s = int(recipe.launch.nproc_per_node), recipe.launch.hang_timeout_s
    keeper = RunKeeper(files, HangWatch(files, num_ranks, limit_s), screen.report)
    progress = _Progress(screen, keeper)
    oom_kills = count_oom_kills()
    try:
        code, stopped_by = run_torchrun(
            files, recipe.launch, on_row=progress.take, worker=worker, keeper=keeper
        )
    finally:
        screen.close()
    if stopped_by:
        raise progress.stopped(stopped_by, files)
    if code != 0:
        is_mapped = recipe.fsdp.offload == "disk" and "base" in inputs
        error = explain_failure(
            files,
            exit_code=code,
            oom_kills_before=oom_kills,
            mapped_base=Path(inputs["base"]["directory"]) if is_mapped else None,
        )
        remove_damaged_base(files, inputs, error)
        raise error
    if not progress.done:
        message = "the ranks ended without a result"
        raise LaunchError(message, hint=f"the logs are in `{files.logs}`")


class _Progress:
    """Passes rows on to the screen and remembers how far the run came."""

    def __init__(self, screen: Screen, keeper: RunKeeper) -> None:
        self._screen = screen
        self._keeper = keeper
        self._step = 0
        self._total_steps: int | None = None
        self.done = False

    def take(self, row: Row) -> None:
        """Takes one row of metrics or events."""
        if row.get("event") == "step":
            self._step, self._total_steps = row["step"], row.get("total_steps")
        self.done = self.done or row.get("event") == "done"
        self._keeper.take(row)
        self._screen.show_row(row)

    def stopped(self, signal_name: str, files: RunFiles) -> RunStoppedError:
        """Returns the one line for a run that was stopped."""
        after = f"after step {self._step} of {self._total_steps}" if self._step else "before step 1"
        message = f"stopped by {signal_name} {after}; its metrics and logs are in `{files.root}`"
        return RunStoppedError(message)
