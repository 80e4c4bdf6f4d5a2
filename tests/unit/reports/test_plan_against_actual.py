"""What a run measured beside its plan: a drift is named, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from fsdpq.reports.plan_against_actual import Actual, compare_with_plan

GIB, MIB = 2**30, 2**20
WORK = {"rows": 2, "seq_len": 100, "num_local_ranks": 2}


def moment(phase: str, allocated: float, **parts: int) -> dict[str, Any]:
    overhead = {"context": GIB, "fragmentation": GIB // 2}
    size = int(allocated * GIB)
    return {
        "phase": phase, "name": phase, "bytes": size + sum(overhead.values()),
        "allocated_bytes": size, "parts": {**parts, **overhead},
    }  # fmt: skip


def plan(kind: str = "cuda", host: float = 40.0) -> dict[str, Any]:
    moments = [
        moment("load", 4), moment("forward", 5), moment("forward", 6), moment("backward", 10),
        moment("optimizer", 5, codes=3 * GIB, gradients=0),
    ]  # fmt: skip
    return {
        "device": {"type": kind, "moments": moments},
        "host": {"peak_bytes": int(host * GIB)},
        "workload": WORK,
    }


def measured(tokens: int = 200, host: float = 20.0, codes: int = 3 * GIB, **peaks: float) -> Actual:
    sizes = {"start": 0.0, "load": 4.0, "forward": 6.0, "backward": 10.0, "optimizer": 5.0} | peaks
    rows = [
        {"phase": phase, "bytes": 0, "peak_bytes": int(size * GIB), "reserved_bytes": 11 * GIB}
        for phase, size in sizes.items()
    ]
    held = [{"device": {"codes": codes}, "tokens": tokens}]
    return Actual(rows, held, [int(host * GIB)] * 2)


def drift(actual: Actual, **changes: Any) -> str | None:
    found = compare_with_plan(plan(**changes), actual)
    assert found is not None
    return found["drift"]


def test_phases_sums_and_categories_stand_beside_each_other() -> None:
    found = compare_with_plan(plan(), measured(forward=6.3))
    assert found is not None
    assert found["drift"] is None
    rows = {row["name"]: row for row in (*found["phases"], *found["sums"], *found["categories"])}
    assert list(rows) == [
        "load", "forward", "backward", "optimizer", "reserved by torch",
        "host, all ranks of a machine", "codes",
    ]  # fmt: skip
    assert rows["forward"]["difference"] == pytest.approx(0.05)
    assert rows["forward"]["predicted_bytes"] == 6 * GIB, "the larger of both moments"
    assert rows["reserved by torch"]["predicted_bytes"] == 10.5 * GIB
    assert rows["host, all ranks of a machine"]["measured_bytes"] == 40 * GIB


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (measured(backward=11.2), "12% above the plan (backward: 11.20 GiB, planned 10.00 GiB)"),
        (measured(backward=8.9), "11% below the plan (backward: 8.90 GiB"),
        (measured(codes=2 * GIB), "33% below the plan (codes: 2.00 GiB, planned 3.00 GiB)"),
        (measured(host=23.0), "above the plan (host, all ranks of a machine: 46.00 GiB"),
    ],
)
def test_a_drift_says_where_on_which_side_and_what_to_send(actual: Actual, words: str) -> None:
    line = drift(actual)
    assert line is not None
    assert words in line
    assert "bug report with plan.json and report.json" in line


@pytest.mark.parametrize(
    "actual",
    [
        measured(backward=10.9),
        measured(load=4.1),
        measured(tokens=199, forward=3.0, backward=2.0, host=10.0),  # shorter rows than planned
    ],
)
def test_what_can_be_explained_is_no_drift(actual: Actual) -> None:
    assert drift(actual) is None


def test_short_rows_do_not_excuse_more_than_planned() -> None:
    assert "above" in (drift(measured(tokens=10, forward=7.0)) or "")


def test_on_a_cpu_growth_counts_and_small_differences_say_nothing() -> None:
    """Pages of files are left out: 100 MiB at the start, 150 MiB later."""

    def row(phase: str, anonymous: int, peak: int, mapped: int = 150) -> dict[str, Any]:
        sizes = {"bytes": anonymous + mapped, "peak_bytes": peak + mapped}
        sizes["anonymous_bytes"] = anonymous
        return {"phase": phase} | {name: size * MIB for name, size in sizes.items()}

    start, held = row("start", 300, 310, mapped=100), measured().held
    small = Actual([start, row("backward", 400, 10 * 1024 + 300)], held)
    found = compare_with_plan(plan("cpu"), small)
    assert found is not None
    [backward] = found["phases"]
    assert backward["measured_bytes"] == 10 * GIB
    assert backward["predicted_bytes"] == 10.5 * GIB, "with holes, without the process itself"
    assert found["drift"] is None
    large = Actual([start, row("backward", 400, 13 * 1024)], held)
    assert "above the plan (backward" in (compare_with_plan(plan("cpu"), large) or {})["drift"]


def test_without_a_plan_or_a_measurement_there_is_nothing() -> None:
    assert compare_with_plan({}, measured()) is None
    assert compare_with_plan(plan(), Actual([], [])) is None
