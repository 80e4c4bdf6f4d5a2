"""Every shipped recipe fits the hardware that it names, and says what it takes there."""

from __future__ import annotations

from pathlib import Path

import make_plans
import make_scaling
import pytest

from fsdpq.plan.result import Plan

PATHS = make_plans.recipes()


@pytest.fixture(scope="module")
def plans() -> dict[Path, Plan]:
    return {path: make_plans.plan_of(path) for path in PATHS}


def test_all_but_the_quickstart_name_their_hardware() -> None:
    everything = set((make_plans.ROOT / "recipes").glob("*.yaml"))
    assert {path.stem for path in everything - set(PATHS)} == {"quickstart"}


def test_every_recipe_fits_its_hardware(plans: dict[Path, Plan]) -> None:
    short = {path.stem: plan.shortages for path, plan in plans.items() if not plan.fits}
    assert short == {}


def test_every_recipe_says_what_it_takes(plans: dict[Path, Plan]) -> None:
    for path, plan in plans.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert make_plans.memory_line(plan) in lines, "run `make plans`"


def test_the_table_of_plans_is_fresh(plans: dict[Path, Plan]) -> None:
    committed = make_plans.PAGE.read_text(encoding="utf-8")
    assert committed == make_plans.page(plans), "run `make plans`"


@pytest.mark.parametrize("path", make_plans.WITH_OUTPUTS, ids=lambda path: path.name)
def test_the_outputs_in_the_docs_are_fresh(path: Path) -> None:
    committed = path.read_text(encoding="utf-8")
    assert committed == make_plans.with_outputs(committed), "run `make plans`"
    assert path.name == "README.md" or committed.count("$ fsdpq plan") == 4


def test_the_page_about_many_machines_is_fresh() -> None:
    committed = make_scaling.PAGE.read_text(encoding="utf-8")
    assert committed == make_scaling.with_tables(committed), "run `make plans`"
    assert make_scaling.PICTURE.read_text(encoding="utf-8") == make_scaling.picture()


@pytest.mark.parametrize("load", make_scaling.LOADS, ids=lambda load: load.name)
def test_bytes_between_machines_follow_the_formula(load: make_scaling.Load) -> None:
    """The formulas of the page, from what one machine gathers and reduces."""
    gathered, reduced = (
        getattr(make_scaling.step(load, "full_shard", 8).traffic, name)
        for name in ("gathered", "reduced")
    )
    full = make_scaling.step(load, "full_shard", 8).traffic.network
    assert full == pytest.approx(63 / 64 * (gathered + reduced))
    hybrid = make_scaling.step(load, "hybrid_full_shard", 8).traffic
    assert hybrid.network == pytest.approx(2 * 7 / 8 * hybrid.reduced)
    ddp = make_scaling.step(load, "ddp", 8).traffic
    assert ddp.network == pytest.approx(2 * 63 / 64 * ddp.summed)
    assert hybrid.network < (full if "full" in load.name else full / 7)


def test_hardware_in_words_is_a_machine() -> None:
    machine = make_plans.machine_of("2 x 24 GB GPU, 64 GB of memory, an NVMe disk: 40 GB")
    assert [gpu.memory_bytes for gpu in machine.gpus or ()] == [24 * 2**30] * 2
    assert machine.ram_bytes == 64 * 2**30
    assert make_plans.machine_of("2 CPU cores, 4 GB of memory").gpus == ()
