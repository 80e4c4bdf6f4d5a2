"""The pages of docs/guides/data/formats say what the code does: their blocks are rendered by it.

A comment in front of a block says what it is: ``row`` (a line of a file), ``csv`` (the same row),
``read: chatml`` or ``read: plain`` with options (what the model reads of the last row), ``bad
rows`` and ``found`` (rows whose ``messages`` follow). ``FSDPQ_GOLDEN=write`` writes the blocks.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer import SPECIAL_TOKENS, TEXTS, build_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from fsdpq.data.templates.choose import choose_template
from fsdpq.data.text.tokenize import Row, RowTokenizer
from fsdpq.errors import RecipeError
from fsdpq.fetch.data import fetch_data
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.formats import FORMATS, named_columns

DIRECTORY = Path(__file__).parents[3] / "docs" / "guides" / "data" / "formats"
PAGES = [*sorted(DIRECTORY.glob("*.md")), DIRECTORY.parent / "templates.md"]
BLOCK = re.compile(r"<!-- (?P<what>[^>]+) -->\n```(?P<kind>\w+)\n(?P<text>.*?)```\n", re.DOTALL)


def _base_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer like a base model's: no chat template, its first token added."""
    special = [*SPECIAL_TOKENS, "<s>", "</s>"]
    tokenizer: Any = build_tokenizer(texts=TEXTS)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    backend = tokenizer.backend_tokenizer
    first = tokenizer.convert_tokens_to_ids("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    tokenizer.chat_template = None
    assert set(special) <= set(tokenizer.get_vocab())
    return tokenizer


TOKENIZERS = {"chatml": build_tokenizer(), "plain": _base_tokenizer()}


def _marked(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the text of a row with its trained parts in brackets."""
    text = ""
    pairs = zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        part = str(tokenizer.decode([token for token, _ in run]))
        text += f"⟦{part}⟧" if trained else part
    return text.rstrip("\n") + "\n"


def _read(row: dict[str, Any], format_name: str, how: str) -> str:
    kind, *settings = how.split()
    changes: dict[str, Any] = dict(setting.split("=") for setting in settings)
    options = DataOptions(path="x", **changes)
    tokenizer = TOKENIZERS[kind]
    template = choose_template(tokenizer, options.chat_template)
    tokenize = RowTokenizer(tokenizer, options, format_name, template=template).tokenize
    [tokenized] = tokenize([named_columns(row, format_name)])
    assert isinstance(tokenized, Row), tokenized
    return _marked(tokenized, tokenizer)


def _messages(lines: str, format_name: str, directory: Path) -> str:
    """Returns what is said about each of the rows, alone in a file."""
    said: list[str] = []
    for line in lines.splitlines():
        (directory / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
        told: list[str] = []
        options = DataOptions.model_validate({"path": "rows.jsonl", "format": format_name})
        try:
            fetch_data(options, base_dir=directory, report=told.append)
            said.append("\n".join(told))
        except RecipeError as error:
            problems = [f"error: {p.message}\nhint: {p.hint}" for p in error.problems]
            said.append("\n".join(problems))
    return "\n\n".join(said).replace(f"{directory}/", "") + "\n"


def _blocks(page: Path, directory: Path) -> Iterator[tuple[str, str, str]]:
    """Yields what is written in a block, what ought to be, and what the block is."""
    name = page.stem if page.stem in FORMATS else "auto"
    name = "messages" if page.stem == "templates" else name
    row: dict[str, Any] = {}
    rows = ""
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        what, text = match["what"], match["text"]
        expected = text
        if what == "row":
            row = json.loads(text)
        elif what == "csv":
            assert list(csv.DictReader(text.splitlines())) == [row]
        elif what in ("bad rows", "found"):
            rows = text
        elif what == "messages":
            expected = _messages(rows, name, directory)
        else:
            expected = _read(row, name, what.removeprefix("read: "))
        yield text, expected, what


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_the_code_does(page: Path, tmp_path: Path) -> None:
    found = list(_blocks(page, tmp_path))
    if os.environ.get("FSDPQ_GOLDEN") == "write":
        expected = iter(found)
        text = page.read_text(encoding="utf-8")

        def fill(match: re.Match[str]) -> str:
            return match[0].replace(f"{match['kind']}\n{match['text']}```", (
                f"{match['kind']}\n{next(expected)[1]}```"
            ))  # fmt: skip

        page.write_text(BLOCK.sub(fill, text), encoding="utf-8")
        return
    for text, expected, what in found:
        assert text == expected, what


def test_every_format_has_a_page() -> None:
    assert {page.stem for page in PAGES} == {*FORMATS, "README", "templates"}
