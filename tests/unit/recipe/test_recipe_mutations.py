"""Every field of the schema, misspelt, of a wrong type, out of range: found, located, explained."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mutations import (
    RECIPES,
    Field,
    data_with,
    list_fields,
    misspell,
    with_key,
    with_value,
)

from fsdpq.cli.main import main
from fsdpq.cli.render import render_error
from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import recipe_schema
from fsdpq.recipe.source import read_source

SHIPPED = sorted(RECIPES.glob("*.yaml"))
FIELDS = list_fields()
SLIPS = ("drop", "swap", "double")


@cache
def text_of(recipe: Path) -> str:
    return recipe.read_text(encoding="utf-8")


@cache
def data_of(recipe: Path) -> dict[str, Any]:
    return read_source(recipe).data


@cache
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(recipe_schema())


def recipe_for(field: Field) -> Path:
    """Returns the shipped recipe that this field's mistakes are made in: each has its turn."""
    return random.Random(field.id).choice(SHIPPED)


def typo_of(field: Field, position: int, how: str) -> str | None:
    word = misspell(field.path[-1], position, how)
    return None if word in field.owner.model_fields else word


def only_problem(path: Path, text: str) -> Problem:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    shown = render_error(caught.value)
    assert "Traceback" not in shown
    assert "Input should" not in shown, "pydantic's words"
    assert len(caught.value.problems) == 1, f"{shown}\n\n{text}"
    problem = caught.value.problems[0]
    assert problem.hint, shown
    return problem


def place(problem: Problem) -> tuple[int, int]:
    assert problem.location is not None, problem
    return problem.location.line, problem.location.column


def check_typo(path: Path, recipe: Path, field: Field, typo: str) -> None:
    text, expected = with_key(text_of(recipe), field, typo)
    problem = only_problem(path, text)
    assert place(problem) == expected, problem
    assert f"`{typo}`" in problem.message
    assert problem.message.startswith("unknown")


def check_value(path: Path, recipe: Path, field: Field, value: Any) -> None:
    text, expected = with_value(text_of(recipe), field, value)
    problem = only_problem(path, text)
    assert place(problem) in expected, problem
    assert problem.key.split(".")[: len(field.path)] == list(field.path), problem


@cache
def bad_values(field: Field) -> list[Any]:
    found = {json.dumps(value): value for value in field.wrong_types() + field.out_of_range()}
    return list(found.values())


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.id)
def test_a_misspelt_key_is_found_at_its_place(field: Field, tmp_path: Path) -> None:
    for number, how in enumerate(SLIPS):
        typo = typo_of(field, number + 1, how)
        if typo is not None:
            check_typo(tmp_path / "r.yaml", recipe_for(field), field, typo)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.id)
def test_a_bad_value_is_found_at_its_place(field: Field, tmp_path: Path) -> None:
    assert field.wrong_types(), "every field refuses some type"
    for value in bad_values(field):
        check_value(tmp_path / "r.yaml", recipe_for(field), field, value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_mistake_in_any_recipe_is_found_at_its_place(tmp_path: Path, data: Any) -> None:
    recipe, field = data.draw(st.sampled_from(SHIPPED)), data.draw(st.sampled_from(FIELDS))
    if data.draw(st.booleans()):
        typo = typo_of(field, data.draw(st.integers(0, 30)), data.draw(st.sampled_from(SLIPS)))
        if typo is not None:
            check_typo(tmp_path / "r.yaml", recipe, field, typo)
    else:
        value = data.draw(st.sampled_from(bad_values(field)))
        check_value(tmp_path / "r.yaml", recipe, field, value)


def test_the_json_schema_rejects_what_the_models_reject() -> None:
    count = 0
    for field in FIELDS:
        data = data_of(recipe_for(field))
        slips = (typo_of(field, number + 1, how) for number, how in enumerate(SLIPS))
        mistakes: list[tuple[str, Any]] = [(typo, 1) for typo in slips if typo is not None]
        mistakes += [(field.path[-1], value) for value in bad_values(field)]
        for key, value in mistakes:
            edited = data_with(data, field, key, value)
            assert not schema().is_valid(edited), (field.id, key, value)
        count += len(mistakes)
    assert count >= 500


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_the_json_schema_accepts_every_shipped_recipe(recipe: Path) -> None:
    schema().validate(read_source(recipe).data)


@pytest.mark.parametrize("field", random.Random(0).sample(FIELDS, 10), ids=lambda field: field.id)
def test_the_command_ends_with_2_and_no_traceback(
    field: Field, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    text, _ = with_value(text_of(recipe_for(field)), field, bad_values(field)[0])
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["validate", str(path)])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "r.yaml:" in printed.err
    assert "hint: " in printed.err
