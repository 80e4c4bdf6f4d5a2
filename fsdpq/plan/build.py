"""From a recipe, a model and a machine to a `Plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fsdpq.plan.case import Case, Memory
from fsdpq.plan.changes.edits import find_edits
from fsdpq.plan.changes.hiding import find_advice
from fsdpq.plan.changes.limits import find_limits
from fsdpq.plan.changes.settings import apply_settings, problems_of
from fsdpq.plan.changes.variants import list_variants
from fsdpq.plan.device.notes import device_notes
from fsdpq.plan.disk import plan_disk
from fsdpq.plan.hardware.machine import GIB, Gpu, Machine
from fsdpq.plan.result import Plan
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.time import time_notes
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe

CARD_SIZES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 180, 192, 288)
"""Memory of the cards that can be had, in GiB."""

MOST_GPUS = 16
"""GPUs of a machine that are tried."""

FULL_ROWS = "every row is taken to be as long as `data.seq_len`, and every micro-batch full"

_SOURCES = {"card": "shipped card", "config": "config.json", "headers": "headers of its files"}


@dataclass(frozen=True)
class Wanted:
    """What a plan holds beside memory, time and verdict.

    Attributes:
        edits: what would make it fit, where it does not.
        limits: how far its settings can go.
        variants: other ways of holding the model.
    """

    edits: bool = True
    limits: bool = False
    variants: bool = False


def build_plan(
    recipe: Recipe,
    shape: ModelShape,
    machine: Machine,
    *,
    num_rows: int | None = None,
    base_dir: Path | None = None,
    accumulation: int | None = None,
    notes: tuple[str, ...] = (),
    wanted: Wanted | None = None,
) -> Plan:
    """Returns the plan of a resolved recipe.

    Args:
        recipe: resolved (`fsdpq.launch.machine.resolve`).
        shape: of its model.
        machine: that it is for.
        num_rows: training rows, None where they are not known.
        base_dir: directory that the recipe's relative paths start from.
        accumulation: ``training.gradient_accumulation_steps`` of the recipe as it was written:
            an edit of the batch changes it too.
        notes: go before those of the plan.
        wanted: what else is asked for.
    """
    wanted = wanted or Wanted()
    case = Case(shape, machine, num_rows, base_dir or Path())
    memory = case.memory(recipe)
    fits = case.fits(recipe, memory)
    find = wanted.edits and fits is False
    time = case.time(recipe, memory)
    return Plan(
        name=recipe.name,
        model=f"{shape.name} ({_SOURCES.get(shape.source, shape.source)})",
        device=memory.device,
        host=memory.host,
        disk=plan_disk(recipe, shape, memory.weights),
        time=replace(time, advice=find_advice(recipe, case, time, accumulation=accumulation)),
        fits=fits,
        shortages=case.shortages(recipe, memory),
        edits=find_edits(recipe, case, accumulation=accumulation) if find else (),
        notes=(*notes, FULL_ROWS, *device_notes(recipe, shape), *time_notes(recipe, machine, time)),
        machine=machine,
        workload=workload_of(recipe),
        device_type="cpu" if recipe.launch.device == "cpu" else "cuda",
        fits_on=tuple(_other_hardware(recipe, case, memory)) if fits is not True else (),
        limits=(
            find_limits(recipe, case, accumulation=accumulation)
            if wanted.limits and fits is not None
            else ()
        ),
        variants=list_variants(recipe, case, accumulation=accumulation) if wanted.variants else (),
    )


def _other_hardware(recipe: Recipe, case: Case, memory: Memory) -> Iterator[str]:
    """Yields the smallest card, and the fewest GPUs of the same card, that hold it as it is."""
    if recipe.launch.device == "cpu":
        return
    ranks, gpus = int(recipe.launch.nproc_per_node), case.machine.gpus
    number = recipe.launch.max_nodes
    each = f" on each of {number} machines" if number > 1 else ""
    if gpus and memory.peak_bytes <= gpus[0].memory_bytes:
        if ranks > len(gpus):
            yield f"{ranks} x {gpus[0].name}{each}"
        return
    size = next((size for size in CARD_SIZES if memory.peak_bytes <= size * GIB), None)
    if size is not None:
        yield f"{ranks} x {size} GiB{each}"
    if gpus and (count := _fewest_gpus(recipe, case, gpus[0])) is not None:
        yield f"{count} x {gpus[0].name}{each}"


def _fewest_gpus(recipe: Recipe, case: Case, gpu: Gpu) -> int | None:
    """Returns how many of ``gpu`` the recipe fits on, more than there are; None up to the most."""
    count = 2 * int(recipe.launch.nproc_per_node)
    known = problems_of(recipe, case.base_dir)
    while count <= MOST_GPUS:
        changed = apply_settings(recipe, (("launch.nproc_per_node", count),))
        allowed = not problems_of(changed, case.base_dir) - known
        if allowed and case.memory(changed).peak_bytes <= gpu.memory_bytes:
            return count
        count *= 2
    return None
