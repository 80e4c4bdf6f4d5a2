"""The plan of a run, before it starts: what it will take, and a refusal where no GPU has that.

A plan may be wrong, and it must not stop a run by being unable to plan: what it cannot tell is a
note. It refuses memory of a GPU only; a host has swap and file pages to give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdpq.cards.families import FAMILIES
from fsdpq.errors import FsdpqError, PlanError
from fsdpq.launch.runs.lock_file import as_mapping
from fsdpq.launch.screen import Screen
from fsdpq.run_files.amounts import format_bytes
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import write_whole

if TYPE_CHECKING:
    from fsdpq.launch.ready import Settled
    from fsdpq.plan.result import Edit, Plan, RankMemory
    from fsdpq.plan.shape import ModelShape

GO_ON = "`launch.plan_check=false` goes on all the same"
MOST_EDITS = 6
UNSURE = "the model's family is not known: what its layers make is a guess"


def refuse_early(settled: Settled) -> None:
    """Refuses a run that does not fit before its model is fetched, where its shape is known.

    Raises:
        PlanError: it does not fit.
    """
    from fsdpq.plan.shapes.find import find_shape

    if not _may_refuse(settled):
        return
    name, base_dir = settled.recipe.model.name_or_path, settled.loaded.base_dir
    plan, _ = _try(settled, lambda: find_shape(name, base_dir))
    if plan is not None:
        _refuse(settled, plan)


def show_fit(settled: Settled, model_dir: Path, *, screen: Screen) -> None:
    """Says what a run takes by plan, now that its model is here.

    Args:
        settled: the run.
        model_dir: of its model.
        screen: shows one line, and notes.

    Raises:
        PlanError: it does not fit.
    """
    plan, reason = _plan_directory(settled, model_dir)
    if plan is None:
        screen.report(f"note: there is no plan of this run: {reason}")
        return
    screen.report(f"plan: {describe_plan(plan)}")
    ram, host = plan.machine.ram_bytes, plan.host.peak
    if ram is not None and host > ram:
        screen.report(
            f"note: by plan the host needs {format_bytes(host)} and has {format_bytes(ram)}: "
            f"the system may swap, or end a rank{_way_out(plan)}"
        )
    _refuse(settled, plan)


def keep_plan(files: RunFiles, settled: Settled, inputs: Mapping[str, Any]) -> None:
    """Writes ``plan.json`` of a run whose inputs are all there.

    Args:
        files: the run directory.
        settled: the run.
        inputs: those of the lock.
    """
    from fsdpq.plan.as_json import plan_json

    model_dir = Path(inputs["model"]["directory"])
    plan, _ = _plan_directory(settled, model_dir, num_rows=_num_rows(inputs))
    if plan is None:
        files.plan.unlink(missing_ok=True)  # that of an earlier start is of another run
        return
    write_whole(files.plan, (json.dumps(plan_json(plan), indent=2) + "\n").encode())


def describe_plan(plan: Plan) -> str:
    """Returns what a run takes in one line: ``12.3 GiB of 24.0 GiB a GPU, ... of host memory``."""
    machine = plan.machine
    host = f"{_of(plan.host.peak, machine.ram_bytes)} of host memory"
    if plan.host.file_backed_bytes:
        host += f", and {format_bytes(plan.host.file_backed_bytes)} of the base as pages of a file"
    if plan.device_type == "cpu":
        return host
    return f"{_of(plan.device.peak.total, machine.gpu_bytes)} a GPU, {host}"


def describe_shortage(device: RankMemory, has: int) -> str:
    """Returns what a GPU lacks in words.

    Args:
        device: what a rank takes.
        has: bytes of its GPU.
    """
    peak = device.peak
    return f"a GPU needs {format_bytes(peak.total)} and has {format_bytes(has)} ({peak.name})"


def _of(needed: int, there: int | None) -> str:
    has = "" if there is None else f" of {format_bytes(there)}"
    return f"{format_bytes(needed)}{has}"


def _plan_directory(
    settled: Settled, model_dir: Path, *, num_rows: int | None = None
) -> tuple[Plan | None, str]:
    from fsdpq.plan.shapes.from_directory import shape_from_directory

    return _try(settled, lambda: shape_from_directory(model_dir), num_rows=num_rows)


def _try(
    settled: Settled, find: Callable[[], ModelShape | None], *, num_rows: int | None = None
) -> tuple[Plan | None, str]:
    """Returns the plan of a run, or None and why there is none."""
    try:
        shape = find()
        return (None, "") if shape is None else (_build(settled, shape, num_rows), "")
    except FsdpqError as error:
        return None, error.message
    except Exception as error:  # whatever a plan cannot do, the run may be able to
        return None, f"{type(error).__name__}: {error}"


def _build(settled: Settled, shape: ModelShape, num_rows: int | None) -> Plan:
    from fsdpq.plan.build import Wanted, build_plan

    recipe, machine = settled.recipe, settled.machine
    if machine.gpus:
        used = int(recipe.launch.nproc_per_node)
        machine = replace(machine, gpus=machine.gpus[:used])
    is_known = shape.model_type in FAMILIES
    return build_plan(
        recipe,
        shape,
        machine,
        num_rows=num_rows,
        base_dir=settled.loaded.base_dir,
        accumulation=settled.loaded.recipe.training.gradient_accumulation_steps,
        notes=() if is_known else (UNSURE,),
        wanted=Wanted(edits=is_known and _may_refuse(settled)),
    )


def _may_refuse(settled: Settled) -> bool:
    launch = settled.recipe.launch
    return launch.device == "cuda" and launch.plan_check and not settled.smoke


def _refuse(settled: Settled, plan: Plan) -> None:
    """Raises where a GPU has too little memory, and the plan knows what it plans."""
    has, needed = plan.machine.gpu_bytes, plan.device.peak.total
    if not _may_refuse(settled) or UNSURE in plan.notes or has is None or needed <= has:
        return
    message = f"by plan the run does not fit: {describe_shortage(plan.device, has)}"
    hint = f"more GPUs, or a smaller model; {GO_ON}"
    if plan.edits:
        hint = f"add `{' '.join(plan.edits[0].settings)}`; {GO_ON}"
    raise PlanError(message, hint=hint, details="\n".join(_table(plan)))


def _table(plan: Plan) -> Iterator[str]:
    """Yields what would make a run fit, fastest first."""
    if plan.edits:
        yield "what would make it fit, by plan"
    rows = [(" ".join(edit.settings), _words(edit)) for edit in plan.edits[:MOST_EDITS]]
    width = max((len(settings) for settings, _ in rows), default=0)
    yield from (f"  {settings:<{width}}  {words}" for settings, words in rows)
    if plan.fits_on:
        yield f"it fits as it is on {' or '.join(plan.fits_on)}"


def _way_out(plan: Plan) -> str:
    return f"; `{' '.join(plan.edits[0].settings)}` fits" if plan.edits else ""


def _words(edit: Edit) -> str:
    words = f"{format_bytes(edit.peak_bytes)} a GPU, {format_bytes(edit.host_bytes)} of the host"
    if edit.slowdown is not None:
        words += f", {edit.slowdown:.2f} x the time"
    return words + (", other results" if edit.changes_result else "")


def _num_rows(inputs: Mapping[str, Any]) -> int | None:
    """Returns the rows that the loader deals in an epoch, None where they come while training."""
    report = as_mapping(as_mapping(inputs.get("prepared")).get("report"))
    number = report.get("num_sequences")
    return number if isinstance(number, int) and number > 0 else None
