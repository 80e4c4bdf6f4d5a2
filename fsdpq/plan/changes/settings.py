"""A recipe with other settings, made without validating anything: a plan tries hundreds.

What is shown to a user goes through the loader of recipes afterwards, as he would give it on the
command line (`fsdpq.launch.plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fsdpq.plan.workload import workload_of
from fsdpq.recipe.checks import CHECKS
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.optimizer import AdamW8bitOptions
from fsdpq.recipe.sections.quantization import BnbOptions

Settings = tuple[tuple[str, Any], ...]
"""``("fsdp.offload", "cpu")`` and others that belong together."""

GLOBAL = "training.global_batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"

_KINDS: Mapping[tuple[str, str], type[Options]] = {
    ("optimizer", "adamw_8bit"): AdamW8bitOptions,
    ("quantization", "bnb"): BnbOptions,
}


def apply_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Returns ``recipe`` with ``settings``; a new ``kind`` keeps the fields that it knows too."""
    changed: dict[str, Options] = {}
    for key, value in settings:
        name, field = key.split(".")
        section: Options = changed.get(name) or getattr(recipe, name)
        if field == "kind":
            changed[name] = _as_kind(section, _KINDS[name, value], value)
        else:
            changed[name] = section.model_copy(update={field: value})
    return recipe.model_copy(update=changed)


def as_overrides(settings: Settings, accumulation: int | None, changed: Recipe) -> tuple[str, ...]:
    """Returns settings of a resolved recipe as overrides of the recipe as it was written.

    Args:
        settings: of the resolved recipe, which has a ``global_batch_size``.
        accumulation: ``training.gradient_accumulation_steps`` as it was written: the rows of a
            step follow from it there.
        changed: the resolved recipe with the settings.
    """
    written = dict(settings)
    if accumulation is not None:
        written.pop(GLOBAL, None)
        steps = workload_of(changed).micro_batches
        written |= {} if steps == accumulation else {ACCUMULATION: steps}
    return tuple(f"{key}={_word(value)}" for key, value in written.items())


def problems_of(recipe: Recipe, base_dir: Path) -> set[tuple[str, str]]:
    """Returns what the rules across sections say against ``recipe``: keys and messages."""
    return {(p.key, p.message) for check in CHECKS for p in check(recipe, base_dir)}


def has_effect(recipe: Recipe, settings: Settings) -> bool:
    """Whether any of ``settings`` says something else than ``recipe`` does."""
    return any(_value_of(recipe, key) != value for key, value in settings)


def merge_settings(parts: Iterable[Settings]) -> Settings:
    """Returns all of ``parts`` in order; of a key that comes twice the last one counts."""
    return tuple({key: value for part in parts for key, value in part}.items())


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value_of(recipe: Recipe, key: str) -> Any:
    section, field = key.split(".")
    return getattr(getattr(recipe, section), field, None)


def _as_kind(section: Options, kind: type[Options], name: str) -> Options:
    kept: dict[str, Any] = {key: value for key, value in section if key in kind.model_fields}
    return kind.model_construct(None, **(kept | {"kind": name}))
