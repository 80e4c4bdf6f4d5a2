"""The registry, the sections' unions and the builders stay in step."""

import pytest

from fsdpq.errors import ExitCode, MissingDependencyError
from fsdpq.recipe.describe import list_sections
from fsdpq.recipe.root import Recipe
from fsdpq.registry import ROWS, Row, check_packages, find_row, resolve_builder

SECTIONS = list_sections()
ROW_IDS = [f"{row.section}-{row.kind}" for row in ROWS]


def test_every_kind_of_every_section_has_one_row() -> None:
    kinds = {(s.name, kind) for s in SECTIONS.values() for kind in s.kinds if kind}
    assert sorted((row.section, row.kind) for row in ROWS) == sorted(kinds)


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_row_names_the_options_of_its_kind(row: Row) -> None:
    assert SECTIONS[row.section].kinds[row.kind] is row.options
    assert row.summary


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.section}-{row.kind}")
def test_builder_can_be_imported(row: Row) -> None:
    assert row.builder.startswith("fsdpq.")
    assert callable(resolve_builder(row.section, row.options(kind=row.kind)))  # type: ignore[call-arg]


def test_unknown_kind_has_no_row() -> None:
    with pytest.raises(KeyError, match="no kind `x`"):
        find_row("adapter", "x")


def test_all_missing_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "r",
            "model": {
                "name_or_path": "base",
                "attn_implementation": "flash_attention_2",
                "use_liger_kernel": True,
            },
            "quantization": {"kind": "hqq"},
            "data": {"path": "rows.jsonl"},
            "metrics": {"sinks": ["wandb"], "wandb": {"project": "p"}},
        }
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_packages(recipe)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError) as caught:
        check_packages(recipe)
    assert "`quantization: {kind: hqq}` needs `hqq`" in caught.value.message
    assert "`wandb` in `metrics.sinks` needs `wandb`" in caught.value.message
    assert "`use_liger_kernel: true` needs `liger-kernel`" in caught.value.message
    assert caught.value.hint == "pip install hqq termcolor flash-attn liger-kernel wandb"
    assert caught.value.exit_code is ExitCode.ENVIRONMENT
    with pytest.raises(MissingDependencyError) as caught:
        check_packages(recipe, trains=False)
    assert caught.value.hint == "pip install hqq termcolor"
    silent = recipe.metrics.wandb.model_copy(update={"mode": "disabled"})
    metrics = recipe.metrics.model_copy(update={"wandb": silent})
    with pytest.raises(MissingDependencyError) as caught:
        check_packages(recipe.model_copy(update={"metrics": metrics}))
    assert caught.value.hint == "pip install hqq termcolor flash-attn liger-kernel"
