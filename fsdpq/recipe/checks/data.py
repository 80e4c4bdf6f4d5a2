"""Rules about ``data``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect, is_default, sources_of
from fsdpq.recipe.describe import show_value
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.source import SourceOptions

_DATASET_NAME = re.compile(r"pypi:.+|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERN = re.compile(r"[*?\[]")


def check_one_data_source(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A source that is not one of ``path``, ``dataset`` and ``mixture``; made-up rows are none."""
    for key, source in sources_of(recipe):
        given = [name for name in ("path", "dataset") if getattr(source, name) is not None]
        if key == "data" and recipe.data.mixture:
            given.append("mixture")
        if source.format == "dummy" and key != "data":
            hint = "give a path or a dataset, or train on `format: dummy` alone"
            message = f"`{key}.format: dummy` has no place here: made-up rows are no source"
            yield Problem(message, f"{key}.format", hint=hint)
        elif source.format == "dummy":
            for field in given:
                hint = f"delete `{field}`, or use the format of its rows"
                yield from has_no_effect(recipe, "data", field, "with `data.format: dummy`", hint)
        elif not given:
            hint = "add `path: rows.jsonl` or `dataset: pypi:chatterbot-english`"
            yield Problem(f"`{key}` needs `path` or `dataset`", key, hint=hint)
        elif len(given) > 1:
            hint = f"delete one of them (on the command line: `{key}.{given[1]}=null`)"
            message = f"`{key}` has both `{given[0]}` and `{given[1]}`"
            yield Problem(message, f"{key}.{given[1]}", hint=hint)


def check_mixture_parts_say_it(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """What belongs into the parts of a ``mixture``, given beside it."""
    if recipe.data.mixture:
        for field in ("config", "revision", "split", "format", "columns", "max_rows"):
            reason = "beside `mixture`: every part has its own"
            hint = f"move `{field}` into the parts that it is for"
            yield from has_no_effect(recipe, "data", field, reason, hint)


def check_weights(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Weights of some parts of a mixture only, or a rule for weights that are not there."""
    parts = recipe.data.mixture
    lacking = [i for i, part in enumerate(parts) if part.weight is None]
    if lacking and len(lacking) < len(parts):
        key = f"data.mixture.{lacking[0]}"
        message = f"`{key}` has no `weight`, and other parts have"
        yield Problem(message, key, hint="give every part a weight, or none")
    elif lacking or not parts:
        reason = "without weights in a `mixture`: every row is used once"
        yield from has_no_effect(recipe, "data", "mixture_stopping", reason)


def check_data_path_exists(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """A ``path`` that is no file or directory, or a pattern that matches none."""
    for key, source in sources_of(recipe):
        paths = (source.path,) if isinstance(source.path, str) else source.path or ()
        for index, text in enumerate(paths):
            path_key = f"{key}.path" if isinstance(source.path, str) else f"{key}.path.{index}"
            path = base_dir / Path(text).expanduser()
            try:
                found = path.is_file() or path.is_dir()
                found = found or (_PATTERN.search(text) is not None and _matches(text, base_dir))
            except (OSError, ValueError, RuntimeError):
                found = False
            if not found:
                message = f"`{path_key}`: there is no file `{path}`"
                if _PATTERN.search(text):
                    message = f"`{path_key}`: no file matches `{path}`"
                elif path.is_symlink():
                    message = f"`{path_key}`: `{path}` is a link to nothing"
                hint = "a relative path starts from the recipe's directory"
                yield Problem(message, path_key, hint=hint)


def check_dataset_name(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A ``dataset`` that is neither ``pypi:<name>`` nor ``org/name``."""
    for key, source in sources_of(recipe):
        dataset = source.dataset
        if dataset is not None and not _DATASET_NAME.fullmatch(dataset):
            message = f"`{key}.dataset`: `{dataset}` is no name of a dataset"
            hint = "`org/name` is one of the hub, `pypi:<name>` one in a package (`fsdpq kinds "
            hint += f"data` lists them); a file is given as `{key}.path`"
            yield Problem(message, f"{key}.dataset", hint=hint)


def check_hub_settings_used(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """``split``, ``config`` or ``revision`` of rows that have none."""
    for key, source in sources_of(recipe):
        fields = ("split", "config", "revision")
        if source.format == "dummy":
            reason = "with `data.format: dummy`"
        elif source.path is not None:
            reason = "with `path`: only hub datasets have one"
            fields = ("config", "revision")
        elif source.dataset is not None and source.dataset.startswith("pypi:"):
            reason = "on a `pypi:` dataset: it is pinned and whole"
            fields = fields[1:] if source.split.startswith("train[") else fields
        else:
            continue
        for field in fields:
            yield from _ignored(source, key, field, reason)
        yield from _check_split_name(source, key, base_dir)


def check_columns_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``columns`` of made-up rows."""
    if recipe.data.format == "dummy":
        yield from has_no_effect(recipe, "data", "columns", "with `data.format: dummy`")


def check_one_source_of_held_out_rows(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``eval`` beside ``eval_fraction``: held-out rows come from one of them."""
    data = recipe.data
    if data.eval is not None and data.eval_fraction:
        hint = "delete one of them (on the command line: `data.eval_fraction=0`)"
        message = "`data` has both `eval` and `eval_fraction`"
        yield Problem(message, "data.eval_fraction", hint=hint)


def check_bad_rows_exist(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``on_bad_row`` of made-up rows, which are never bad."""
    if recipe.data.format == "dummy" and recipe.data.eval is None:
        yield from has_no_effect(recipe, "data", "on_bad_row", "with `data.format: dummy`")


def check_truncation_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``truncation`` or ``packing`` of made-up rows, which are ``seq_len`` tokens long."""
    if recipe.data.format == "dummy":
        for field in ("truncation", "packing"):
            reason = "with `data.format: dummy`: each row has `seq_len` tokens"
            yield from has_no_effect(recipe, "data", field, reason)


def _check_split_name(source: SourceOptions, key: str, base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem for a split of files that are named one by one: theirs is ``train``."""
    name = source.split.partition("[")[0]
    if source.path is None or name == "train":
        return
    paths = (source.path,) if isinstance(source.path, str) else source.path
    if not any(_is_directory(base_dir, text) for text in paths):
        message = f"`{key}.split: {source.split}`: rows of files are all `train`"
        hint = "only a directory has other splits: name the file of that split as `path`"
        yield Problem(message, f"{key}.split", hint=hint)


def _ignored(source: SourceOptions, key: str, field: str, reason: str) -> Iterator[Problem]:
    if not is_default(source, field):
        message = f"`{key}.{field}: {show_value(getattr(source, field))}` has no effect {reason}"
        yield Problem(message, f"{key}.{field}", hint=f"delete `{field}`")


def _is_directory(base_dir: Path, text: str) -> bool:
    try:
        return (base_dir / Path(text).expanduser()).is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


def _matches(pattern: str, base_dir: Path) -> bool:
    import glob

    text = str(Path(pattern).expanduser())
    return next(glob.iglob(text, root_dir=base_dir, recursive=True), None) is not None  # noqa: PTH207


CHECKS = (
    check_one_data_source,
    check_mixture_parts_say_it,
    check_weights,
    check_data_path_exists,
    check_dataset_name,
    check_hub_settings_used,
    check_columns_used,
    check_one_source_of_held_out_rows,
    check_bad_rows_exist,
    check_truncation_used,
)
