"""The entries of axolotl's ``datasets``: where rows lie, their shape, what of them is trained.

https://docs.axolotl.ai/docs/dataset-formats/
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fsdpq.importing import known_keys
from fsdpq.importing.draft import Always, Choice, Draft, Lost, Rule, Table, To, With
from fsdpq.importing.sources import (
    add_columns,
    read_dataset,
    read_eval,
    read_files,
    read_roles,
    read_sources,
    read_template,
)
from fsdpq.importing.values import mapping, text, whole
from fsdpq.rows.messages import MESSAGE_ROLES

UNKNOWN = "axolotl does not know it and drops it in silence"
FALLBACK = "tokenizer_default_fallback_"

_OPEN_ORCA = {"prompt": "question", "completion": "response"}
_TYPES: Mapping[str, tuple[str, Mapping[str, str], str]] = {
    "alpaca": ("alpaca", {}, ""),
    "chat_template": ("messages", {}, ""),
    "sharegpt": ("messages", {}, ""),
    "pygmalion": ("messages", {}, ""),
    "completion": ("text", {}, ""),
    "input_output": ("input_output", {}, ""),
    "gpteacher": ("alpaca", {"output": "response"}, ""),
    "alpaca_chat": ("alpaca", {"output": "response"}, ""),
    "alpaca_chat.load_qa": ("qna_no_ctx", {}, ""),
    "alpaca_chat.load_camel_ai": (
        "prompt_completion", {"prompt": "message_1", "completion": "message_2"}, "",
    ),
    "alpaca_w_system.load_open_orca": (
        "prompt_completion", _OPEN_ORCA, "the column `system_prompt` is not used",
    ),
    "jeopardy": ("qna_no_ctx", {}, "the column `category` is not used"),
    "oasst": ("prompt_completion", {"prompt": "INSTRUCTION", "completion": "RESPONSE"}, ""),
    "summarizetldr": ("prompt_completion", {"prompt": "article", "completion": "summary"}, ""),
    "context_qa": ("qna", {"context": "article"}, ""),
    "context_qa.load_v2": ("qna", {}, ""),
    "metharme": ("prompt_completion", {"completion": "generation"}, ""),
}  # fmt: skip
"""Type of a dataset -> format, columns by other names, what differs."""


def read_datasets(draft: Draft, key: str, value: Any) -> None:
    """Reads ``datasets``: one, or the parts of a mixture."""
    entries = cast("list[Any]", value) if isinstance(value, list) else [value]
    read_sources(draft, key, entries, lambda place, entry: _read_entry(draft, place, entry))


def _read_entry(draft: Draft, place: str, entry: Any) -> None:
    DATASET.apply(draft, place, mapping(entry))
    columns, format_name = draft.at("data.columns"), draft.at("data.format")
    if columns and format_name is None:
        draft.put("data.format", "messages")


def read_test_datasets(draft: Draft, key: str, value: Any) -> None:
    """Reads ``test_datasets``: one of them can be the rows for evaluation."""
    entries = cast("list[Any]", value) if isinstance(value, list) else [value]
    read_eval(draft, key, entries, lambda place, entry: _read_entry(draft, place, entry))


def read_words(draft: Draft, key: str, value: Any) -> None:
    """Reads the name of a chat template."""
    word = text(value)
    if word == "tokenizer_default":
        draft.note("built_in", key, "the tokenizer's own chat template is used")
    elif word.startswith(FALLBACK):
        why = f"for a tokenizer without a template: `chat_template: {word.removeprefix(FALLBACK)}`"
        draft.note("assumed", key, why)
    elif word == "jinja":
        draft.note("built_in", key, "`chat_template_jinja` says which")
    else:
        read_template(draft, key, word)


def read_jinja(draft: Draft, key: str, value: Any) -> None:
    """Reads a template of one's own: a file; its text would have to be written to one."""
    word = text(value)
    if word.endswith(".jinja") and "{" not in word:
        draft.put("data.chat_template", word, key=key)
        draft.note("converted", key, target="data.chat_template")
    else:
        why = "write the template to a file that ends in `.jinja`, and its name here"
        draft.note("no_counterpart", key, why, target="data.chat_template")


def _read_type(draft: Draft, key: str, value: Any) -> None:
    if isinstance(value, dict):
        _read_own_type(draft, key, cast("dict[str, Any]", value))
        return
    word = text(value)
    bare = word.partition(":")[0]
    found = _TYPES.get(bare) or _TYPES.get(bare.partition(".")[0])
    if found is None:
        note = f"no format is called `{word}`: it is told from the columns"
        draft.put("data.format", "auto", key=key)
        draft.note("assumed", key, note, target="data.format")
        return
    format_name, columns, note = found
    draft.put("data.format", format_name, key=key)
    add_columns(draft, columns, key=key)
    if not note and word not in _TYPES:
        note = f"as `{format_name}`, not as its variant `{word}`"
    target = "data.format, data.columns" if columns else "data.format"
    draft.note("assumed" if note else "converted", key, note, target=target)


def _read_own_type(draft: Draft, key: str, value: dict[str, Any]) -> None:
    """Reads a type that names its columns and writes its prompt."""
    has_input = value.get("field_input") is not None
    names = {"field_instruction": "prompt", "field_output": "completion"}
    if has_input:
        names = {
            "field_instruction": "instruction", "field_input": "input", "field_output": "output",
        }  # fmt: skip
    draft.put("data.format", "alpaca" if has_input else "prompt_completion", key=key)
    columns = {name: str(value[field]) for field, name in names.items() if value.get(field)}
    if not has_input:
        columns = {"prompt": "instruction", "completion": "output"} | columns
    add_columns(draft, columns, key=key)
    why = "its own prompt text is left out: the chat template or the format's text is used"
    draft.note("assumed", key, why, target="data.format, data.columns")


def _read_mappings(draft: Draft, key: str, value: Any) -> None:
    for name, other in mapping(value).items():
        _name_field(draft, f"{key}.{name}", name, text(other))


def _message_field(name: str) -> With:
    def read(draft: Draft, key: str, value: Any) -> None:
        _name_field(draft, key, name, text(value))

    return With("data.columns", read)


def _name_field(draft: Draft, key: str, name: str, other: str) -> None:
    """Reads the name of a field of messages; ``from`` and ``value`` are known as they are."""
    known = {"role": ("role", "from"), "content": ("content", "value"), "train": ("train",)}
    if name not in known:
        draft.note("no_counterpart", key, "fields of messages are read by the names that they have")
    elif other in known[name] or (name == "train" and other == "training"):
        draft.note("built_in", key, f"messages are read with `{other}` as they are")
    else:
        add_columns(draft, {f"messages.{name}": other}, key=key)
        draft.note("converted", key, target="data.columns")


def _column(name: str, *, standard: tuple[str, ...] = ()) -> With:
    def read(draft: Draft, key: str, value: Any) -> None:
        if text(value) in standard:
            draft.note("built_in", key, f"a column `{value}` is read as it is")
            return
        add_columns(draft, {name: text(value)}, key=key)
        draft.note("converted", key, target="data.columns")

    return With("data.columns", read)


def _read_role_words(draft: Draft, key: str, value: Any) -> None:
    for role, words in mapping(value).items():
        spelled = cast("list[Any]", words) if isinstance(words, list) else [words]
        odd = [word for word in spelled if MESSAGE_ROLES.get(str(word).lower()) != role]
        if odd:
            why = f"no role is called `{odd[0]}`: write `{role}` in the rows"
            draft.note("no_counterpart", f"{key}.{role}", why)
        else:
            draft.note("built_in", f"{key}.{role}", "these roles are known")


def _read_shards(draft: Draft, key: str, value: Any) -> None:
    shards = whole(value)
    if shards > 1:
        split = str(draft.at("data.split") or "train")
        draft.put("data.split", f"{split}[:{max(1, round(100 / shards))}%]", key=key)
        why = "the first rows of the split, where axolotl takes one of its shards"
        draft.note("assumed", key, why, target="data.split")
    else:
        draft.note("built_in", key, "asks for nothing")


_ENDS = Choice(
    "data.train_on_eos",
    {
        "turn": "turn",
        "last": "last",
        "all": ("turn", "what ends the user's turns carries no loss"),
        "none": "none",
    },
)

_RULES: Mapping[str, Rule] = {
    "path": With("data.dataset, data.path", read_dataset),
    "data_files": With("data.path", read_files),
    "name": To("data.config", text),
    "type": With("data.format, data.columns", _read_type),
    "split": To("data.split", text),
    "revision": To("data.revision", text),
    "ds_type": Always("the ending of the file says what it is"),
    "shards": With("data.split", _read_shards),
    "shards_idx": Lost("write a slice: `split: train[10%:20%]`"),
    "preprocess_shards": Always("rows are prepared a part at a time"),
    "field": _column("text", standard=("text",)),
    "field_messages": _column("messages", standard=("messages", "conversations")),
    "field_tools": _column("tools", standard=("tools",)),
    "message_field_role": _message_field("role"),
    "message_field_content": _message_field("content"),
    "message_field_training": _message_field("train"),
    "message_field_training_detail": Lost("a message is trained whole or not: its `train`"),
    "message_property_mappings": With("data.columns", _read_mappings),
    "roles": With("", _read_role_words),
    "roles_to_train": With("data.roles_to_train", read_roles),
    "train_on_eos": _ENDS,
    "train_on_eot": _ENDS,
    "chat_template": With("data.chat_template", read_words),
    "chat_template_jinja": With("data.chat_template", read_jinja),
    "conversation": Always("`chat_template` says how turns are written"),
    "drop_system_message": Lost("delete the system messages of the rows"),
    "trust_remote_code": Lost("code out of a dataset's repository is not run for a recipe"),
}

DATASET = Table(
    _RULES, known_keys.AXOLOTL_DATASET, UNKNOWN, {"": "rows are read as `data.format` says"}
)
