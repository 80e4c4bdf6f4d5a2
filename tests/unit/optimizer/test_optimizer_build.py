"""Which of torch's ways to do a step an optimizer is built with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsdpq.optimizer.build import build_adadelta
from fsdpq.recipe.sections.optimizer import AdadeltaOptions


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("meta", True)])
def test_adadelta_takes_lists_of_tensors_off_the_host_only(device: str, expected: bool) -> None:
    weight = nn.Parameter(torch.empty(2, device=device))
    optimizer = build_adadelta(AdadeltaOptions(kind="adadelta"), {"weight": weight})
    assert optimizer.defaults["foreach"] is expected
