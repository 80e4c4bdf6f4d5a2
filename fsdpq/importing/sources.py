"""Datasets of other tools: one is ``data`` itself, several are its ``mixture``, with their columns.

A tool's rules write an entry to ``data.*`` as if it were the only one; here it becomes a part of a
mixture where there are more. What a recipe says once for all rows (``chat_template``,
``roles_to_train``) is taken from the entries as long as they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from fsdpq.importing.draft import Draft
from fsdpq.importing.values import UnusableError, names, text
from fsdpq.recipe.sections.source import MixturePart, SourceOptions
from fsdpq.rows.messages import MESSAGE_ROLES

FILE_ENDINGS = (
    ".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow", ".txt", ".gz", ".zst",
)  # fmt: skip
BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Names that `datasets.load_dataset` takes for files; which ones, ``data_files`` says."""

TEMPLATES: Mapping[str, str] = {
    "chatml": "chatml", "qwen": "chatml", "qwen2": "chatml", "llama3": "llama3",
    "mistral": "mistral", "mistral_v1": "mistral", "inst": "mistral", "gemma": "gemma",
    "gemma2": "gemma", "phi_3": "phi3", "phi": "phi3", "zephyr": "zephyr", "vicuna": "vicuna",
    "alpaca": "alpaca",
}  # fmt: skip
"""Chat template of another tool -> the built-in one of ``data.chat_template``."""

_TRAINED = ("system", "user", "assistant", "tool")


def read_sources(
    draft: Draft, key: str, entries: Sequence[Any], read: Callable[[str, Any], None]
) -> None:
    """Reads the entries of a list of datasets; several become the parts of a mixture.

    Args:
        draft: the recipe.
        key: of the list.
        entries: its items.
        read: takes the key of an entry and the entry, and writes to ``data.*``.
    """
    if len(entries) == 1:
        read(f"{key}.0", entries[0])
        draft.forget("data.weight", "there is one dataset: it is the whole mixture")
        return
    for index, entry in enumerate(entries):
        _read_part(draft, f"{key}.{index}", entry, read)


def _read_part(draft: Draft, place: str, entry: Any, read: Callable[[str, Any], None]) -> None:
    data: dict[str, Any] = draft.document.pop("data", {})
    origins, num_findings = dict(draft.origins), len(draft.findings)
    read(place, entry)
    found: dict[str, Any] = draft.document.pop("data", {})
    draft.document["data"] = data
    parts = cast("list[dict[str, Any]]", data.setdefault("mixture", []))
    prefix = f"data.mixture.{len(parts)}."
    new = {target: key for target, key in draft.origins.items() if origins.get(target) != key}
    draft.origins = origins
    parts.append({name: found[name] for name in MixturePart.model_fields if name in found})
    for name in parts[-1]:
        if f"data.{name}" in new:
            draft.origins[prefix + name] = new[f"data.{name}"]
    for name, value in found.items():
        if name not in parts[-1]:
            _take_shared(draft, name, value, new.get(f"data.{name}", place))
    draft.findings[num_findings:] = [
        replace(finding, target=_in_part(finding.target, prefix))
        for finding in draft.findings[num_findings:]
    ]


def _take_shared(draft: Draft, name: str, value: Any, key: str) -> None:
    """Writes what the recipe says once for all rows."""
    target = f"data.{name}"
    if draft.has(target) and draft.at(target) != value:
        draft.note("no_counterpart", key, f"`{target}` is one for all parts of the mixture")
    else:
        draft.put(target, value, key=key)


def _in_part(target: str, prefix: str) -> str:
    fields = MixturePart.model_fields
    return ", ".join(
        prefix + name.removeprefix("data.")
        if name.startswith("data.") and name.split(".")[1] in fields
        else name
        for name in target.split(", ")
    )


def add_columns(draft: Draft, columns: Mapping[str, str], *, key: str) -> None:
    """Adds names to ``data.columns``, without those that say nothing."""
    told = {name: other for name, other in columns.items() if name != other}
    if told:
        draft.put("data.columns", {**(draft.at("data.columns") or {}), **told}, key=key)


def read_dataset(draft: Draft, key: str, value: Any) -> None:
    """Reads the name of a hub dataset, or the path of rows on this machine."""
    name = text(value)
    is_path = name.lower().endswith(FILE_ENDINGS) or name.startswith(("./", "../", "/", "~"))
    is_path = is_path or (draft.directory / name).is_dir()
    target = "data.path" if is_path else "data.dataset"
    draft.put(target, name, key=key)
    draft.note("converted", key, target=target)


def read_files(draft: Draft, key: str, value: Any) -> None:
    """Reads ``data_files``: one file or several, relative to a directory that was read before."""
    if isinstance(value, dict):
        raise UnusableError("must be a file or a list of files: see `data.split` for splits")
    files = names(value)
    if not files:
        return
    dataset = draft.at("data.dataset")
    if dataset is not None and dataset not in BUILDERS:
        why = (
            f"some files of `{dataset}` cannot be chosen: fetch them, and name them in `data.path`"
        )
        draft.note("no_counterpart", key, why)
        return
    directory = draft.at("data.path")
    draft.drop("data.dataset")
    if isinstance(directory, str) and not directory.endswith(FILE_ENDINGS):
        files = [f"{directory.rstrip('/')}/{file}" for file in files]
    draft.put("data.path", files[0] if len(files) == 1 else files, key=key)
    draft.note("converted", key, target="data.path")


def read_eval(
    draft: Draft, key: str, entries: Sequence[Any], read: Callable[[str, Any], None]
) -> None:
    """Reads datasets for evaluation, of which ``data.eval`` takes one.

    Args:
        draft: the recipe.
        key: of the list, or of the one dataset.
        entries: the datasets.
        read: takes the key of an entry and the entry, and writes to ``data.*``.
    """
    data, origins = draft.document.pop("data", {}), dict(draft.origins)
    num_findings = len(draft.findings)
    read(f"{key}.0" if isinstance(draft.get(key), list) else key, entries[0])
    found: dict[str, Any] = draft.document.pop("data", {})
    draft.document["data"], draft.origins = data, origins
    fields = SourceOptions.model_fields
    draft.put("data.eval", {name: found[name] for name in fields if name in found}, key=key)
    draft.findings[num_findings:] = [
        replace(finding, target=_in_part(finding.target, "data.eval."))
        for finding in draft.findings[num_findings:]
    ]
    if len(entries) > 1:
        draft.note("no_counterpart", key, "`data.eval` is one source: the first one is taken")


def read_roles(draft: Draft, key: str, value: Any) -> None:
    """Reads which roles are trained on, by any tool's names for them."""
    found = [MESSAGE_ROLES.get(name.lower(), name) for name in names(value)]
    unknown = [name for name in found if name not in _TRAINED]
    if not found or unknown:
        why = f"no role is called `{unknown[0]}`" if unknown else (
            "only messages with `train: true` are trained on there: write `train: false` to the "
            "other answers"
        )  # fmt: skip
        draft.note("no_counterpart", key, why)
        return
    draft.put("data.roles_to_train", list(dict.fromkeys(found)), key=key)
    draft.note("converted", key, target="data.roles_to_train")


def read_template(draft: Draft, key: str, word: str, *, note: str = "") -> None:
    """Reads the name of a chat template.

    Args:
        draft: the recipe.
        key: of the template.
        word: its name.
        note: what to see to where a built-in template is taken.
    """
    found = TEMPLATES.get(word.lower())
    if found is None:
        why = f"no built-in template is called `{word}`: the tokenizer's own is used"
        draft.note("assumed", key, why)
        return
    draft.put("data.chat_template", found, key=key)
    draft.note("assumed" if note else "converted", key, note, target="data.chat_template")
