"""What a recipe must not hold although YAML can: code, remote files, secrets.

A recipe comes from a stranger and goes to strangers: into the run directory, the report, a git
repository. It runs nothing and fetches nothing but what its model and dataset name, and it is no
place for a token. What a message shows of a secret is blanked out. The whole picture is in
``docs/concepts/safety.md``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import Location, Problem
from fsdpq.recipe.checks.facts import sources_of
from fsdpq.recipe.compose import COMMAND_LINE
from fsdpq.recipe.layers import Composition
from fsdpq.recipe.marks import KeyPath, key_path
from fsdpq.recipe.root import Recipe

PATH_KEYS = re.compile(
    r"model\.name_or_path|data\.chat_template"
    r"|data\.(mixture\.\d+\.|eval\.)?(path(\.\d+)?|dataset)"
)
"""The keys that name files or repositories; a number is a place in a list."""

_CODE_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_", "_component_")
_REMOTE = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|//|\\\\)")
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?P<secret>"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v[0-9]_[A-Za-z0-9_-]{20,}|local-[0-9a-f]{40}"  # Weights & Biases
    r"|sk-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|AIza[0-9A-Za-z_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,}"  # Google, Slack
    r")"
)
_NAMED_SECRET = re.compile(
    r"(?:api[_-]?key|token|secret|passw(?:or)?d|wandb[.\w]{0,20})[\"']?\s{0,9}[:=]\s{0,9}[\"']?"
    r"(?P<secret>[0-9a-f]{32,})(?![0-9a-z])",
    re.IGNORECASE,
)  # bounded: a line may hold a megabyte of `wandbwandb`
_SECRET_NAMES = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|ACCESS_KEY", re.IGNORECASE)
_SHORTEST_SECRET = 12


def check_contents(composed: Composition) -> Iterator[Problem]:
    """Yields a Problem for every key that would run code and every file that is not here."""
    marks = composed.marks
    for path, value in _walk(composed.data, ()):
        name, key = str(path[-1]), ".".join(str(part) for part in path)
        if name in _CODE_KEYS:
            message = f"`{name}` has no place in a recipe: it names code to run"
            yield Problem(message, key, marks.key(path), "delete it, and choose by `kind`")
        elif name == "trust_remote_code":
            message = "`trust_remote_code` is not for a recipe to decide"
            hint = "delete it; if you trust the model's authors, run `fsdpq train "
            hint += "--trust-remote-code`"
            yield Problem(message, key, marks.key(path), hint)
        elif PATH_KEYS.fullmatch(key) and isinstance(value, str) and _REMOTE.match(value):
            message = f"`{key}` names something on the network: a recipe reads local files only"
            hint = "download it and give its path"
            if key == "model.name_or_path":
                hint = "give a directory, or a repository of the hub as `org/name`"
            yield Problem(message, key, marks.value(path), hint)


def check_secrets(
    composed: Composition,
    overrides: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Problem]:
    """Yields a Problem for every line with a token, comments included, and for such overrides.

    What looks like a token counts, and the values of environment variables that are called so.
    """
    values = {
        value: name
        for name, value in environ.items()
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET
    }
    lines = [
        Location(str(source.path), number, 0, line)
        for source in composed.sources
        for number, line in enumerate(source.lines, start=1)
    ]
    typed = [Location(COMMAND_LINE, text=text, length=len(text)) for text in overrides]
    for place in [*lines, *typed]:
        found = sorted(_find_secrets(place.text, values))
        if not found:
            continue
        blank = list(place.text)
        for start, end, _ in found:
            blank[start:end] = "*" * (end - start)
        start, end, name = found[0]
        column = start + 1 if place.line else 0
        location = replace(place, column=column, text="".join(blank), length=end - start)
        message = f"this is the value of `${name}`" if name else "this looks like a secret"
        message += ": recipes and run directories are copied around"
        hint = "put it in the environment (`HF_TOKEN`, `WANDB_API_KEY`), and make a new one "
        hint += "if the file was shared"
        yield Problem(message, "", location, hint)


def note_outside_paths(recipe: Recipe, composed: Composition, base_dir: Path) -> Iterator[str]:
    """Yields a notice for every path that leaves the recipe's directory."""
    for key, text in _list_paths(recipe):
        if key == "model.name_or_path" and not _is_model_path(text, base_dir):
            continue
        path = (base_dir / Path(text).expanduser()).resolve()
        if not path.is_relative_to(base_dir.resolve()):
            at = composed.marks.value(key_path(key))
            place = f" ({at.source}:{at.line})" if at and at.line else ""
            yield f"`{key}`{place} leaves the recipe's directory: {path}"


def relative_paths(recipe: Recipe, base_dir: Path) -> Iterator[str]:
    """Yields every value that names a file or directory by a path from the recipe's directory."""
    for key, text in _list_paths(recipe):
        if key == "model.name_or_path" and not _is_model_path(text, base_dir):
            continue
        if not Path(text).expanduser().is_absolute():
            yield text


def _list_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields every value that may be a path on this machine, with its key."""
    data = recipe.data
    yield "model.name_or_path", recipe.model.name_or_path
    if data.chat_template is not None and data.chat_template.endswith(".jinja"):
        yield "data.chat_template", data.chat_template
    for key, source in sources_of(recipe):
        if isinstance(source.path, str):
            yield f"{key}.path", source.path
        for index, text in enumerate(() if isinstance(source.path, str) else source.path or ()):
            yield f"{key}.path.{index}", text


def _is_model_path(text: str, base_dir: Path) -> bool:
    if text.startswith("pypi:"):
        return False
    return text.startswith(("/", ".", "~")) or (base_dir / text).is_dir()


def _find_secrets(text: str, values: Mapping[str, str]) -> Iterator[tuple[int, int, str]]:
    """Yields where secrets stand in ``text``, and the environment variable that holds them."""
    for value, name in values.items():
        for match in re.finditer(re.escape(value), text):
            yield (*match.span(), name)
    for pattern in (_TOKENS, _NAMED_SECRET):
        for match in pattern.finditer(text):
            yield (*match.span("secret"), "")


def _walk(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yields every key and every item of a list with its value, at any depth."""
    if isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            yield (*path, key), item
            yield from _walk(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(cast("list[Any]", value)):
            yield (*path, i), item
            yield from _walk(item, (*path, i))
