"""Activation memory of every quantizer grows with the sequence length, and no faster."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from support.imports import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """``scripts/bench_memory.py``."""
    spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts" / "bench_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "bnb"},
        {"kind": "bnb", "quant_type": "fp4", "block_size": 4096, "double_quant": False},
        {"kind": "hqq", "nbits": 3},
        {"kind": "hqq", "nbits": 4, "axis": 0},
    ],
)
def test_activation_memory_is_linear_in_the_sequence_length(
    bench: ModuleType, document: dict[str, Any]
) -> None:
    fit = bench.measure(bench.build_quantized(document, CPU, torch.float32), CPU, torch.float32)
    assert len(fit.peaks) >= 4
    # Allocations are whole tensors, so the line is exact but for the allocator's rounding.
    assert fit.r_squared > 0.9999
    assert abs(fit.quadratic_share) < 0.01
    # No more than the same layers without quantization, and the smaller matrix for a short while.
    plain = bench.measure(bench.build_plain(CPU, torch.float32), CPU, torch.float32)
    weight_bytes = bench.HIDDEN * bench.INNER * 4
    assert fit.peaks[-1] <= plain.peaks[-1] + weight_bytes


def test_the_fit_notices_growth_that_is_not_linear(bench: ModuleType) -> None:
    lengths = (100, 200, 400, 800)
    straight = bench.fit_line(lengths, tuple(7000 + 30 * n for n in lengths))
    assert straight.token_bytes == pytest.approx(30)
    assert straight.r_squared == pytest.approx(1)
    curved = bench.fit_line(lengths, tuple(7000 + 30 * n + n * n for n in lengths))
    assert curved.r_squared < 0.99
    assert curved.quadratic_share == pytest.approx(800 * 800 / curved.peaks[-1])
