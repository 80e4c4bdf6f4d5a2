"""Every shipped recipe is valid, commented, and together they show everything there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fsdpq.cards.find import find_card
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.source import read_source

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "recipes").glob("*.yaml"))
LIBRARY = [path for path in PATHS if path.stem != "quickstart"]
NAME = re.compile(r"[a-z0-9.]+(-[a-z0-9.]+)*-(cpu|\d+x\d+gb)")
LEAF = re.compile(r"^ +(?P<key>\w+): [^#|]+?(?P<comment>  # .+)?$")
HEADER = ("# yaml-language-server: $schema=../schemas/recipe.schema.json", "#")


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    return {path.stem: load_recipe(path).recipe for path in PATHS}


def test_there_are_at_least_thirty() -> None:
    assert len(LIBRARY) >= 30


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_recipe_has_no_mistakes_and_fits_the_json_schema(path: Path) -> None:
    loaded = load_recipe(path)
    assert loaded.recipe.name == path.stem
    schema = json.loads((ROOT / "schemas" / "recipe.schema.json").read_text(encoding="utf-8"))
    document = loaded.recipe.model_dump(mode="json")
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_recipe_opens_with_what_it_is_and_what_it_needs(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert tuple(lines[:2]) == HEADER
    assert f"#   fsdpq train recipes/{path.name}" in lines
    assert any(line.startswith("# Hardware: ") for line in lines)
    assert any(line.startswith("# Memory:   ") for line in lines)
    assert NAME.fullmatch(path.stem), "<model>-<method>-<hardware>"
    assert find_card(load_recipe(path).recipe.model.name_or_path) is not None


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_recipe_explains_every_key(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    body = text[text.index("\nmodel:") :]
    leaves = [match for line in body.splitlines() if (match := LEAF.match(line))]
    assert len(leaves) >= 10
    bare = [match["key"] for match in leaves if match["comment"] is None]
    assert not bare, bare


def test_every_train_type_of_the_seed_is_there(recipes: dict[str, Recipe]) -> None:
    methods = {(recipe.quantization.kind, recipe.adapter.kind) for recipe in recipes.values()}
    assert methods >= {
        ("none", "none"),  # full
        ("none", "lora"),  # lora, custom_lora
        ("bnb", "lora"),  # qlora, custom_qlora
        ("hqq", "lora"),
        ("bnb", "dora"),
        ("hqq", "dora"),
        ("bnb", "llama_pro"),
        ("hqq", "llama_pro"),
    }


def test_every_choice_of_the_seed_is_there(recipes: dict[str, Recipe]) -> None:
    every = list(recipes.values())
    assert {recipe.fsdp.strategy for recipe in every} == {
        "full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op",
    }  # fmt: skip
    assert {recipe.fsdp.precision for recipe in every} >= {
        "fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast",
    }  # fmt: skip
    assert {recipe.optimizer.kind for recipe in every} == {"adamw", "adam", "sgd", "adadelta"}
    assert {recipe.lr_scheduler.kind for recipe in every} == {"constant", "linear", "cosine"}
    datasets = {(recipe.data.dataset, recipe.data.format) for recipe in every}
    assert datasets >= {
        ("yahma/alpaca-cleaned", "alpaca"),
        ("timdettmers/openassistant-guanaco", "guanaco"),
        ("knowrohit07/know_sql", "qna"),
        ("microsoft/orca-math-word-problems-200k", "qna_no_ctx"),
        (None, "dummy"),
    }
    sample = [recipe for recipe in every if recipe.data.format == "alpaca" and recipe.data.max_rows]
    assert sample, "alpaca_sample"


@pytest.mark.parametrize(
    "model",
    [
        "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b",
        "mistral", "mixtral", "codellama-34b", "yi-34b", "qwen", "gemma", "phi", "tinyllama",
        "smollm2",
    ],
)  # fmt: skip
def test_every_model_is_there(model: str) -> None:
    assert [path for path in LIBRARY if path.stem.startswith(model)]


@pytest.mark.parametrize("hardware", ["cpu", "1x24gb", "2x24gb", "4x24gb", "8x24gb"])
def test_all_hardware_is_there(hardware: str) -> None:
    assert [path for path in LIBRARY if path.stem.endswith(hardware)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_editors_and_other_readers_see_the_same_recipe(path: Path) -> None:
    """YAML 1.1 and 1.2 disagree on words like `on` and on `1e-4`: no recipe has the former."""
    others = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert _numbers_as_floats(others) == _numbers_as_floats(read_source(path).data)


def _numbers_as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers_as_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_as_floats(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?e-?\d+", value):
        return float(value)
    return value
