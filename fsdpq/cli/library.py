"""Reading the heads of the shipped recipes, and copying one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fsdpq.cards.find import find_card
from fsdpq.cli.render import clean, render_table
from fsdpq.errors import RecipeError, UsageError
from fsdpq.recipe.describe import suggest
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import recipe_schema_text
from fsdpq.recipe.shipped import shipped_recipes
from fsdpq.recipe.source import read_source

SCHEMA_NAME = "recipe.schema.json"
_SCHEMA_LINE = re.compile(r"# yaml-language-server: \$schema=\S+")


@dataclass(frozen=True)
class Entry:
    """One shipped recipe.

    Attributes:
        name: its name for ``fsdpq recipes cp``.
        summary: what it does, in a sentence.
        model: ``model.name_or_path``.
        num_parameters: weights of the model, None where nobody has counted them here.
        method: what is trained over what base.
        hardware: what it was written for.
        memory: planned or measured memory, empty where unknown.
    """

    name: str
    summary: str
    model: str
    num_parameters: int | None
    method: str
    hardware: str
    memory: str


def named_recipes() -> dict[str, Path]:
    """Returns the path of every shipped recipe by its name; fragments are left out."""
    return {path.stem: path for path in sorted(shipped_recipes().glob("*.yaml"))}


def list_recipes() -> list[Entry]:
    """Returns an entry for every shipped recipe, sorted by name."""
    return [_read_entry(name, path) for name, path in named_recipes().items()]


def render_recipes(entries: Sequence[Entry]) -> Iterator[str]:
    """Yields a table of the recipes, and how to take one."""
    counted = any(entry.num_parameters for entry in entries)
    rows = [_cells(entry, counted=counted) for entry in entries]
    head = ("recipe", "model", *(["size"] if counted else []), "method", "hardware", "memory")
    yield from map(clean, render_table([head, *rows]))
    yield ""
    yield "`fsdpq recipes cp NAME` copies one into this directory"


def copy_recipe(name: str, destination: Path) -> Path:
    """Copies the shipped recipe ``name`` and the JSON Schema; returns the path of the copy.

    Raises:
        UsageError: there is no such recipe, or something is in the way.
    """
    known = named_recipes()
    name = name.removesuffix(".yaml").removeprefix("recipes/")
    if name not in known:
        guess = suggest(name, known)
        hint = f"did you mean `{guess}`?" if guess else "`fsdpq recipes ls` lists them"
        raise UsageError(f"there is no shipped recipe `{name}`", hint=hint)
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    text = known[name].read_text(encoding="utf-8")
    text = _SCHEMA_LINE.sub(f"# yaml-language-server: $schema={SCHEMA_NAME}", text, count=1)
    text = text.replace(f"recipes/{name}.yaml", target.as_posix())
    schema = target.with_name(SCHEMA_NAME)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
        if not schema.exists():
            schema.write_text(recipe_schema_text(), encoding="utf-8")
    except FileExistsError:
        hint = f"name another file: `fsdpq recipes cp {name} my.yaml`"
        raise UsageError(f"`{target}` is there already", hint=hint) from None
    except OSError as error:
        message = f"`{target}` cannot be written: {error.strerror}"
        raise UsageError(message, hint="name a file in a directory that exists") from None
    return target


def _read_entry(name: str, path: Path) -> Entry:
    data = _settings(path)
    model = str(data.get("model", {}).get("name_or_path", ""))
    head = [line.lstrip("# ").rstrip() for line in _head(path)]
    facts = {key: text.strip() for key, _, text in (line.partition(":") for line in head)}
    return Entry(
        name=name,
        summary=next((line for line in head if line.endswith(".")), ""),
        model=model,
        num_parameters=_count_parameters(model),
        method=_method(data),
        hardware=facts.get("Hardware", "").rstrip("."),
        memory=facts.get("Memory", "").rstrip("."),
    )


def _head(path: Path) -> list[str]:
    """Returns the comment lines at the top of the recipe, the schema line left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[1:end]


def _settings(path: Path) -> dict[str, Any]:
    """Returns the resolved recipe, or what is written in one that this version cannot run."""
    try:
        return load_recipe(path).recipe.model_dump(mode="json")
    except RecipeError:
        return read_source(path).data


def _method(data: dict[str, Any]) -> str:
    base: dict[str, Any] = data.get("quantization", {})
    adapter = str(cast("dict[str, Any]", data.get("adapter", {})).get("kind", "lora"))
    kind = base.get("kind", "bnb")
    if kind == "none":
        return "full" if adapter == "none" else adapter
    stored = base.get("quant_type", "nf4") if kind == "bnb" else f"hqq {base.get('nbits', 4)}-bit"
    return f"{adapter} over {stored}"


def _count_parameters(model: str) -> int | None:
    card = find_card(model)
    return None if card is None else int(card.num_parameters)


def _cells(entry: Entry, *, counted: bool) -> tuple[str, ...]:
    size = entry.num_parameters
    text = "" if size is None else f"{size / 1e9:.1f} B" if size >= 1e9 else f"{size / 1e6:.0f} M"
    extra = (text,) if counted else ()
    hardware = entry.hardware if len(entry.hardware) <= 40 else entry.hardware[:37] + "..."
    memory = entry.memory if len(entry.memory) <= 40 else entry.memory[:37] + "..."
    return (entry.name, entry.model, *extra, entry.method, hardware, memory)
