"""Reads the file of a chat template that a recipe names."""

from __future__ import annotations

from pathlib import Path

from fsdpq.cards.chat_templates import TEMPLATE_FILE
from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.data import DataOptions

MAX_BYTES = 1_000_000
"""More than any template has."""


def read_template_file(options: DataOptions, *, base_dir: Path) -> str | None:
    """Returns the text of the file that ``data.chat_template`` names, None where it names none.

    Args:
        options: the recipe's ``data``.
        base_dir: what a relative path is relative to: the recipe's directory.

    Raises:
        RecipeError: it cannot be read, or is no text.
    """
    name = options.chat_template
    if name is None or not name.endswith(TEMPLATE_FILE):
        return None
    path = base_dir / Path(name).expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _unusable(f"`{path}` is {path.stat().st_size / 1e6:.1f} MB: no chat template")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unusable(f"`{path}` cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _unusable(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}") from error


def _unusable(message: str) -> RecipeError:
    hint = "a relative path starts from the recipe's directory"
    return RecipeError(
        [Problem(f"`data.chat_template`: {message}", "data.chat_template", None, hint)]
    )
