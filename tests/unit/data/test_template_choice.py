"""Where a run's chat template comes from, and what a tokenizer must have for it."""

from __future__ import annotations

from typing import Any

import pytest
from support.templates import build_byte_tokenizer
from support.tokenizer import CHATML, build_metaspace_tokenizer, build_tokenizer

from fsdpq.data.templates.choose import choose_template, exported_tokenizer
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.errors import RecipeError
from fsdpq.recipe.sections.data import DataOptions

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]


def _problem(tokenizer: Any, name: str, text: str | None = None) -> Any:
    with pytest.raises(RecipeError) as caught:
        choose_template(tokenizer, name, text)
    [problem] = caught.value.problems
    assert problem.key == "data.chat_template"
    return problem


def test_a_base_tokenizer_has_no_template_and_none_means_none() -> None:
    assert choose_template(build_metaspace_tokenizer(), None) is None
    assert choose_template(build_tokenizer(), "none") is None


def test_the_tokenizers_own_template_may_have_another_for_tools() -> None:
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = {"default": "plain {{ messages[0].content }}", "tool_use": CHATML}
    template = choose_template(tokenizer, None)
    assert template is not None
    assert template.render(CHAT) == "plain hello"
    assert template.render(CHAT, [{"name": "x"}]).startswith("<|im_start|>user")
    tokenizer.chat_template = {"rag": "x", "other": "y"}
    assert "no default: rag, other" in _problem(tokenizer, None).message  # pyright: ignore[reportArgumentType]


def test_a_template_whose_marks_the_tokenizer_lacks_is_refused() -> None:
    problem = _problem(build_metaspace_tokenizer(), "chatml")
    assert "needs the tokens `<|im_start|>`, `<|im_end|>`" in problem.message
    assert problem.hint.startswith("it can use mistral, zephyr, vicuna, alpaca")
    endless: Any = build_byte_tokenizer()
    endless.eos_token = None
    assert "the tokenizer has none" in _problem(endless, "zephyr").message


def test_a_tokenizer_that_begins_its_texts_begins_those_of_built_in_templates() -> None:
    tokenizer: Any = build_metaspace_tokenizer()  # adds <s> to every text
    template = choose_template(tokenizer, "zephyr")
    assert template is not None
    expected = "<s><|user|>\nhello</s>\n<|assistant|>\nfine</s>\n"
    assert template.render(CHAT) == expected
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    [row] = rows.tokenize([{"messages": CHAT}])
    ids = row.input_ids.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    other = choose_template(build_tokenizer(), "chatml")
    assert other is not None
    assert other.render(CHAT).startswith("<|im_start|>user")


def test_a_file_is_rendered_and_a_wrong_one_is_named_with_its_line() -> None:
    tokenizer = build_tokenizer()
    template = choose_template(tokenizer, "mine.jinja", "{{ messages[0].content }}{{ eos_token }}")
    assert template is not None
    assert template.render(CHAT) == "hello<|im_end|>"
    problem = _problem(tokenizer, "mine.jinja", "{% for m in messages %}\n{{ m.content }")
    assert problem.message.startswith("`mine.jinja` is no chat template: line 2: ")


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    tokenizer = build_tokenizer()
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    template = choose_template(tokenizer, "mine.jinja", escape)
    rows = RowTokenizer(tokenizer, DataOptions(), "messages", template=template)
    [error] = rows.tokenize([{"messages": CHAT}])
    assert "unsafe" in str(error)


def test_the_exported_tokenizer_asks_as_the_run_did_and_pads_with_no_end() -> None:
    tokenizer: Any = build_byte_tokenizer("<|im_start|>", "<|im_end|>", "<|pad|>")
    template = choose_template(tokenizer, "chatml")
    assert template is not None
    saved: Any = exported_tokenizer(tokenizer, template, "<|im_end|>")
    assert saved.apply_chat_template(CHAT, tokenize=False) == template.render(CHAT)
    assert saved.eos_token == "<|im_end|>"
    assert saved.pad_token == "<|pad|>"
    assert tokenizer.eos_token == "<eos>", "the run's own is left as it is"
    ended: Any = build_tokenizer()  # pads with its end of turn
    kept: Any = exported_tokenizer(ended, template, "<|im_end|>")
    assert kept.pad_token == "<|endoftext|>"
