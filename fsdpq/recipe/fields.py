"""Finding the field of the models that a dotted key means."""

from __future__ import annotations

from typing import Any, get_args

from pydantic.fields import FieldInfo

from fsdpq.recipe.describe import Section
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe


def find_options(
    path: tuple[str, ...], data: dict[str, Any], sections: dict[str, Section]
) -> type[Options] | None:
    """Returns the class whose field the last part of ``path`` names.

    Args:
        path: ``("adapter", "rank")`` or ``("metrics", "wandb", "project")``.
        data: the recipe; its ``kind`` chooses, or the default kind where it is silent.
        sections: of the recipe.
    """
    if len(path) == 1:
        return Recipe
    section = sections.get(path[0])
    if section is None:
        return None
    entry: Any = data.get(path[0])
    default = Recipe.model_fields[path[0]].default
    if entry is None and isinstance(default, Options):
        options: type[Options] | None = type(default)
    else:
        options = section.options(entry)
    for part in path[1:-1]:
        if part.isdigit():  # an entry of a list: its options are those of the list's field
            continue
        info = options.model_fields.get(part) if options else None
        options = _nested(info.annotation) if info else None
    return options


def find_field(
    path: tuple[str, ...], data: dict[str, Any], sections: dict[str, Section]
) -> FieldInfo | None:
    """Returns the field that ``path`` names, None where there is none; see `find_options`."""
    options = find_options(path, data, sections)
    return options.model_fields.get(path[-1]) if options else None


def _nested(annotation: Any) -> type[Options] | None:
    members = get_args(annotation) or (annotation,)
    found = (m for m in members if isinstance(m, type) and issubclass(m, Options))
    return next(found, None)
