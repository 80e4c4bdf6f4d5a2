"""Turns of real models' templates, against transformers' own masks of generation marks.

TRL ships the templates of many models, and for each a twin that marks what the model generates
(``{% generation %}``). A twin is a reference for us twice: our masks of the twin itself must be
transformers' masks, and those of the unmarked original must be the twin's, but for what the
generation prompt writes and for what follows the end of a turn, which no model has to learn.
"""

from __future__ import annotations

import importlib.util
import re
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from support.templates import as_template, build_byte_tokenizer, trained_pieces
from transformers.utils import chat_template_utils

from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.templates.jinja_text import TemplateError
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.recipe.sections.data import DataOptions

SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": " Good day! "},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes <b>é 👩‍👩‍👧</b>"},
]
REASONED = [
    *CHAT[:3],
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSure."},
]
TWICE = [
    *REASONED,
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "<think>\nxx\n</think>\n\nDone."},
]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "one"}},
        },
    },
}
CALLED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALL = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "name": "add", "content": '3\n"x"'},
    {"role": "assistant", "content": "It is 3."},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "two turns": CHAT,
    "system": [SYSTEM, *CHAT],
    "reasoning in the text": REASONED,
    "reasoning in two turns": TWICE,
    "reasoning apart": [
        CHAT[0],
        {"role": "assistant", "content": "ok", "reasoning_content": "because"},
    ],
    "one turn": CHAT[:2],
    "empty answer": [CHAT[0], {"role": "assistant", "content": ""}],
    "tools": CALL,
}
PICTURES = ("idefics3", "llava_next", "smolvlm")
"""Their templates show only contents that are lists of parts; they leave texts out."""


@cache
def _folder() -> Path:
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TRL needs Python 3.11")
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def _read(name: str) -> str:
    return (_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def _twins() -> list[str]:
    spec = importlib.util.find_spec("trl")
    if spec is None:
        return ["qwen3"]
    paths = sorted(_folder().glob("*_training.jinja"))
    return [path.stem.removesuffix("_training") for path in paths]


def _tokenize(tokenizer: Any, source: str, messages: Any, tools: Any) -> Row | TemplateError:
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=as_template(source))
    return rows.tokenize([{"messages": messages, "tools": tools}])[0]


def _apply(tokenizer: Any, source: str, messages: Any, tools: Any) -> tuple[list[int], list[int]]:
    found = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=source, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("name", _twins())
def test_marked_answers_are_those_of_transformers(name: str) -> None:
    source = _read(f"{name}_training")
    tokenizer = build_byte_tokenizer(source)
    compared = 0
    for kind, messages in CONVERSATIONS.items():
        tools = [ADD] if kind == "tools" else None
        row = _tokenize(tokenizer, source, messages, tools)
        if isinstance(row, TemplateError):
            continue
        ids, mask = _apply(tokenizer, source, messages, tools)
        assert row.input_ids.tolist() == ids, kind
        assert row.loss_mask.tolist() == mask, kind
        compared += 1
    assert compared >= (0 if name in PICTURES else 6)


@pytest.mark.parametrize("name", [name for name in _twins() if name not in PICTURES])
def test_unmarked_answers_are_those_of_the_marked_twin(name: str) -> None:
    marked, own = _read(f"{name}_training"), _read(name)
    tokenizer: Any = build_byte_tokenizer(own, marked)
    compared = 0
    for kind, messages in CONVERSATIONS.items():
        tools = [ADD] if kind == "tools" else None
        row = _tokenize(tokenizer, own, messages, tools)
        if isinstance(row, TemplateError) or (name, kind) == ("diffusion_gemma", "tools"):
            continue  # its generation prompt is empty after a tool
        try:
            ids, mask = _apply(tokenizer, marked, messages, tools)
        except (jinja2.TemplateError, TypeError):
            continue
        if row.input_ids.tolist() != ids:
            continue  # the twin renders it differently
        compared += 1
        prompt = tokenizer.apply_chat_template(
            CHAT[:1], tools=tools, chat_template=own, tokenize=False, add_generation_prompt=True
        )
        ours, theirs = row.loss_mask.tolist(), mask
        assert all(b for a, b in zip(ours, theirs, strict=True) if a), kind
        rest = [i if b and not a else 0 for i, a, b in zip(ids, ours, theirs, strict=True)]
        for piece in re.split("!+", str(tokenizer.decode(rest))):  # id 0 is an exclamation mark
            for part in re.split(r"<eos>|(?<=^)\n|\n$", piece):
                assert part in prompt, f"{kind}: `{part}` is not trained"
    assert compared >= (0 if name == "glm4moe" else 2)


def test_a_template_that_leaves_texts_out_is_refused() -> None:
    for name in PICTURES:
        source = _read(name)
        row = _tokenize(build_byte_tokenizer(source), source, CHAT, None)
        assert isinstance(row, TemplateError)


def test_tools_that_a_template_does_not_show_are_refused() -> None:
    for name, what in (("llama3", "`tools`"), ("lfm2", "the tool call of message 2")):
        source = _read(name)
        row = _tokenize(build_byte_tokenizer(source), source, CALL, [ADD])
        assert isinstance(row, TemplateError)
        assert str(row) == f"the chat template does not show {what}"


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_built_in_templates_train_answers_and_their_ends(name: str) -> None:
    built_in = BUILT_IN_TEMPLATES[name]
    tokenizer: Any = build_byte_tokenizer(built_in.source, *built_in.tokens)
    template = choose_template(tokenizer, name)
    assert template is not None
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    end = "<eos>" if built_in.needs_eos else {"phi3": "<|end|>"}.get(name, built_in.tokens[-1])
    for messages in (CHAT, [SYSTEM, *CHAT]):
        row = rows.tokenize([{"messages": messages}])[0]
        assert isinstance(row, Row)
        ids, mask = _apply(tokenizer, template.source, messages, None)
        assert (row.input_ids.tolist(), row.loss_mask.tolist()) == (ids, mask)
        pieces = [piece.replace(" ", "") for piece in trained_pieces(row, tokenizer)]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert pieces == [f"{answer}{end}".replace(" ", "") for answer in answers]
        asked = rows.prompt_ids("Hi there")
        one = rows.tokenize([{"messages": CHAT[:2]}])[0]
        assert isinstance(one, Row)
        assert asked == one.input_ids[: one.loss_mask.tolist().index(1)].tolist()
    assert rows.end_ids() >= {tokenizer.convert_tokens_to_ids(end)}


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_built_in_templates_refuse_roles_that_they_do_not_know(name: str) -> None:
    built_in = BUILT_IN_TEMPLATES[name]
    tokenizer = build_byte_tokenizer(built_in.source, *built_in.tokens)
    template = choose_template(tokenizer, name)
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    row = rows.tokenize([{"messages": CALL, "tools": [ADD]}])[0]
    assert isinstance(row, TemplateError), "tool calls would be left out"


EXPECTED: list[tuple[str, str, list[str]]] = [
    # Earlier reasoning is left out by the template, so it is not looked for.
    ("qwen3", "reasoning in two turns", [
        " Good day! <|im_end|>", "Sure.<|im_end|>", "<think>\nxx\n</think>\n\nDone.<|im_end|>",
    ]),
    ("qwen3", "tools", [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is 3.<|im_end|>",
    ]),
    # The prompt ends in an opened `<think>`: it is not trained, what closes it is.
    ("qwen3_6", "reasoning in the text", [
        "Good day!<|im_end|>", "hm\n</think>\n\nSure.<|im_end|>",
    ]),
    ("nemotron_3_nano", "one turn", ["</think> Good day!<|im_end|>"]),
    ("deepseekv3", "empty answer", ["<\uff5cend\u2581of\u2581sentence\uff5c>"]),
    # Inner answers end in another token than the last.
    ("gptoss", "one turn", ["<|channel|>final<|message|> Good day! <|return|>"]),
    ("gptoss", "reasoning in the text", [
        "<|channel|>final<|message|> Good day! <|end|>",
        "<|channel|>final<|message|><think>\nhm\n</think>\n\nSure.<|return|>",
    ]),
    # Nothing ends an inner answer; the end-of-text token is added to the last one.
    ("glm4moe", "reasoning in the text", [
        "\n<think></think>\nGood day!", "\n<think>hm</think>\nSure.<eos>",
    ]),
    ("llama3_1", "tools", [
        '{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "It is 3.<|eot_id|>",
    ]),
    ("phi3", "one turn", [" Good day! <|end|>"]),
    ("cohere2", "empty answer", ["<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "pieces"), EXPECTED)
def test_what_templates_of_models_leave_to_train(name: str, kind: str, pieces: list[str]) -> None:
    source = _read(name)
    tokenizer = build_byte_tokenizer(source)
    row = _tokenize(tokenizer, source, CONVERSATIONS[kind], [ADD] if kind == "tools" else None)
    assert isinstance(row, Row), row
    assert trained_pieces(row, tokenizer) == pieces


def test_results_of_tools_that_a_template_quotes_are_found() -> None:
    source = _read("llama3_1")
    tokenizer = build_byte_tokenizer(source)
    options = DataOptions(roles_to_train=("tool",))
    rows = RowTokenizer(tokenizer, options, "messages", template=as_template(source))
    row = rows.tokenize([{"messages": CALL, "tools": [ADD]}])[0]
    assert isinstance(row, Row), row
    assert trained_pieces(row, tokenizer) == ['3\\n\\"x\\""<|eot_id|>']


def test_a_template_that_writes_the_date_is_understood_after_midnight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = _read("llama3_2")
    assert "strftime_now" in source
    tokenizer: Any = build_byte_tokenizer(source)
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=as_template(source))
    expected = ["Good day!<|eot_id|>", "Yes <b>é 👩‍👩‍👧</b><|eot_id|>"]
    for day in (datetime(2031, 12, 31), datetime(2032, 1, 1)):
        monkeypatch.setattr(
            chat_template_utils, "datetime", SimpleNamespace(now=partial(day.replace))
        )
        row = rows.tokenize([{"messages": CHAT}])[0]
        assert isinstance(row, Row), row
        assert f"Today Date: {day:%d %b %Y}" in str(tokenizer.decode(row.input_ids.tolist()))
        assert trained_pieces(row, tokenizer) == expected
