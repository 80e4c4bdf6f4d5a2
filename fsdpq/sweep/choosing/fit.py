"""Whether a trial fits on a machine, by plan, before anything is started for it.

The arithmetic and the doubts are those of ``fsdpq train``'s own refusal (`fsdpq.launch.fit`):
memory of GPUs only, nothing of a model whose family is not known, nothing where a recipe says
``launch.plan_check: false``. A plan takes about a millisecond, a model's shape is read once.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from fsdpq.cards.families import FAMILIES
from fsdpq.errors import FsdpqError
from fsdpq.launch.fit import describe_shortage
from fsdpq.launch.plan import resolve_for
from fsdpq.plan.case import Case
from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.find import find_shape
from fsdpq.sweep.trial import Trial


def why_not(trial: Trial, machine: Machine) -> str:
    """Returns why a trial cannot run on ``machine``, in a sentence; empty where it may.

    Args:
        trial: that is trained, not only tried (``--smoke``).
        machine: this one, or the one that ``--gpus`` describes.
    """
    recipe = trial.recipe
    if not machine.gpus or not recipe.launch.plan_check or recipe.launch.device == "cpu":
        return ""
    asked, there = recipe.launch.nproc_per_node, len(machine.gpus)
    if asked != "auto" and asked > there:
        have = "there is 1 GPU" if there == 1 else f"there are {there} GPUs"
        return f"`launch.nproc_per_node` asks for {asked} ranks and {have}"
    shape = _shape(recipe.model.name_or_path, trial.base_dir)
    if shape is None or shape.model_type not in FAMILIES:
        return ""
    try:
        return _shortage(trial, shape, machine)
    except FsdpqError:
        return ""  # what cannot be planned may still run; `fsdpq train` says the same


def _shortage(trial: Trial, shape: ModelShape, machine: Machine) -> str:
    """Returns what a GPU of ``machine`` lacks for a trial, empty where it has it."""
    recipe, _ = resolve_for(trial.recipe, machine)
    used = replace(machine, gpus=(machine.gpus or ())[: int(recipe.launch.nproc_per_node)])
    has = used.gpu_bytes
    case = Case(shape, used, base_dir=trial.base_dir)
    memory = case.memory(recipe)
    if has is None or memory.peak_bytes <= has:
        return ""
    return f"by plan {describe_shortage(memory.device, has)}"


@lru_cache(maxsize=256)
def _shape(name: str, base_dir: Path) -> ModelShape | None:
    """Returns the shape of a model, None where this machine cannot tell."""
    try:
        return find_shape(name, base_dir)
    except FsdpqError:
        return None
