"""Tools that an assistant can call, and its calls, in the one shape that chat templates take.

OpenAI's: ``{"type": "function", "function": {"name", "arguments"}}``, arguments as an object. Rows
also have bare functions, calls in a message of their own, arguments as JSON text (which a template
would quote twice). https://huggingface.co/docs/transformers/chat_extras
"""

from __future__ import annotations

from typing import Any

from fsdpq.rows.values import MistakeError, as_list, as_object, parse_json, type_name, without_nulls


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Returns the ``tools`` of a row, a list or the JSON text of one; None where there are none.

    Raises:
        MistakeError: they are no list of functions with a name.
    """
    if value is None or value in ("", []):
        return None
    items = as_list(value)
    if items is None:
        raise MistakeError("`tools` is neither a list of functions nor the JSON text of one")
    tools: list[dict[str, Any]] = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise MistakeError(f"tool {number} is {type_name(item)}, not an object")
        fields: dict[str, Any] = without_nulls(item)
        function = as_object(fields.get("function", fields))
        if function is None or not isinstance(function.get("name"), str):
            raise MistakeError(f"tool {number} has no `name`")
        tools.append({"type": "function", "function": function})
    return tools or None


def read_tool_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the tool calls of an assistant's message, none where it has none.

    Raises:
        MistakeError: they are no calls with ``name`` and ``arguments``.
    """
    calls = message.get("tool_calls")
    if calls is None and message.get("function_call") is not None:
        calls = [message["function_call"]]
    if calls is None or calls in ("", []):
        return []
    items = as_list(calls)
    if items is None:
        raise MistakeError("has `tool_calls` that are no list")
    return [_read_call(item) for item in items]


def read_call_message(content: Any) -> dict[str, Any]:
    """Returns the assistant's message that a message of the role ``function_call`` stands for.

    Raises:
        MistakeError: its content is no call, nor a list of calls, in JSON.
    """
    one = as_object(content) or as_object(parse_json(content))
    items = [one] if one else as_list(content)
    if not items or not all(as_object(item) for item in items):
        raise MistakeError("is a tool call whose content is not JSON of `name` and `arguments`")
    calls = [_read_call(item) for item in items]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _read_call(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise MistakeError(f"has a tool call that is {type_name(item)}, not an object")
    fields: dict[str, Any] = without_nulls(item)
    function = as_object(fields.get("function", fields))
    if function is None or not isinstance(function.get("name"), str):
        raise MistakeError("has a tool call without `name`")
    arguments: Any = function.get("arguments", {})
    if isinstance(arguments, str):
        parsed = as_object(parse_json(arguments)) if arguments.strip() else {}
        if parsed is None:
            what = f"the arguments of its tool call `{function['name']}`"
            raise MistakeError(f"has text that is no JSON object as {what}")
        arguments = parsed
    call: dict[str, Any] = {"type": "function"}
    if isinstance(fields.get("id"), str):
        call["id"] = fields["id"]
    call["function"] = {"name": function["name"], "arguments": arguments}
    return call
