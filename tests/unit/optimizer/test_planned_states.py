"""The states that a plan counts are those that the optimizers keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from fsdpq.plan.costs.optimizer import state_bytes
from fsdpq.recipe.sections.optimizer import OptimizerOptions
from fsdpq.registry import ROWS, resolve_builder

KINDS: list[dict[str, Any]] = [
    {"kind": "adamw"},
    {"kind": "adam"},
    {"kind": "adamw_8bit"},
    {"kind": "muon"},
    {"kind": "sgd"},
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "adadelta"},
]
SHAPES = {"layers.0.a": (90, 101), "layers.0.b": (40, 5), "layers.0.norm": (7,), "head": (31, 150)}
"""Above and below the size from which 8-bit means are worth it, none of them whole blocks."""


def test_every_optimizer_is_here() -> None:
    assert {each["kind"] for each in KINDS} == {
        row.kind for row in ROWS if row.section == "optimizer"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("section", KINDS, ids=str)
def test_states_take_the_bytes_that_are_planned(
    section: dict[str, Any], dtype: torch.dtype
) -> None:
    options: Any = TypeAdapter(OptimizerOptions).validate_python(section)
    named = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in SHAPES.items()}
    optimizer = resolve_builder("optimizer", options)(options, named)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in named.items():
        states = optimizer.state[parameter].values()
        found = sum(value.nbytes for value in states if isinstance(value, Tensor))
        planned = state_bytes(
            options,
            SHAPES[name],
            num_rows=SHAPES[name][0],
            item_bytes=dtype.itemsize,
            in_layers=name.startswith("layers."),
        )
        assert found == planned, name
