"""Whatever a row holds, it is read or a mistake is said: nothing else is ever raised."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fsdpq.errors import RecipeError
from fsdpq.rows.detect import detect_format
from fsdpq.rows.formats import FORMATS, describe_row, find_mistake, named_columns, read_segments
from fsdpq.rows.messages import MESSAGE_ROLES, check_order, is_conversation, read_conversation

NAMES = sorted({name for known in FORMATS.values() for name in (*known.columns, *known.aliases)})
FIELDS = [
    "role", "from", "content", "value", "tool_calls", "function_call", "function", "name",
    "arguments", "train", "weight", "train_detail", "text", "label", "type", "id",
]  # fmt: skip
TEXTS = st.sampled_from(
    ["", "a", "### Human: a### Assistant: b", "[1]", '{"name": "f"}', '[{"role": "user"}]', "{",
     *MESSAGE_ROLES]
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.floats(), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from([*NAMES, "system", "tools", "x"]), VALUES, max_size=5)
COLUMNS = st.dictionaries(
    st.sampled_from([*NAMES, "messages.role", "messages.content"]),
    st.sampled_from([*NAMES, "x", "x.role", "text.a"]),
    max_size=2,
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from(list(FORMATS)), COLUMNS)
def test_a_row_without_mistake_can_be_read(
    row: dict[str, Any], name: str, columns: dict[str, str]
) -> None:
    mistake = find_mistake(row, name, columns)
    assert isinstance(mistake, str)
    assert describe_row(name, row, columns)
    if mistake:
        return
    have = named_columns(row, name, columns)
    if is_conversation(have, name):
        conversation = read_conversation(have)
        assert len(conversation.train) == len(conversation.messages) > 0
        check_order(conversation.messages, has_system_column=bool(have.get("system")))
        for message in conversation.messages:
            assert message["role"] in ("system", "user", "assistant", "tool")
            assert isinstance(message["content"], str)
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["name"], str)
    elif name == "input_output":
        assert read_segments(have["segments"])
    else:
        assert all(isinstance(have[column], str) for column in FORMATS[name].columns)


@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, max_size=3), COLUMNS)
def test_a_format_is_found_or_refused_with_a_hint(
    rows: list[dict[str, Any]], columns: dict[str, str]
) -> None:
    hints: list[str] = []
    name = ""
    try:
        name = detect_format(rows, columns).format
    except RecipeError as error:
        hints = [problem.hint for problem in error.problems]
    assert name in FORMATS or (hints and all(hints))
