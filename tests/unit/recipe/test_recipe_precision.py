"""What presets and combinations mean, alone and beside ``model.dtype``."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.recipe.load import dump_recipe, load_resolved
from fsdpq.recipe.precision import PRESETS, Precision, compute_dtype, precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.fsdp import Preset


def recipe(precision: Any, dtype: str = "auto") -> Recipe:
    data = {
        "version": 1,
        "name": "r",
        "model": {"name_or_path": "org/name", "dtype": dtype},
        "data": {"dataset": "org/name"},
        "fsdp": {"precision": precision},
    }
    return Recipe.model_validate(data)


MEANINGS: list[tuple[Any, str, tuple[str, str, str, str, str], bool, bool]] = [
    # written, model.dtype, (param, compute, reduce, buffers, base), autocast, scaled loss;
    # on a machine with bf16
    ("auto", "auto", ("fp32", "bf16", "fp32", "bf16", "bf16"), False, False),
    ("auto", "fp16", ("fp32", "fp16", "fp32", "fp16", "fp16"), False, True),
    ("fp32", "auto", ("fp32", "fp32", "fp32", "fp32", "fp32"), False, False),
    ("bf16", "auto", ("bf16", "bf16", "fp32", "bf16", "bf16"), False, False),
    ("fp16_autocast", "auto", ("fp32", "fp16", "fp32", "fp32", "fp32"), True, True),
    ("bf16_autocast", "auto", ("fp32", "bf16", "fp32", "fp32", "fp32"), True, False),
    ("bf16_buffers_autocast", "auto", ("bf16", "bf16", "fp32", "fp32", "bf16"), True, False),
    ({}, "auto", ("fp32", "bf16", "fp32", "bf16", "bf16"), False, False),
    ({"reduce": "bf16"}, "fp32", ("fp32", "fp32", "bf16", "fp32", "fp32"), False, False),
    ({"param": "bf16"}, "auto", ("bf16", "bf16", "fp32", "bf16", "bf16"), False, False),
    ({"compute": "bf16"}, "auto", ("fp32", "bf16", "fp32", "bf16", "bf16"), False, False),
    ({"compute": "bf16"}, "fp32", ("fp32", "bf16", "fp32", "fp32", "fp32"), True, False),
    ({"compute": "fp16"}, "auto", ("fp32", "fp16", "fp32", "fp16", "fp16"), False, True),
    ({"buffers": "fp32"}, "auto", ("fp32", "bf16", "fp32", "fp32", "bf16"), True, False),
    ({"param": "bf16", "compute": "fp32"}, "auto", ("bf16", "fp32", "fp32", "fp32", "fp32"),
     False, False),
]  # fmt: skip


@pytest.mark.parametrize(("written", "dtype", "dtypes", "autocasts", "scales"), MEANINGS)
def test_presets_and_combinations_mean_these_dtypes(
    written: Any, dtype: str, dtypes: tuple[Any, ...], autocasts: bool, scales: bool
) -> None:
    found = precision_of(recipe(written, dtype), default="bf16")
    assert found == Precision(*dtypes)
    assert (found.autocasts, found.scales_loss) == (autocasts, scales)
    assert found.words == dtypes[4] + f" under autocast to {dtypes[1]}" * autocasts


@pytest.mark.parametrize(("written", "dtype"), [case[:2] for case in MEANINGS])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_workers_read_the_same_dtypes_from_the_resolved_recipe(
    written: Any, dtype: str, has_bf16: bool, tmp_path: Any
) -> None:
    asked = recipe(written, dtype)
    resolved = resolve_launch(
        asked, num_gpus=0, num_cpus=2, cpu_dtype="bf16" if has_bf16 else "fp32"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(resolved), encoding="utf-8")
    expected = precision_of(asked, default="bf16" if has_bf16 else "fp32")
    assert precision_of(load_resolved(path)) == expected
    assert compute_dtype(asked) in (None, expected.compute)


@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_preset_and_its_combination_are_the_same(preset: Preset) -> None:
    combination = PRESETS[preset].model_dump()
    for dtype in ("auto", "fp32"):
        assert precision_of(recipe(combination, dtype)) == precision_of(recipe(preset, dtype))
