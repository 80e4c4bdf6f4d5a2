"""Conversations as people's files spell them, as chat templates take them, and their mistakes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fsdpq.rows.formats import find_mistake
from fsdpq.rows.messages import is_conversation, read_conversation

ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
WEATHER = {"name": "weather", "description": "Tells.", "parameters": {"type": "object"}}


def _messages(*messages: Any, **columns: Any) -> list[dict[str, Any]]:
    return read_conversation({"messages": list(messages), **columns}).messages


def _mistake(*messages: Any, **columns: Any) -> str:
    return find_mistake({"messages": list(messages), **columns}, "messages")


def test_sharegpt_is_read_as_role_and_content() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = {"conversations": [{"from": "system", "value": "s"}, *turns]}
    assert find_mistake(row, "messages") == ""
    expected = [{"role": "system", "content": "s"}, ASK, ANSWER]
    assert _messages(*row["conversations"]) == expected


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        ("developer", "system"), ("Human", "user"), ("prompter", "user"), ("model", "assistant"),
        ("function", "tool"), ("ipython", "tool"), ("observation", "tool"),
    ],
)  # fmt: skip
def test_roles_are_those_of_chat_templates(spelling: str, role: str) -> None:
    before = {"user": [], "tool": [ASK, ANSWER], "assistant": [ASK], "system": []}[role]
    after = [] if role in ("assistant", "tool") else [ANSWER] if role == "user" else [ASK, ANSWER]
    messages = _messages(*before, {"role": spelling, "content": "x"}, *after)
    assert messages[len(before)] == {"role": role, "content": "x"}


def test_messages_may_be_json_text_as_csv_holds_them() -> None:
    conversation = read_conversation({"messages": json.dumps([ASK, ANSWER])})
    assert conversation.messages == [ASK, ANSWER]


def test_parts_of_text_are_joined_and_null_fields_left_out() -> None:
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}, "c"]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    assert _messages(message, ANSWER)[0] == {"role": "user", "content": "abc"}


def test_reasoning_and_names_are_kept_and_other_fields_not() -> None:
    extra = {"reasoning_content": "so", "name": "n", "id": 7}
    assert _messages(ASK, ANSWER | extra)[1] == ANSWER | {"reasoning_content": "so", "name": "n"}


def test_the_system_column_becomes_the_first_message() -> None:
    conversation = read_conversation({"messages": [ASK, ANSWER], "system": "s"})
    assert conversation.messages == [{"role": "system", "content": "s"}, ASK, ANSWER]
    assert conversation.train == [None, None, None]
    assert _messages(ASK, ANSWER, system="") == [ASK, ANSWER]


@pytest.mark.parametrize("tools", [[WEATHER], [{"type": "function", "function": WEATHER}]])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_have_one_shape(tools: list[dict[str, Any]], as_text: bool) -> None:
    filled = [tool | {"strict": None} for tool in tools]
    row = {"messages": [ASK, ANSWER], "tools": json.dumps(filled) if as_text else filled}
    assert read_conversation(row).tools == [{"type": "function", "function": WEATHER}]


def test_no_tools_are_none() -> None:
    for nothing in (None, "", [], "[]"):
        assert read_conversation({"messages": [ASK, ANSWER], "tools": nothing}).tools is None


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL["function"]]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps([CALL["function"]])},
    ],
)
def test_calls_have_one_shape_with_arguments_as_an_object(message: dict[str, Any]) -> None:
    result = {"role": "tool", "content": "7 degrees", "tool_call_id": "1"}
    messages = _messages(ASK, message, result, ANSWER)
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[2] == result


def test_ids_of_calls_are_kept() -> None:
    [_, message] = _messages(ASK, {"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]})
    assert message["tool_calls"] == [CALL | {"id": "c1"}]


@pytest.mark.parametrize(
    ("flag", "train"),
    [({"train": False}, False), ({"training": True}, True), ({"weight": 0}, False), ({}, None)],
)
def test_a_message_says_whether_it_is_trained(flag: dict[str, Any], train: bool | None) -> None:
    conversation = read_conversation({"messages": [ASK, ANSWER | flag]})
    assert conversation.train == [None, train]
    assert conversation.messages == [ASK, ANSWER]


def test_prompt_and_completion_of_messages_are_one_conversation() -> None:
    row = {"prompt": [ASK, ANSWER | {"train": True}, ASK], "completion": [ANSWER]}
    assert is_conversation(row, "prompt_completion")
    assert not is_conversation({"prompt": "a", "completion": "b"}, "prompt_completion")
    conversation = read_conversation(row)
    assert conversation.messages == [ASK, ANSWER, ASK, ANSWER]
    assert conversation.flags(train_on_prompt=False) == [False, False, False, None]
    assert conversation.flags(train_on_prompt=True) == [None, True, None, None]
    assert find_mistake(row, "prompt_completion") == ""


@pytest.mark.parametrize(
    ("messages", "mistake"),
    [
        ([], "`messages` is not a list of messages"),
        (["a"], "message 1 is text, not an object"),
        ([{"content": "a"}], "message 1 has no `role` (it has `content`)"),
        ([{"role": "sys", "content": "a"}], "message 1 has the role `sys`, which is none of"),
        ([{"role": 3, "content": "a"}], "message 1 has the role `3`, which is none of"),
        ([{"role": "user"}], "message 1 has no text in `content`"),
        ([{"role": "user", "content": None}], "message 1 has null in `content`"),
        ([{"role": "user", "content": 4}], "message 1 has a number in `content`, not text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "message 1 has a part of type `image` in `content`: only text can be trained on",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has a part without `text`"),
        ([ASK, ANSWER | {"train": "no"}], "message 2 has `train: no`, which must be true or false"),
        ([ASK, ANSWER | {"weight": 2}], "message 2 has `weight: 2`, which must be 0 or 1"),
        ([ASK, ANSWER | {"train_detail": []}], "message 2 has `train_detail`"),
        ([ANSWER], "message 1 is of the assistant: the user has to begin"),
        (
            [{"role": "system", "content": "s"}, ANSWER],
            "message 2 is of the assistant: the user has to begin",
        ),
        ([ASK, ASK, ANSWER], "messages 1 and 2 are both of the user"),
        ([ASK, ANSWER, ANSWER], "messages 2 and 3 are both of the assistant"),
        (
            [ASK, {"role": "system", "content": "s"}, ANSWER],
            "message 2 is of the system: only the first one may be",
        ),
        ([ASK, {"role": "tool", "content": "x"}], "message 2 is of a tool, which no assistant"),
        ([ASK, {"from": "function_call", "value": "x"}], "message 2 is a tool call whose content"),
        ([ASK, {"role": "assistant", "tool_calls": "x"}], "message 2 has `tool_calls` that are no"),
        ([ASK, {"role": "assistant", "tool_calls": [{}]}], "message 2 has a tool call without `na"),
        (
            [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}],
            "message 2 has text that is no JSON object as the arguments of its tool call `f`",
        ),
    ],
)
def test_what_is_no_conversation_is_said_with_the_number(messages: list, mistake: str) -> None:
    assert mistake in _mistake(*messages)


@pytest.mark.parametrize(
    ("columns", "mistake"),
    [
        ({"tools": "weather"}, "`tools` is neither a list of functions nor the JSON text of one"),
        ({"tools": [{"type": "function"}]}, "tool 1 has no `name`"),
        ({"tools": ["f"]}, "tool 1 is text, not an object"),
        ({"system": 3}, "`system` is a number, not text"),
    ],
)
def test_mistakes_of_other_columns_are_said(columns: dict, mistake: str) -> None:
    assert _mistake(ASK, ANSWER, **columns) == mistake


def test_two_system_prompts_are_said() -> None:
    first = {"role": "system", "content": "s"}
    mistake = "`system` is a column, and message 1 is of the system too"
    assert _mistake(first, ASK, ANSWER, system="t") == mistake


def test_the_order_of_prompt_and_completion_is_that_of_both() -> None:
    row = {"prompt": [ASK, ANSWER], "completion": [ANSWER]}
    assert find_mistake(row, "prompt_completion") == "messages 2 and 3 are both of the assistant"


def test_numbers_of_messages_are_those_of_the_row() -> None:
    assert _mistake(ANSWER, system="s") == "message 1 is of the assistant: the user has to begin"
    assert _mistake(ASK, ASK, system="s") == "messages 1 and 2 are both of the user"


def test_empty_messages_are_no_mistake_and_several_tools_may_answer() -> None:
    result = {"role": "tool", "content": ""}
    call = {"role": "assistant", "tool_calls": [CALL]}
    empty = [{"role": role, "content": ""} for role in ("user", "assistant")]
    assert _mistake(empty[0], call, result, result, empty[1], ASK) == ""
    assert _mistake(ASK) == "", "counted as without a trained token"
