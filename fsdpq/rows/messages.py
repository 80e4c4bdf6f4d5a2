"""Conversations of rows: what people's files hold, as the messages that chat templates take.

Files spell them in many ways: ``role`` and ``content`` or ShareGPT's ``from`` and ``value``, a text
or a list of parts, tools as objects or as JSON text, a system prompt as a column. Here all of them
become one, or a mistake that names the message. What a template would refuse or leave out without a
word is a mistake; empty messages are not, `fsdpq data inspect` counts them.
https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from fsdpq.rows.tools import read_call_message, read_tool_calls, read_tools
from fsdpq.rows.values import MistakeError, as_list, list_names, type_name

MESSAGE_ROLES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("system", "developer"), "system"),
        **dict.fromkeys(("user", "human", "prompter"), "user"),
        **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
        **dict.fromkeys(
            ("tool", "function", "ipython", "observation", "tool_response", "function_response"),
            "tool",
        ),
        **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    }
)
"""Roles as rows spell them -> as chat templates do."""

_CALL_ROLES = ("function_call", "tool_call")
_FLAGS = ("train", "training", "weight")
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, as chat templates take them.

    Attributes:
        messages: each with ``role`` (system, user, assistant or tool) and ``content`` (text), and
            with ``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content`` and ``thinking``
            where the row has them.
        train: for each message, whether the row says that it carries loss; None where it is
            silent.
        tools: what the assistant can call, each ``{"type": "function", "function": {...}}``; None
            without any.
        num_prompt: how many of them are the ``prompt`` of a ``completion``.
    """

    messages: list[dict[str, Any]]
    train: list[bool | None]
    tools: list[dict[str, Any]] | None = None
    num_prompt: int = 0

    def flags(self, *, train_on_prompt: bool) -> list[bool | None]:
        """Returns `train` where a ``prompt`` is trained too, else with its messages left out."""
        if train_on_prompt:
            return self.train
        return [*([False] * self.num_prompt), *self.train[self.num_prompt :]]


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """Returns the conversation of a row: of its ``messages``, or of ``prompt`` and ``completion``.

    Args:
        row: under its format's column names.

    Raises:
        MistakeError: it is none; names the message.
    """
    tools = read_tools(row.get("tools"))
    if "messages" in row:
        conversation = _read_messages(row["messages"], "messages")
        _add_system(conversation, row.get("system"))
        return Conversation(conversation.messages, conversation.train, tools)
    prompt = _read_messages(row["prompt"], "prompt")
    completion = _read_messages(row["completion"], "completion")
    messages = [*prompt.messages, *completion.messages]
    train = [*prompt.train, *completion.train]
    return Conversation(messages, train, tools, num_prompt=len(prompt.messages))


def check_order(messages: list[dict[str, Any]], *, has_system_column: bool = False) -> None:
    """Raises where a chat template would refuse the order of roles, or leave a message out.

    A conversation without an answer is none of those: it has nothing to train on and is counted.

    Args:
        messages: as `read_conversation` returns them.
        has_system_column: the first one is no message of the row.

    Raises:
        MistakeError: names the message by its number in the row.
    """
    before = ""
    for number, message in enumerate(messages, start=0 if has_system_column else 1):
        role = message["role"]
        if role == "system" and before:
            raise MistakeError(f"message {number} is of the system: only the first one may be")
        if role == "assistant" and before in ("", "system"):
            raise MistakeError(f"message {number} is of the assistant: the user has to begin")
        if role == "tool" and before not in ("assistant", "tool"):
            raise MistakeError(f"message {number} is of a tool, which no assistant called")
        if role == before and role != "tool":
            raise MistakeError(f"messages {number - 1} and {number} are both of the {role}")
        before = role


def is_conversation(row: Mapping[str, Any], format_name: str) -> bool:
    """Returns whether a row of the format is read by `read_conversation`."""
    if format_name == "messages":
        return True
    if format_name != "prompt_completion":
        return False
    return any(isinstance(row.get(name), list) for name in ("prompt", "completion"))


def _read_messages(value: Any, column: str) -> Conversation:
    items = as_list(value)
    if not items:
        raise MistakeError(f"`{column}` is not a list of messages")
    messages: list[dict[str, Any]] = []
    train: list[bool | None] = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise MistakeError(f"message {number} is {type_name(item)}, not an object")
        try:
            message = _read_message(cast("dict[str, Any]", item))
            train.append(_read_flag(cast("dict[str, Any]", item)))
        except MistakeError as error:
            raise MistakeError(f"message {number} {error}") from None
        messages.append(message)
    return Conversation(messages, train)


def _read_message(item: dict[str, Any]) -> dict[str, Any]:
    spelling = item.get("role")
    if spelling is None:
        spelling = item.get("from")
    role = MESSAGE_ROLES.get(spelling.lower()) if isinstance(spelling, str) else None
    if role is None:
        raise MistakeError(_say_role(spelling, item))
    content = item.get("content")
    if content is None:
        content = item.get("value")
    if spelling in _CALL_ROLES:
        return read_call_message(content)
    calls = read_tool_calls(item) if role == "assistant" else []
    if not isinstance(content, str):
        content = _read_content(content, item, may_lack=bool(calls))
    message: dict[str, Any] = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    for name in _KEPT:
        value = item.get(name)
        if value is not None:
            message[name] = value
    return message


def _say_role(spelling: Any, item: dict[str, Any]) -> str:
    if spelling is None:
        return f"has no `role` (it has {list_names(item)})"
    known = list_names(dict.fromkeys(MESSAGE_ROLES.values()))
    return f"has the role `{spelling}`, which is none of {known} and no other name of one"


def _read_content(content: Any, item: dict[str, Any], *, may_lack: bool) -> str:
    """Returns the text of what is no text: a list of parts, or nothing beside a tool call."""
    if content is None:
        if may_lack:
            return ""
        present = "null in" if "content" in item or "value" in item else "no text in"
        raise MistakeError(f"has {present} `content`")
    if not isinstance(content, list):
        raise MistakeError(f"has {type_name(content)} in `content`, not text")
    texts: list[str] = []
    for part in cast("list[Any]", content):
        text: Any = part
        if isinstance(part, dict):
            fields = cast("dict[str, Any]", part)
            if fields.get("type", "text") not in ("text", "input_text", "output_text"):
                what = f"a part of type `{fields['type']}` in `content`"
                raise MistakeError(f"has {what}: only text can be trained on")
            text = fields.get("text")
        if not isinstance(text, str):
            raise MistakeError("has a part without `text` in `content`")
        texts.append(text)
    return "".join(texts)


def _read_flag(item: dict[str, Any]) -> bool | None:
    """Returns what the message says about its loss: ``train: false``, OpenAI's ``weight: 0``."""
    for name in _FLAGS:
        value = item.get(name)
        if value is None:
            continue
        is_flag = isinstance(value, bool) or (name == "weight" and value in (0, 1))
        if not is_flag:
            allowed = "0 or 1" if name == "weight" else "true or false"
            raise MistakeError(f"has `{name}: {value}`, which must be {allowed}")
        return bool(value)
    if item.get("train_detail") is not None:
        raise MistakeError("has `train_detail`: write `train` for the whole message")
    return None


def _add_system(conversation: Conversation, system: Any) -> None:
    if system is None or system == "":
        return
    if not isinstance(system, str):
        raise MistakeError(f"`system` is {type_name(system)}, not text")
    if conversation.messages[0]["role"] == "system":
        raise MistakeError("`system` is a column, and message 1 is of the system too")
    conversation.messages.insert(0, {"role": "system", "content": system})
    conversation.train.insert(0, None)
