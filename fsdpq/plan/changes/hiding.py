"""Settings with which moving weights takes less time than computing.

A micro-batch moves all weights twice, however many rows it has. More rows, in chunks as large as
before (``training.layer_chunks``), compute longer for the same transfer and take no more working
memory; what checkpointing keeps of them grows, and may go to the host. Every suggestion is planned
again: it is allowed, fits, hides the transfer and is faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fsdpq.plan.case import Case
from fsdpq.plan.changes.settings import GLOBAL, Settings, apply_settings, as_overrides, problems_of
from fsdpq.plan.result import StepTime, Transfer
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.root import Recipe

MOST_ROWS = 1024
"""Of a micro-batch; a transfer that more would have to hide does not hide."""

MIN_GAIN = 1.02
"""Times as many tokens a second, below which a suggestion is not worth its words."""

SMALL_SHARE = 0.2
"""Of the time to compute: what does not run beside the computation should add less than this."""

ACTIVATIONS = "activations"

OVER_BUS = ("host to device", "device to host", "gather", "reduce")
"""Transfers that may share one bus: they have to hide together."""


def find_advice(
    recipe: Recipe, case: Case, time: StepTime, *, accumulation: int | None
) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Returns the smallest settings that hide the transfer of weights, with the reason.

    Args:
        recipe: resolved.
        case: model and machine.
        time: of a step of the recipe.
        accumulation: as `fsdpq.plan.build.build_plan` has it.

    Returns:
        One suggestion, or none where it hides already, nothing is known of the GPU, or nothing
        helps.
    """
    needed = tokens_to_hide(time.transfers)
    work = workload_of(recipe)
    if needed is None or time.tokens_per_s is None or needed <= work.tokens:
        return ()
    known = problems_of(recipe, case.base_dir)
    for settings in _candidates(recipe, work, -(-needed // work.seq_len)):
        changed = apply_settings(recipe, settings)
        if problems_of(changed, case.base_dir) - known:
            continue
        memory = case.memory(changed)
        if case.fits(changed, memory) is False:
            continue
        then = case.time(changed, memory)
        hidden = (tokens_to_hide(then.transfers) or 0) <= workload_of(changed).tokens
        gain = (then.tokens_per_s or 0.0) / time.tokens_per_s
        if hidden and gain >= MIN_GAIN:
            reason = f"{_reason(time.transfers, needed)}; {gain:.2f} times as many tokens a second"
            return ((as_overrides(settings, accumulation, changed), reason),)
    return ()


def _reason(transfers: tuple[Transfer, ...], needed: int) -> str:
    hidden = all(each.hides for each in transfers if each.link != ACTIVATIONS)
    does = "takes less time than" if hidden else f"adds less than {SMALL_SHARE:.0%} to"
    return f"moving weights {does} computing from {needed:,} tokens a micro-batch on"


def tokens_to_hide(transfers: tuple[Transfer, ...]) -> int | None:
    """Returns from how many tokens of a micro-batch on every transfer of weights hides.

    Where one does not run beside the computation: from how many on it adds little to it.

    Returns:
        None where there is none, or one of them is not known.
    """
    weights = [each for each in transfers if each.link != ACTIVATIONS]
    found = [each.hiding_tokens for each in weights]
    known = [tokens for tokens in found if tokens is not None]
    if not found or len(known) < len(found):
        return None
    bus = sum(each.hiding_tokens or 0 for each in weights if each.link in OVER_BUS)
    added = sum(each.hiding_tokens or 0 for each in weights if not each.hides)
    return max(bus, *known, math.ceil(added / SMALL_SHARE))


def _candidates(recipe: Recipe, work: Workload, least_rows: int) -> Iterator[Settings]:
    """Yields micro-batches of at least ``least_rows``, the mildest change first."""
    chunk = work.chunk_rows
    own_rows = work.rows * work.micro_batches
    multiples = range(-(-least_rows // chunk) * chunk, MOST_ROWS + 1, chunk)
    same_step = next((rows for rows in multiples if own_rows % rows == 0), None)
    found = [rows for rows in (same_step, next(iter(multiples), None)) if rows is not None]
    for rows in dict.fromkeys(found):
        settings: Settings = (
            ("training.micro_batch_size", rows),
            ("training.layer_chunks", rows // chunk),
        )
        if own_rows % rows:
            settings += ((GLOBAL, -(-own_rows // rows) * rows * work.num_ranks),)
        yield settings
        if recipe.fsdp.activation_checkpointing != "none" and not recipe.fsdp.activation_offload:
            yield (*settings, ("fsdp.activation_offload", True))
