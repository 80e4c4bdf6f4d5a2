"""What a recipe names, brought to this machine: the base model and the data, real or made up."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fsdpq.launch.inputs.shrink import shrink_recipe
from fsdpq.launch.screen import Screen
from fsdpq.recipe.load import LoadedRecipe
from fsdpq.recipe.root import Recipe


def fetch_inputs(
    loaded: LoadedRecipe, *, screen: Screen, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Fetches the base model and the data, and returns where they are as plain JSON data.

    Raises:
        FetchError, UsageError: one of them cannot be had.
        RecipeError: the data has bad rows.
    """
    from fsdpq.fetch.data import fetch_data

    # The data first: its mistakes are cheap to find, a model takes long to download.
    data = fetch_data(
        loaded.recipe.data, base_dir=loaded.base_dir, report=screen.report, marks=loaded.marks
    )
    model = fetch_base_model(loaded, screen=screen, trust_remote_code=trust_remote_code)
    return {"model": model, "data": data.as_json()}


def fetch_base_model(
    loaded: LoadedRecipe, *, screen: Screen, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Fetches the base model, and returns where it is as plain JSON data.

    Raises:
        FetchError, UsageError: it cannot be had.
    """
    from fsdpq.fetch.resolve import fetch_model

    recipe: Recipe = loaded.recipe
    model = fetch_model(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        base_dir=loaded.base_dir,
        report=screen.report,
        with_code=trust_remote_code,
    )
    return _plain(asdict(model))


def shrink(loaded: LoadedRecipe, *, screen: Screen) -> Recipe:
    """Returns the recipe of a smoke run; says what could not stay as it is."""
    shrunk = shrink_recipe(loaded.recipe)
    for line in shrunk.replaced:
        screen.report(f"smoke: {line}")
    return shrunk.recipe


def make_inputs(loaded: LoadedRecipe, *, screen: Screen) -> dict[str, Any]:
    """Makes a tiny random model and rows for a smoke run; see `fetch_inputs`.

    Raises:
        UsageError: the architecture of the recipe's model is not known.
    """
    from fsdpq.launch.inputs.smoke import make_smoke_model
    from fsdpq.launch.inputs.smoke_rows import make_smoke_rows

    model = make_smoke_model(loaded.recipe, base_dir=loaded.base_dir, report=screen.report)
    options = loaded.recipe.data
    data = make_smoke_rows(options, base_dir=loaded.base_dir, report=screen.report)
    return {"model": _plain(asdict(model)), "data": data.as_json()}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in fields.items()
    }
