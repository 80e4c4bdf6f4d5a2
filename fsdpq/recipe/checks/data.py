"""Rules about ``data``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect
from fsdpq.recipe.root import Recipe

_DATASET_NAME = re.compile(r"pypi:.+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_one_data_source(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Anything but one of ``data.path`` and ``data.dataset``; made-up rows have neither."""
    data = recipe.data
    if data.format == "dummy":
        for field in ("path", "dataset"):
            hint = f"delete `{field}`, or use the format of its rows"
            yield from has_no_effect(recipe, "data", field, "with `data.format: dummy`", hint)
    elif data.path is None and data.dataset is None:
        hint = "add `path: rows.jsonl` or `dataset: pypi:chatterbot-english`"
        yield Problem("`data` needs `path` or `dataset`", "data", hint=hint)
    elif data.path is not None and data.dataset is not None:
        hint = "delete one of them (on the command line: `data.dataset=null`)"
        yield Problem("`data` has both `path` and `dataset`", "data.dataset", hint=hint)


def check_data_path_exists(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A ``data.path`` that is no file."""
    if not isinstance(recipe.data.path, str):
        return
    path = base_dir / Path(recipe.data.path).expanduser()
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        message = f"`data.path`: there is no file `{path}`"
        hint = "a relative path starts from the recipe's directory"
        yield Problem(message, "data.path", hint=hint)


def check_dataset_name(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A ``data.dataset`` that is neither ``pypi:<name>`` nor ``org/name``."""
    dataset = recipe.data.dataset
    if dataset is not None and not _DATASET_NAME.fullmatch(dataset):
        message = f"`data.dataset`: `{dataset}` is no name of a dataset"
        hint = "`org/name` is one of the hub, `pypi:<name>` one in a package (`fsdpq kinds data` "
        hint += "lists them); a file is given as `data.path`"
        yield Problem(message, "data.dataset", hint=hint)


def check_hub_settings_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``split`` or ``revision`` of rows that do not come from the hub."""
    data = recipe.data
    if data.format == "dummy":
        reason = "with `data.format: dummy`"
    elif data.path is not None:
        reason = "with `data.path`: only hub datasets have one"
    elif data.dataset is not None and data.dataset.startswith("pypi:"):
        reason = "on a `pypi:` dataset: it is pinned and whole"
    else:
        return
    for field in ("split", "revision"):
        yield from has_no_effect(recipe, "data", field, reason)


def check_truncation_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``truncation`` or ``packing`` of made-up rows, which are ``seq_len`` tokens long."""
    if recipe.data.format == "dummy":
        for field in ("truncation", "packing"):
            reason = "with `data.format: dummy`: each row has `seq_len` tokens"
            yield from has_no_effect(recipe, "data", field, reason)


def check_prompts_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``train_on_prompt`` of rows that have no prompt, or that say themselves what is trained."""
    if recipe.data.format in ("text", "input_output", "dummy"):
        reason = f"with `data.format: {recipe.data.format}`: its rows have no prompt"
        if recipe.data.format == "input_output":
            reason = "with `data.format: input_output`: the segments say what carries loss"
        yield from has_no_effect(recipe, "data", "train_on_prompt", reason)


CHECKS = (
    check_one_data_source,
    check_data_path_exists,
    check_dataset_name,
    check_hub_settings_used,
    check_truncation_used,
    check_prompts_exist,
)
