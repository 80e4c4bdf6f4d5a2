"""How templates become pages: everything that they are given is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent


def page_environment(
    *folders: Path, filters: Mapping[str, Callable[[Any], str]]
) -> jinja2.Environment:
    """Returns what renders the templates of ``folders``, which may include ``style.css``.

    Values are untrusted (rows, samples, recipes) and escaped; one that is missing is an error.
    """
    import jinja2

    environment: Any = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment
