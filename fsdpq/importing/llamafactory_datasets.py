"""LLaMA-Factory's datasets: names, and the ``dataset_info.json`` that says what they are.

The file is read where it lies beside the config (in ``dataset_dir``); nothing is fetched.
https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

from fsdpq.importing.draft import Draft
from fsdpq.importing.sources import (
    TEMPLATES,
    add_columns,
    read_eval,
    read_sources,
)
from fsdpq.importing.sources import read_template as read_template_name
from fsdpq.importing.values import names, number, text, whole
from fsdpq.rows.messages import MESSAGE_ROLES

INFO_FILE = "dataset_info.json"
HUB_DATASETS = {
    "alpaca_en": "llamafactory/alpaca_en",
    "alpaca_zh": "llamafactory/alpaca_zh",
    "alpaca_gpt4_en": "llamafactory/alpaca_gpt4_en",
    "alpaca_gpt4_zh": "llamafactory/alpaca_gpt4_zh",
}
"""Datasets of its own ``dataset_info.json`` that lie on the hub as instruction and output."""

_MAX_INFO_BYTES = 10_000_000
_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
    "function_tag": "assistant", "system_tag": "system",
}  # fmt: skip
_UNREAD = ("ranking", "folder", "script_url", "ms_hub_url")
_CHATS = re.compile(r"instruct|chat|-it\b", re.IGNORECASE)
_PLAIN = ("empty", "default", "fewshot")


def read_template(draft: Draft, key: str, value: Any) -> None:
    """Reads ``template``, a name for every family of models."""
    word = text(value)
    if word in _PLAIN:
        draft.put("data.chat_template", "none", key=key)
        why = "turns are written as `### Human:` and `### Assistant:`, each answer ends"
        draft.note("assumed", key, why, target="data.chat_template")
    elif word in TEMPLATES and not _CHATS.search(str(draft.get("model_name_or_path"))):
        why = "delete it where the tokenizer has its own: that one is exactly the model's"
        read_template_name(draft, key, word, note=why)
    else:
        why = "the tokenizer's own chat template is used, whatever its name here"
        draft.note("assumed", key, why)


def assemble_data(draft: Draft) -> None:
    """Fills ``data`` from the datasets, their mixing and what the info file says of them."""
    info = _read_info(draft)
    found = draft.read("dataset", names, [])
    if found:
        read_sources(draft, "dataset", found, lambda _, name: _read_named(draft, name, info))
        _assemble_mixture(draft, len(found))
    held_out = draft.read("eval_dataset", names, [])
    if held_out:
        read_eval(
            draft, "eval_dataset", held_out,
            lambda key, name: _read_named(draft, name, info, key=key),
        )  # fmt: skip
    samples = draft.read("max_samples", whole)
    if samples is not None:
        parts = draft.at("data.mixture") or [draft.document.setdefault("data", {})]
        for part in cast("list[dict[str, Any]]", parts):
            part["max_rows"] = samples
        if len(parts) == 1:
            draft.origins["data.max_rows"] = "max_samples"
        draft.note("converted", "max_samples", target="data.max_rows")
    if draft.on("streaming") and draft.get("buffer_size") is not None:
        draft.put("data.stream_window", draft.read("buffer_size", whole), key="buffer_size")


def _assemble_mixture(draft: Draft, count: int) -> None:
    strategy = str(draft.get("mix_strategy") or "concat")
    if count == 1 or strategy == "concat":
        return
    stopping = "all_exhausted" if strategy == "interleave_over" else "first_exhausted"
    draft.put("data.mixture_stopping", stopping, key="mix_strategy")
    given = draft.get("interleave_probs")
    shares = [1.0] * count if given is None else draft.read("interleave_probs", _shares, [])
    if len(shares) != count:
        why = f"`interleave_probs` must be {count} numbers, one a dataset"
        draft.note("unusable", "interleave_probs", why)
        return
    parts = cast("list[dict[str, Any]]", draft.at("data.mixture"))
    for index, share in enumerate(shares):
        parts[index]["weight"] = share
        if given is not None:
            draft.origins[f"data.mixture.{index}.weight"] = "interleave_probs"


def _shares(value: Any) -> list[float | int]:
    found: Any = value.split(",") if isinstance(value, str) else value
    items = cast("list[Any]", found) if isinstance(found, list) else [found]
    return [number(share) for share in items]


def _read_info(draft: Draft) -> Mapping[str, Any]:
    """Returns the datasets that the info file beside the config describes."""
    path = draft.directory / str(draft.get("dataset_dir") or "data") / INFO_FILE
    try:
        if path.is_file() and path.stat().st_size <= _MAX_INFO_BYTES:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        draft.note("unusable", "dataset_dir", f"`{path}` cannot be read: {error}")
    return {}


def _read_named(draft: Draft, name: str, info: Mapping[str, Any], *, key: str = "dataset") -> None:
    place = str(draft.get("dataset_dir") or "data").rstrip("/")
    entry = info.get(name)
    if isinstance(entry, dict):
        _read_entry(draft, name, cast("dict[str, Any]", entry), place, key)
        return
    if name in HUB_DATASETS:
        draft.put("data.dataset", HUB_DATASETS[name], key=key)
        draft.put("data.format", "alpaca", key=key)
        draft.note("converted", key, target="data.dataset, data.format")
        return
    draft.put("data.path", f"{place}/{name}.json", key=key)
    draft.put("data.format", "text" if _is_plain_text(draft) else "auto", key=key)
    why = f"look up `{name}` in `{INFO_FILE}`, which is not beside the config: its file and columns"
    draft.note("assumed", key, why, target="data.path, data.format")


def _read_entry(draft: Draft, name: str, entry: dict[str, Any], place: str, key: str) -> None:
    """Reads what the info file says of a dataset."""
    targets = ["data.dataset" if entry.get("hf_hub_url") else "data.path", "data.format"]
    if entry.get("hf_hub_url"):
        draft.put("data.dataset", str(entry["hf_hub_url"]), key=key)
        for field, target in (("subset", "data.config"), ("split", "data.split")):
            if entry.get(field):
                draft.put(target, str(entry[field]), key=key)
                targets.append(target)
    else:
        file = str(entry.get("file_name") or f"{name}.json")
        draft.put("data.path", f"{place}/{file}", key=key)
    if entry.get("num_samples"):
        draft.put("data.max_rows", entry["num_samples"], key=key)
    lost = [
        field for field in ("ranking", "folder", "script_url", "ms_hub_url") if entry.get(field)
    ]
    columns = cast("dict[str, Any]", entry.get("columns") or {})
    is_sharegpt = entry.get("formatting") == "sharegpt"
    lost += (_read_sharegpt if is_sharegpt else _read_alpaca)(draft, entry, columns, key)
    if draft.has("data.columns"):
        targets.append("data.columns")
    draft.note("converted", key, target=", ".join(targets))
    for field in lost:
        draft.note("no_counterpart", key, f"`{field}` of `{name}` in `{INFO_FILE}` is not used")


def _read_sharegpt(
    draft: Draft, entry: dict[str, Any], columns: dict[str, Any], key: str
) -> list[str]:
    draft.put("data.format", "messages", key=key)
    tags = cast("dict[str, Any]", entry.get("tags") or {})
    wanted = {
        name: str(columns[name]) for name in ("messages", "system", "tools") if columns.get(name)
    }
    if wanted.get("messages") == "conversations":
        del wanted["messages"]
    for tag, name, known in (
        ("role_tag", "messages.role", ("from", "role")),
        ("content_tag", "messages.content", ("value", "content")),
    ):
        if tags.get(tag) and tags[tag] not in known:
            wanted[name] = str(tags[tag])
    add_columns(draft, wanted, key=key)
    odd = [
        tag for tag, role in _TAGS.items()
        if tags.get(tag) and MESSAGE_ROLES.get(str(tags[tag]).lower()) != role
    ]  # fmt: skip
    return [*odd, *(name for name in ("images", "videos", "audios") if columns.get(name))]


def _read_alpaca(
    draft: Draft, _entry: dict[str, Any], columns: dict[str, Any], key: str
) -> list[str]:
    if _is_plain_text(draft) or set(columns) == {"prompt"}:
        draft.put("data.format", "text", key=key)
        add_columns(draft, {"text": str(columns.get("prompt", "text"))}, key=key)
        return []
    spelled = {"instruction": "prompt", "input": "query", "output": "response"}
    told = {name: str(columns[other]) for name, other in spelled.items() if columns.get(other)}
    is_pair = "instruction" in told and "input" not in told and told["instruction"] != "instruction"
    if is_pair:
        draft.put("data.format", "prompt_completion", key=key)
        pair = {"prompt": told["instruction"], "completion": told.get("output", "output")}
        add_columns(draft, pair, key=key)
    else:
        draft.put("data.format", "alpaca", key=key)
        add_columns(draft, told, key=key)
    return [name for name in ("system", "history", "images") if columns.get(name)]


def _is_plain_text(draft: Draft) -> bool:
    return str(draft.get("stage")) == "pt"
