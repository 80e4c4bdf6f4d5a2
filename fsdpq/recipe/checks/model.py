"""Rules about ``model``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, has_no_effect, model_directory
from fsdpq.recipe.root import Recipe


def check_model_revision_used(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A revision of a model that is not on the hub: a directory, or ``pypi:``."""
    if recipe.model.name_or_path.startswith("pypi:"):
        yield from has_no_effect(recipe, "model", "revision", "on a `pypi:` model: it is pinned")
    elif model_directory(recipe, base_dir) is not None:
        yield from has_no_effect(recipe, "model", "revision", "on a model directory")


def check_seq_len_fits(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Rows longer than the model was made for, by its card or its ``config.json``."""
    card = card_of(recipe, base_dir)
    if card is not None and recipe.data.seq_len > card.max_position_embeddings:
        longest = card.max_position_embeddings
        message = f"`data.seq_len` is {recipe.data.seq_len} and the model's context is {longest}"
        hint = f"use `seq_len: {longest}` or less, or a model with a longer context"
        yield Problem(f"{message} tokens", "data.seq_len", hint=hint)


def check_router_loss_has_routers(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A ``router_aux_loss_coef`` above 0 for a model without experts."""
    coefficient, card = recipe.training.router_aux_loss_coef, card_of(recipe, base_dir)
    if coefficient and card is not None and not card.num_experts:
        message = f"`training.router_aux_loss_coef: {coefficient:g}` balances the routers of a"
        hint = "delete `router_aux_loss_coef`"
        yield Problem(
            f"{message} mixture of experts, and the model has none",
            "training.router_aux_loss_coef",
            hint=hint,
        )


CHECKS = (
    check_model_revision_used,
    check_seq_len_fits,
    check_router_loss_has_routers,
)
