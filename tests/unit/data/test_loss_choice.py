"""Which turns and end marks carry loss, by recipe and by row, with and without a template."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from support.templates import build_byte_tokenizer, trained_pieces
from support.tokenizer import CHATML

from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.templates.jinja_text import TemplateError
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.recipe.sections.data import DataOptions

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
TEMPLATES = {"unmarked": CHATML, "marked": BUILT_IN_TEMPLATES["chatml"].source}
END = "<|im_end|>"


def _flagged(**flags: bool) -> list[dict[str, Any]]:
    """Returns the chat with ``train`` on the messages of these contents."""
    return [{**m, "train": flags[m["content"]]} if m["content"] in flags else m for m in CHAT]


def _pieces(
    template: str | None, messages: Any, *, name: str = "messages", **options: Any
) -> list[str]:
    tokenizer = build_byte_tokenizer(TEMPLATES[template] if template else CHATML)
    chosen = choose_template(tokenizer, None if template else "none")
    rows = RowTokenizer(tokenizer, DataOptions(**options), name, template=chosen)
    row = rows.tokenize([messages if isinstance(messages, dict) else {"messages": messages}])[0]
    assert isinstance(row, Row), row
    return trained_pieces(row, tokenizer)


CHOICES: list[tuple[dict[str, Any], dict[str, bool], list[str]]] = [
    ({}, {}, ["A1" + END, "A2" + END]),
    ({"turns_to_train": "last"}, {}, ["A2" + END]),
    ({"roles_to_train": ["user"]}, {}, ["Q1" + END, "Q2" + END]),
    ({"roles_to_train": ["system", "assistant"]}, {}, ["S" + END, "A1" + END, "A2" + END]),
    ({"roles_to_train": ["user", "assistant"], "turns_to_train": "last"}, {}, ["A2" + END]),
    ({"train_on_eos": "last"}, {}, ["A1", "A2" + END]),
    ({"train_on_eos": "none"}, {}, ["A1", "A2"]),
    ({}, {"A1": False}, ["A2" + END]),
    ({}, {"Q2": True}, ["A1" + END, "Q2" + END, "A2" + END]),
    ({"turns_to_train": "last"}, {"A1": True}, ["A1" + END, "A2" + END]),
    ({"turns_to_train": "last"}, {"A2": False}, []),
    ({"train_on_eos": "last"}, {"A2": False}, ["A1" + END]),
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("options", "flags", "expected"), CHOICES)
def test_turns_and_marks_by_template(
    template: str, options: dict[str, Any], flags: dict[str, bool], expected: list[str]
) -> None:
    assert _pieces(template, _flagged(**flags), **options) == expected


@pytest.mark.parametrize(("options", "flags", "expected"), CHOICES)
def test_turns_and_marks_of_plain_texts(
    options: dict[str, Any], flags: dict[str, bool], expected: list[str]
) -> None:
    # Only answers have an end mark there, and contents begin with their space.
    plain = [
        f" {piece}".replace(END, "<eos>" if piece.startswith("A") else "") for piece in expected
    ]
    assert _pieces(None, _flagged(**flags), **options) == plain


@pytest.mark.parametrize("template", TEMPLATES)
def test_train_on_prompt_leaves_out_what_a_row_or_the_end_marks_say(template: str) -> None:
    [whole] = _pieces(template, CHAT, train_on_prompt=True)
    begin = "system\nS<|im_end|>\n"  # a row's first token never carries loss
    assert whole.startswith(begin)
    assert whole.endswith("<|im_start|>assistant\nA2<|im_end|>\n")
    pieces = _pieces(template, _flagged(A1=False), train_on_prompt=True)
    assert "".join(pieces) == whole.replace("A1" + END, "")
    pieces = _pieces(template, CHAT, train_on_prompt=True, train_on_eos="none")
    assert "".join(pieces) == whole.replace(END, "")


@pytest.mark.parametrize(
    ("name", "row", "prompt"),
    [
        ("alpaca", {"instruction": "Q", "output": "A"}, "\n\n### Instruction:\nQ\n\n### Response:"),
        ("qna_no_ctx", {"question": "Q", "answer": "A"}, "##Question:\nQ\n###Answer:\n"),
        ("prompt_completion", {"prompt": "Q: ", "completion": "A"}, ": "),
    ],
)
def test_prompt_answer_and_end_of_plain_rows_follow_the_recipe(
    name: str, row: dict[str, str], prompt: str
) -> None:
    assert _pieces(None, row, name=name) == ["A<eos>"]
    assert _pieces(None, row, name=name, train_on_eos="none") == ["A"]
    [asked] = _pieces(None, row, name=name, roles_to_train=["user"])
    assert asked.endswith(prompt)  # a row's first token never carries loss
    [whole] = _pieces(None, row, name=name, train_on_prompt=True)
    assert whole == f"{asked}A<eos>"


def test_the_end_of_plain_text_follows_the_recipe() -> None:
    assert _pieces(None, {"text": "abc"}, name="text") == ["bc<eos>"]
    assert _pieces(None, {"text": "abc"}, name="text", train_on_eos="none") == ["bc"]


def test_segments_are_joined_and_nothing_is_added() -> None:
    tokenizer = build_byte_tokenizer(CHATML)
    segments = [
        {"text": "<bos>ask ", "label": False}, {"text": "one", "label": True},
        {"text": " two<eos>", "label": True}, {"text": " ask", "label": False},
        {"text": " three", "label": True},
    ]  # fmt: skip
    options = DataOptions()
    rows = RowTokenizer(
        tokenizer, options, "input_output", template=choose_template(tokenizer, "none")
    )
    row = rows.tokenize([{"segments": segments}])[0]
    assert isinstance(row, Row)
    text = "".join(str(segment["text"]) for segment in segments)
    assert row.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained_pieces(row, tokenizer) == ["one two<eos>", " three"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_of_messages_carries_no_loss(template: str) -> None:
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert _pieces(template, row, name="prompt_completion") == ["A2" + END]
    assert _pieces(None, row, name="prompt_completion") == [" A2<eos>"]


def test_tools_need_a_template() -> None:
    tokenizer = build_byte_tokenizer(CHATML)
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=None)
    call = {"function": {"name": "add", "arguments": {}}, "type": "function"}
    calling = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}
    found = rows.tokenize([{"messages": calling}, {"messages": CHAT, "tools": [tool]}])
    assert [str(error) for error in found] == [
        "message 2 calls a tool, and there is no chat template to show it",
        "the row has tools, and there is no chat template to show them",
    ]
    assert all(isinstance(error, TemplateError) for error in found)


def test_an_end_of_text_token_inside_a_row_carries_loss_like_any_other() -> None:
    # Masks that are made from ids (labels == pad or eos) would drop it.
    inner = [*CHAT[:2], {"role": "assistant", "content": "A<eos>B<|im_end|>C"}]
    for template in TEMPLATES:
        assert _pieces(template, inner) == ["A<eos>B<|im_end|>C" + END]
    assert _pieces(None, inner) == [" A<eos>B<|im_end|>C<eos>"]
    row = {"text": "a<eos>b<eos>"}
    assert _pieces(None, row, name="text") == ["<eos>b<eos>"], "and it is not doubled at the end"


def test_a_row_tokenizer_can_be_sent_to_another_process() -> None:
    tokenizer = build_byte_tokenizer(CHATML)
    template = choose_template(tokenizer, None)
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    before = rows.tokenize([{"messages": CHAT}])
    assert pickle.loads(pickle.dumps(rows)).tokenize([{"messages": CHAT}]) == before
