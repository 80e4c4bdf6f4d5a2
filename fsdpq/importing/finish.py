"""From a draft to a recipe that is valid by the schema: names, order, what cannot stay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from fsdpq.errors import UsageError
from fsdpq.importing.draft import Draft, key_path
from fsdpq.importing.result import Finding, ImportResult
from fsdpq.recipe.checks import CHECKS
from fsdpq.recipe.describe import describe_field, list_sections, show_value
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.source import MixturePart

_METHODS = {
    ("bnb", "lora"): "qlora",
    ("bnb", "dora"): "qdora",
    ("hqq", "lora"): "hqq-lora",
    ("hqq", "dora"): "hqq-dora",
    ("none", "lora"): "lora",
    ("none", "dora"): "dora",
    ("none", "none"): "full",
}


def finish(draft: Draft, source: str, *, base_dir: Path) -> ImportResult:
    """Returns the import; a value that no recipe can have is reported and left out.

    Raises:
        UsageError: what is left is no recipe: it names no model or no data.
    """
    draft.settle()
    draft.document["name"] = _name(draft)
    draft.document["description"] = f"Imported from {draft.tool}"
    recipe = _validated(draft, source)
    document = _ordered(draft.document)
    for problem in (problem for check in CHECKS for problem in check(recipe, base_dir)):
        key = draft.origins.get(_origin(draft, problem.key), "")
        location = draft.marks.key(key_path(key)) if key else None
        message = problem.message + (f": {problem.hint}" if problem.hint else "")
        draft.findings.append(
            Finding(
                "refused", key, show_value(draft.at(problem.key)), problem.key, message, location
            )
        )
    return ImportResult(draft.tool, source, document, dict(draft.origins), draft.findings)


def _name(draft: Draft) -> str:
    model = str(draft.at("model.name_or_path") or draft.tool).rstrip("/").rpartition("/")[2]
    kinds = (str(draft.at("quantization.kind")), str(draft.at("adapter.kind")))
    words = f"{model}-{_METHODS.get(kinds, '-'.join(kinds).replace('_', '-'))}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", words).lstrip("._-")[:100] or "imported"


def _validated(draft: Draft, source: str) -> Recipe:
    while True:
        try:
            return Recipe.model_validate_json(json.dumps(draft.document), strict=True)
        except ValidationError as error:
            told = (_target(draft.document, entry["loc"]) for entry in error.errors())
            targets = {_origin(draft, target) for target in told}
        bad = sorted(target for target in targets if target in draft.origins)
        for target in bad:
            key = draft.origins[target]
            message = f"`{target}` must be {_expected(draft.document, target)}"
            draft.findings = [
                f for f in draft.findings if not (f.key == key and f.target == target)
            ]
            draft.drop(target)
            draft.note("unusable", key, message, target=target)
        if not bad:
            missing = ", ".join(f"`{target}`" for target in sorted(targets))
            message = f"`{source}` makes no recipe: {missing} cannot be told from it"
            hint = f"is it a whole config of {draft.tool}? see `fsdpq import --help`"
            raise UsageError(message, hint=hint)


def _target(document: dict[str, Any], loc: tuple[int | str, ...]) -> str:
    """Returns the dotted key of ``loc``, the union tags that pydantic puts into it left out."""
    found: list[str] = []
    place: Any = document
    for index, part in enumerate(loc):
        if isinstance(place, list) and isinstance(part, int):
            place = cast("list[Any]", place)[part]
            if isinstance(place, dict):  # a part of a mixture, not one of several numbers
                found.append(str(part))
        elif isinstance(place, dict) and (part in place or index in (0, len(loc) - 1)):
            found.append(str(part))
            place = cast("dict[Any, Any]", place).get(part)
    return ".".join(found)


def _origin(draft: Draft, target: str) -> str:
    """Returns the key that ``target`` is a part of and that came from the source, else itself."""
    name = target
    while name and name not in draft.origins:
        name = name.rpartition(".")[0]
    return name or target


def _expected(document: dict[str, Any], target: str) -> str:
    section, *path = target.split(".")
    options: type[Options] | None = list_sections()[section].options(document[section])
    if path[:1] == ["mixture"]:
        options = MixturePart
    field = path[-1]
    info = options.model_fields.get(field) if options else None
    return describe_field(info) if info else "something else"


def _not_kind(field: str) -> bool:
    return field != "kind"


def _ordered(document: dict[str, Any]) -> dict[str, Any]:
    """Returns ``document`` with sections and keys in the order of the models, ``kind`` first."""
    sections = list_sections()
    ordered: dict[str, Any] = {}
    for name in Recipe.model_fields:
        value = document.get(name)
        if name not in sections:
            ordered.update({name: value} if value else {})
        elif value:
            options = sections[name].options(value)
            fields = sorted(options.model_fields if options else (), key=_not_kind)
            ordered[name] = {field: value[field] for field in fields if field in value}
    return ordered
