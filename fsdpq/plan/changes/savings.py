"""What a run that ran out of memory in one phase could have done: single changes, by the plan.

For choosing, not for promising: memory ran out, so the plan was not right about this run. A change
is listed where it frees what that phase holds, and where the recipe stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsdpq.plan.case import Case
from fsdpq.plan.changes.moves import Move, list_moves
from fsdpq.plan.changes.settings import Settings, apply_settings, as_overrides, problems_of
from fsdpq.plan.result import Phase
from fsdpq.plan.shape import ModelShape
from fsdpq.recipe.root import Recipe

RunPhase = Literal["load", "forward", "backward", "optimizer", "evaluation"]

MIN_SHARE = 0.003
"""Of what is held; a change that frees less is none."""

_EVALUATION: Settings = (
    ("fsdp.activation_checkpointing", "full"),
    ("fsdp.activation_offload", True),
    ("fsdp.no_sync", False),
)
"""Keeps nothing for a backward pass, as an evaluation."""


@dataclass(frozen=True)
class Saving:
    """A change of the recipe.

    Attributes:
        overrides: ``section.field=value``, to be added to the command line together.
        saved_bytes: about how much less a rank holds on its device.
        note: what else it changes, may be empty.
    """

    overrides: tuple[str, ...]
    saved_bytes: int
    note: str = ""


def list_savings(
    recipe: Recipe, shape: ModelShape, phase: RunPhase, *, base_dir: Path, asked_bytes: int = 0
) -> list[Saving]:
    """Returns the changes that help, most helpful first; those that change results come last.

    Args:
        recipe: resolved.
        shape: of its model.
        phase: in which memory ran out.
        base_dir: directory that the recipe's relative paths start from.
        asked_bytes: that could not be had: of changes of one sort, the mildest that frees as many.
    """
    case = Case(shape, base_dir=base_dir)
    found = (_choose(moves, recipe, case, phase, asked_bytes) for moves in list_moves(recipe))
    known = (saving for saving in found if saving is not None)
    return sorted(known, key=lambda saving: (bool(saving.note), -saving.saved_bytes))


def _choose(
    moves: Sequence[Move], recipe: Recipe, case: Case, phase: RunPhase, asked_bytes: int
) -> Saving | None:
    """Returns the mildest of the moves that frees enough, else the one that frees most."""
    known = problems_of(recipe, case.base_dir)
    before = _held(recipe, case, phase)
    best: Saving | None = None
    for move in moves:
        changed = apply_settings(recipe, move.settings)
        if problems_of(changed, case.base_dir) - known:
            continue
        saved = before - _held(changed, case, phase)
        if saved > max(MIN_SHARE * before, best.saved_bytes if best else 0):
            note = "another result" if move.changes_result else ""
            best = Saving(as_overrides(move.settings, None, changed), saved, note)
        if best and best.saved_bytes >= asked_bytes:
            break
    return best


def _held(recipe: Recipe, case: Case, phase: RunPhase) -> int:
    """Returns the most that tensors of rank 0 take on a GPU in a phase; fragments are apart."""
    planned: Phase = "forward" if phase == "evaluation" else phase
    settings: Settings = (("launch.device", "cuda"),)
    settings += _EVALUATION if phase == "evaluation" else ()
    device = case.memory(apply_settings(recipe, settings)).device
    return max((each.allocated for each in device.moments if each.phase == planned), default=0)
