"""Sources of rows in a recipe: parts of a mixture are as well explained as other sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdpq.errors import Problem, RecipeError, UsageError
from fsdpq.recipe import load
from fsdpq.recipe.difference import compare
from fsdpq.recipe.explain import explain
from fsdpq.recipe.load import LoadedRecipe, load_recipe
from fsdpq.recipe.view import View, open_view

RECIPE = """version: 1
name: r
model:
  name_or_path: meta-llama/Llama-2-7b-hf
data:
  mixture:
    - path: a.jsonl
      format: text
    - path: [a.jsonl, ../b.jsonl]
      weight: 2
  eval:
    path: a.jsonl
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(load, "CHECKS", ())  # the rules have tests of their own
    path = tmp_path / "here" / "r.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def _problems(path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def _changed(path: Path, old: str, new: str) -> Path:
    path.write_text(RECIPE.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "line", "message", "hint"),
    [
        ("format: text", "formatt: text", 8, "unknown key `formatt` in `data.mixture.0`", "format"),
        ("format: text", "rank: 8", 8, "unknown key `rank` in `data.mixture.0`", "in `adapter`"),
        ("format: text", "format: txt", 8, "`data.mixture.0.format` must be `auto`", "`text`"),
        ("format: text", "columns: {text: 3}", 8,
         "`data.mixture.0.columns` must be a mapping of names to names; `text` is `3`",
         "`{prompt: query, completion: reply}`"),
        ("weight: 2", "seq_len: 2", 10, "unknown key `seq_len` in `data.mixture.1`", "in `data`"),
        ("  eval:", "  weight: 2\n  eval:", 11, "unknown key `weight` in `data`", "`data.mixture`"),
        ("weight: 2", "weight: -2", 10,
         "`data.mixture.1.weight` must be a number greater than 0 or null, not `-2`", "change"),
        ("../b.jsonl]", "4]", 9, "`data.mixture.1.path` must be a string", "rows.jsonl"),
        ("    - path: a.jsonl\n      format: text", "    - a.jsonl", 7,
         "`data.mixture.0` must be a mapping of `path`", "change"),
        ("  eval:\n    path", "  eval:\n    pth", 12, "unknown key `pth` in `data.eval`", "`path`"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_part_is_named_at_its_line(
    recipe: Path, old: str, new: str, line: int, message: str, hint: str
) -> None:
    [problem] = _problems(_changed(recipe, old, new))
    assert problem.location is not None
    assert problem.location.line == line
    assert problem.message.startswith(message)
    assert hint in problem.hint


def test_all_mistakes_of_all_parts_are_named(recipe: Path) -> None:
    text = RECIPE.replace("format: text", "max_rows: x").replace("weight: 2", "weightt: 2")
    recipe.write_text(text.replace("  eval:\n    path: a.jsonl", "  eval: 7"))
    keys = [problem.key for problem in _problems(recipe)]
    assert keys == ["data.mixture.0.max_rows", "data.mixture.1.weightt", "data.eval"]


def _load(path: Path, *overrides: str) -> LoadedRecipe:
    return load_recipe(path, overrides)


def test_overrides_reach_parts_of_a_mixture(recipe: Path) -> None:
    loaded = _load(
        recipe, "data.mixture.0.max_rows=10", "data.mixture.1.path.0=c.jsonl",
        "+data.mixture.0.columns.text=body", "~data.mixture.1.weight", "data.eval.split=test",
    )  # fmt: skip
    first, second = loaded.recipe.data.mixture
    assert (first.max_rows, first.columns) == (10, {"text": "body"})
    assert (second.path, second.weight) == (("c.jsonl", "../b.jsonl"), None)
    assert loaded.recipe.data.eval is not None
    assert loaded.recipe.data.eval.split == "test"
    place = loaded.marks.value(("data", "mixture", 0, "max_rows"))
    assert place is not None
    assert place.source == "command line"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("data.mixture.2.path=x", "`data.mixture` is a list without item `2`", "`data.mixture.1`"),
        ("data.mixture.path=x", "`data.mixture` is a list without item `path`", "`data.mixture.0`"),
        ("~data.mixture.1", "items of a list cannot be deleted here", "copy the recipe"),
        ("~data.mixture.1.weightt", "`data.mixture.1.weightt` is not set", "data.mixture.1.weight"),
        ("+data.mixture.1.weight=3", "`data.mixture.1.weight` is set already", "leave the `+` out"),
        ("data.mixture.0.formatt=text", "unknown key `formatt` in `data.mixture.0`", "format"),
        ("data.columns={a: b}", "is a mapping", "`data.columns.NAME=VALUE`"),
    ],
)  # fmt: skip
def test_an_override_of_no_part_is_refused(
    recipe: Path, override: str, message: str, hint: str
) -> None:
    [problem] = _problems(recipe, override)
    assert message in problem.message
    assert hint in problem.hint


def test_parts_are_explained_one_by_one(recipe: Path) -> None:
    view: View = open_view(recipe)
    [weight] = explain(view, "data.mixture.1.weight")
    assert (weight.value, weight.type) == (2.0, "a number greater than 0 or null")
    assert weight.location is not None
    assert weight.location.line == 10
    [columns] = explain(view, "data.mixture.0.columns")
    assert (columns.value, columns.default, columns.source) == ({}, "{}", "default")
    assert len(explain(view, "data.mixture")) == 2 * len(explain(view, "data.mixture.0"))
    with pytest.raises(UsageError) as caught:
        explain(view, "data.mixture.1.weightt")
    assert caught.value.hint == "did you mean `data.mixture.1.weight`?"


def test_parts_are_compared_one_by_one(recipe: Path) -> None:
    old, new = open_view(recipe), open_view(recipe, ["data.mixture.1.weight=3"])
    [found] = compare(old, new)
    assert (found.key, found.old.value, found.new.value) == ("data.mixture.1.weight", 2.0, 3.0)


def test_paths_of_all_sources_are_watched(recipe: Path) -> None:
    _changed(recipe, "    path: a.jsonl\n", "    path: ~/c.jsonl\n  chat_template: /x/t.jinja\n")
    notices = _load(recipe).notices
    keys = [notice.split("`")[1] for notice in notices]
    assert keys == ["data.chat_template", "data.mixture.1.path.1", "data.eval.path"]
    assert f"({recipe}:9) leaves" in notices[1]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("path: a.jsonl\n      format", "path: s3://a\n      format", "data.mixture.0.path"),
        ("path: a.jsonl\n      f", "dataset: https://a\n      f", "data.mixture.0.dataset"),
        ("../b.jsonl", "hf://b.jsonl", "data.mixture.1.path.1"),
        ("eval:\n    path: a.jsonl", "eval:\n    path: //a", "data.eval.path"),
        ("  eval:", "  chat_template: http://a/t.jinja\n  eval:", "data.chat_template"),
    ],
)  # fmt: skip
def test_no_source_is_on_the_network(recipe: Path, old: str, new: str, key: str) -> None:
    [problem] = _problems(_changed(recipe, old, new))
    assert problem.key == key
    assert "names something on the network" in problem.message
