"""The file of a chat template: read relative to the recipe, or refused with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdpq.errors import RecipeError
from fsdpq.fetch.data import fetch_data
from fsdpq.fetch.template_file import MAX_BYTES, read_template_file
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.source import DataSources

OPTIONS = DataOptions(path="rows.jsonl", format="text", chat_template="mine.jinja")


def test_the_text_goes_with_the_rows_and_through_the_lock(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    sources = fetch_data(OPTIONS, base_dir=tmp_path, report=print)
    assert sources.chat_template == "{{ 'é' }}"
    assert DataSources.from_json(sources.as_json()) == sources


@pytest.mark.parametrize("name", [None, "chatml", "none"])
def test_other_templates_are_no_files(name: str | None, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"chat_template": name})
    assert read_template_file(options, base_dir=tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff{{ x }}", "is not UTF-8: invalid start byte at byte 0"),
        (b" " * (MAX_BYTES + 1), "is 1.0 MB: no chat template"),
    ],
)
def test_a_file_that_is_no_template_is_named(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_template_file(OPTIONS, base_dir=tmp_path)
    [problem] = caught.value.problems
    assert problem.message == f"`data.chat_template`: `{tmp_path / 'mine.jinja'}` {message}"
