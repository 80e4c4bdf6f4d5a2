"""torchtune's dataset components: where rows lie, their shape, the names of their columns.

https://docs.pytorch.org/torchtune/stable/basics/datasets_overview.html
"""

from __future__ import annotations

from typing import Any, cast

from fsdpq.importing.draft import Always, Draft, Lost, Rule, Table, To, With
from fsdpq.importing.sources import (
    BUILDERS,
    add_columns,
    read_dataset,
    read_eval,
    read_files,
    read_sources,
)
from fsdpq.importing.torchtune_components import DATASETS, TEXT_DATASETS
from fsdpq.importing.values import boolean, mapping, text

REFUSED = "the component does not know it: torchtune stops with a TypeError"


def read_datasets(draft: Draft, key: str, value: Any) -> None:
    """Reads ``dataset``: one component, or a list that is joined."""
    if not isinstance(value, list):
        _read_entry(draft, key, value)
        return
    entries = cast("list[Any]", value)
    read_sources(draft, key, entries, lambda place, entry: _read_entry(draft, place, entry))


def read_validation(draft: Draft, key: str, value: Any) -> None:
    """Reads ``dataset_val``."""
    entries = cast("list[Any]", value) if isinstance(value, list) else [value]
    read_eval(draft, key, entries, lambda place, entry: _read_entry(draft, place, entry))


def _read_entry(draft: Draft, key: str, entry: Any) -> None:
    fields = mapping(entry)
    DATASET.apply(draft, key, fields)
    name = str(fields.get("_component_")).removeprefix("torchtune.datasets.")
    component = DATASETS.get(name)
    if component is not None and not draft.has("data.columns"):
        is_own = draft.at("data.dataset") == component.repository or not component.repository
        if is_own:
            add_columns(draft, component.columns, key=f"{key}._component_")
    trains_all = name.startswith("alpaca")
    if trains_all and fields.get("train_on_input") is None:
        draft.default("data.train_on_prompt", True, f"{key}.train_on_input")
    if name in TEXT_DATASETS:
        draft.forget("data.train_on_prompt", "all of a text is trained on")


def _read_component(draft: Draft, key: str, value: Any) -> None:
    name = text(value).removeprefix("torchtune.datasets.")
    found = DATASETS.get(name)
    if found is None:
        why = "no such dataset is known here: write rows of `messages` to a file (`data.path`)"
        draft.put("data.format", "messages", key=key)
        draft.note("no_counterpart", key, why)
        return
    draft.put("data.format", found.format, key=key)
    if found.repository and not draft.has("data.dataset"):
        draft.put("data.dataset", found.repository, key=key)
    outcome = "assumed" if found.note else "converted"
    draft.note(outcome, key, found.note, target="data.dataset, data.format")


def _read_source(draft: Draft, key: str, value: Any) -> None:
    if text(value) in BUILDERS:
        draft.drop("data.dataset")
        draft.note("converted", key, "the file is in `data_files`", target="data.path")
        return
    draft.drop("data.dataset")
    read_dataset(draft, key, value)


def _read_files(draft: Draft, key: str, value: Any) -> None:
    draft.drop("data.dataset")
    read_files(draft, key, value)


def _read_column_map(draft: Draft, key: str, value: Any) -> None:
    component = str(draft.get(key.rpartition(".")[0] + "._component_"))
    known = DATASETS.get(component.removeprefix("torchtune.datasets."))
    for name, other in mapping(value).items():
        path = f"{key}.{name}"
        if known is None or name not in known.names:
            draft.note("no_counterpart", path, f"the format has no column for `{name}`")
            continue
        is_standard = known.names[name] == "messages" and text(other) == "conversations"
        add_columns(draft, {} if is_standard else {known.names[name]: text(other)}, key=path)
        draft.note("converted", path, target="data.columns")


def _column(name: str, *, standard: str = "") -> With:
    def read(draft: Draft, key: str, value: Any) -> None:
        add_columns(draft, {} if text(value) == standard else {name: text(value)}, key=key)
        draft.note("converted", key, target="data.columns")

    return With("data.columns", read)


def _read_packed(draft: Draft, key: str, value: Any) -> None:
    if boolean(value):
        draft.put("data.packing", "best_fit", key=key)
    draft.note("converted", key, target="data.packing")


_RULES: dict[str, Rule] = {
    "_component_": With("data.dataset, data.format, data.columns", _read_component),
    "source": With("data.dataset, data.path", _read_source),
    "data_files": With("data.path", _read_files),
    "split": To("data.split", text),
    "name": To("data.config", text),
    "subset": To("data.config", text),
    "column": _column("text"),
    "column_map": With("data.columns", _read_column_map),
    "conversation_column": _column("messages", standard="conversations"),
    "conversation_style": Always("both spellings of messages are read"),
    "packed": With("data.packing", _read_packed),
    "split_across_pack": Lost("a row is in one sequence, whole"),
    "train_on_input": To("data.train_on_prompt", boolean),
    "add_eos": Always("rows end with the end of text"),
    "new_system_prompt": Lost("write it into the rows: a column `system`"),
    "prompt_template": Lost("the chat template or the format's own text is used"),
}

DATASET = Table(
    _RULES, (*_RULES, "filter_fn", "filter_kwargs"), REFUSED, {"filter": "rows are not filtered"}
)
