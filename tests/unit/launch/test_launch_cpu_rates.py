"""The dtype of a CPU is measured once a machine, and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fsdpq.launch.machine import cpu_rates
from fsdpq.launch.machine.cpu_rates import CpuRates, find_cpu_dtype, machine_key, read_or_measure
from fsdpq.launch.machine.resolve import explain_dtype, resolve_launch
from fsdpq.recipe.load import load_recipe

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
SLOW_BF16 = {"fp32": 120e9, "bf16": 72e9}
FAST_BF16 = {"fp32": 95e9, "bf16": 400e9}


class Measure:
    """Counts how often it is asked."""

    def __init__(self, rates: dict[str, float] | None) -> None:
        self.rates = rates
        self.times = 0

    def __call__(self) -> dict[str, float] | None:
        self.times += 1
        return self.rates


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A CPU with bf16 instructions and an empty cache."""
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_rates, "cpu_has_bf16", lambda: True)
    cpu_rates._find_cpu_dtype.cache_clear()
    yield monkeypatch
    cpu_rates._find_cpu_dtype.cache_clear()


@pytest.mark.parametrize(
    ("rates", "dtype", "why"),
    [
        (FAST_BF16, "bf16", "measured 400 GFLOP/s a core in bf16, 95 in fp32"),
        (SLOW_BF16, "fp32", "measured 72 GFLOP/s a core in bf16, 120 in fp32"),
        (None, "bf16", "this CPU has bf16 instructions (its rates could not be measured)"),
    ],
)
def test_auto_is_the_dtype_that_was_measured_faster(
    machine: pytest.MonkeyPatch, rates: dict[str, float] | None, dtype: str, why: str
) -> None:
    measure = Measure(rates)
    machine.setattr(cpu_rates, "measure_rates", measure)
    recipe = load_recipe(QUICKSTART).recipe
    resolved = resolve_launch(recipe, num_gpus=0)
    assert resolved.model.dtype == dtype
    assert explain_dtype(recipe, resolved) == f"model.dtype is {dtype}: {why}"
    assert measure.times == 1


def test_without_bf16_instructions_nothing_is_measured(machine: pytest.MonkeyPatch) -> None:
    measure = Measure(FAST_BF16)
    machine.setattr(cpu_rates, "measure_rates", measure)
    machine.setattr(cpu_rates, "cpu_has_bf16", lambda: False)
    assert find_cpu_dtype().dtype == "fp32"
    assert measure.times == 0


@pytest.mark.parametrize(
    ("overrides", "num_gpus"),
    [(["model.dtype=fp32"], 0), (["fsdp.precision=bf16"], 0), ([], 1)],
)
def test_a_dtype_that_is_given_is_not_measured(
    machine: pytest.MonkeyPatch, overrides: list[str], num_gpus: int
) -> None:
    measure = Measure(FAST_BF16)
    machine.setattr(cpu_rates, "measure_rates", measure)
    recipe = load_recipe(QUICKSTART, overrides).recipe
    resolved = resolve_launch(recipe, num_gpus=num_gpus)
    assert explain_dtype(recipe, resolved) is None
    assert measure.times == 0


def test_a_machine_is_measured_once(tmp_path: Path) -> None:
    path, measure = tmp_path / "cache" / "rates.json", Measure(FAST_BF16)
    first = read_or_measure(path, "this machine", measure)
    # A busy machine would measure something else: what is kept counts.
    measure.rates = SLOW_BF16
    assert read_or_measure(path, "this machine", measure) == first == CpuRates(95e9, 400e9)
    assert measure.times == 1
    assert read_or_measure(path, "another one", measure) == CpuRates(120e9, 72e9)
    assert measure.times == 2


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"key": "this machine"})])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    path, measure = tmp_path / "rates.json", Measure(FAST_BF16)
    path.write_text(content)
    assert read_or_measure(path, "this machine", measure) == CpuRates(95e9, 400e9)
    assert read_or_measure(path, "this machine", measure) == CpuRates(95e9, 400e9)
    assert measure.times == 1


def test_another_cpu_is_another_machine(tmp_path: Path) -> None:
    keys = set()
    for name in ("AMD EPYC", "Intel Xeon"):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"model name : {name}\ncpu MHz : 3000\nflags : avx512_bf16\n")
        keys.add(machine_key(cpuinfo))
        cpuinfo.write_text(f"model name : {name}\ncpu MHz : 2400\nflags : avx512_bf16\n")
        keys.add(machine_key(cpuinfo))
    assert len(keys) == 2
