"""How templates become pages: everything that they are given is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent


def page_environment(folder: Path = HERE) -> jinja2.Environment:
    """Returns what renders the templates of ``folder``, which may include ``style.css``.

    Values are untrusted (rows, samples, recipes) and escaped; one that is missing is an error.
    """
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
