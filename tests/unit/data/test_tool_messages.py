"""Every spelling of tools and messages gives the tokens of transformers' own template call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.tokenizer import build_tokenizer
from transformers.utils.chat_template_utils import get_json_schema

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.formats import find_mistake, named_columns

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def weather(city: str) -> str:
    """
    Tells the weather.

    Args:
        city: Where.
    """
    return city


SCHEMA = get_json_schema(weather)
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "7 degrees"},
    {"role": "assistant", "content": "No."},
]
OPENAI = [
    *PLAIN[:2],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": CALL | {"arguments": json.dumps(CALL["arguments"])}}],
    },
    {"role": "function", "content": [{"type": "text", "text": "7 "}, "degrees"]},
    PLAIN[4],
]  # fmt: skip
SHAREGPT = [
    {"from": "human", "value": "Is it warm?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "7 degrees"},
    {"from": "gpt", "value": "No."},
]
ROWS: dict[str, dict[str, Any]] = {
    "as they are": {"messages": PLAIN, "tools": [SCHEMA]},
    "openai": {"messages": OPENAI, "tools": [SCHEMA]},
    "sharegpt": {
        "conversations": SHAREGPT,
        "system": "Be brief.",
        "tools": json.dumps([SCHEMA["function"]]),
    },
    "csv": {"messages": json.dumps(PLAIN), "tools": json.dumps([SCHEMA]), "system": ""},
    "parquet": {
        "messages": [{"tool_calls": None, "name": None, **message} for message in OPENAI],
        "tools": [{"strict": None, **SCHEMA}],
        "system": None,
    },
}


@pytest.mark.parametrize("spelling", ROWS)
def test_the_tokens_are_those_of_transformers(spelling: str) -> None:
    tokenizer = build_tokenizer(template=TEMPLATE)
    row = ROWS[spelling]
    assert find_mistake(row, "messages") == ""
    options = DataOptions(path="x", format="messages")
    template = choose_template(tokenizer, None)
    row_tokenizer = RowTokenizer(tokenizer, options, "messages", template=template)
    [found] = row_tokenizer.tokenize([named_columns(row, "messages")])
    expected: Any = tokenizer.apply_chat_template(
        PLAIN, tools=[SCHEMA], tokenize=True, return_dict=True
    )
    assert isinstance(found, Row), found
    assert found.input_ids.tolist() == expected["input_ids"]
    trained = tokenizer.decode(found.input_ids[found.loss_mask.astype(bool)].tolist())
    assert trained == '<call>weather{"city": "Oslo"}</call><|im_end|>No.<|im_end|>'
