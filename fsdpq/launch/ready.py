"""From a loaded recipe to all that the ranks read: this machine's devices, model, base and rows.

What ``fsdpq train``, ``fsdpq resume`` and ``fsdpq reproduce`` have in common before any rank
starts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.launch.fit import refuse_early, show_fit
from fsdpq.launch.inputs.base_cache import find_base
from fsdpq.launch.inputs.fetched import fetch_inputs, make_inputs, shrink
from fsdpq.launch.inputs.harness_data import fetch_task_data
from fsdpq.launch.inputs.prepare import prepare_inputs
from fsdpq.launch.machine.devices import check_bf16, list_gpus
from fsdpq.launch.machine.kernels import check_kernels
from fsdpq.launch.machine.resolve import explain_dtype, resolve_launch
from fsdpq.launch.quantize import QUANTIZER, QuantizeJob
from fsdpq.launch.ranks.torchrun import check_endpoint
from fsdpq.launch.runs.lock_file import describe_run
from fsdpq.launch.screen import Screen
from fsdpq.plan.hardware.machine import Machine
from fsdpq.recipe.checks.facts import told_dtype
from fsdpq.recipe.load import LoadedRecipe
from fsdpq.recipe.root import Recipe
from fsdpq.registry import check_packages


@dataclass(frozen=True)
class Settled:
    """A recipe that can run on this machine.

    Attributes:
        loaded: as given.
        recipe: resolved.
        gpus: that the run may use.
        smoke: whether it is shrunk, and its model and rows are made up.
        trust_remote_code: whether the ranks may run code of the model.
    """

    loaded: LoadedRecipe
    recipe: Recipe
    gpus: Sequence[str]
    smoke: bool = False
    trust_remote_code: bool = False

    @functools.cached_property
    def machine(self) -> Machine:
        """This machine: ``nvidia-smi`` is asked once, however often the run is planned."""
        from fsdpq.launch.machine.this_machine import describe_this_machine

        return describe_this_machine()

    def describe(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the content of ``run.lock.json``."""
        lock = describe_run(
            self.loaded,
            self.recipe,
            gpus=self.gpus,
            inputs=inputs,
            trust_remote_code=self.trust_remote_code,
            smoke=self.smoke,
        )
        launch = self.loaded.recipe.launch
        asked = {"launch.device": launch.device, "launch.nproc_per_node": launch.nproc_per_node}
        return lock | {"auto": [key for key, value in asked.items() if value == "auto"]}


def settle(
    loaded: LoadedRecipe, *, screen: Screen, smoke: bool = False, trust_remote_code: bool = False
) -> Settled:
    """Returns the recipe resolved for this machine, which has all that it needs.

    Raises:
        EnvironmentProblemError: a device, a port or a package is missing.
        RecipeError: lm-evaluation-harness has no such task, or its questions cannot be had.
    """
    gpus = [] if smoke else list_gpus()
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
    return Settled(loaded, recipe, gpus, smoke, trust_remote_code)


def gather_inputs(
    settled: Settled, *, screen: Screen, quantizer: Sequence[str] = QUANTIZER
) -> dict[str, Any]:
    """Returns ``inputs`` of the lock: model, rows, quantized base and prepared data, made now.

    Args:
        settled: the recipe.
        screen: shows what happens.
        quantizer: arguments of torchrun that name the worker that makes the quantized base.

    Raises:
        PlanError: the run does not fit on this machine, by plan.
        FsdpqError: one message for whatever cannot be had.
    """
    loaded, recipe, trust = settled.loaded, settled.recipe, settled.trust_remote_code
    refuse_early(settled)
    if recipe.evaluation.tasks:
        fetch_task_data(recipe.evaluation.tasks, screen=screen)
    inputs = (
        make_inputs(loaded, screen=screen)
        if settled.smoke
        else fetch_inputs(loaded, screen=screen, trust_remote_code=trust)
    )
    show_fit(settled, Path(inputs["model"]["directory"]), screen=screen)
    job = QuantizeJob(loaded, recipe, settled.gpus, inputs["model"], trust, quantizer)
    base = find_base(job, screen=screen)
    inputs |= {"base": base} if base is not None else {}
    return inputs | prepare_inputs(recipe, inputs, screen=screen, trust_remote_code=trust)
