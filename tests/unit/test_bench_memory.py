"""The memory benchmark measures recipes that exist, and draws what it measured."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from bench_memory.allocations import fit_line
from bench_memory.chart import draw
from bench_memory.process import build_recipe, make_step
from bench_memory.setups import list_setups

OURS = [setup for setup in list_setups(full=True) if setup.library == "fsdpq"]


@pytest.mark.parametrize("setup", OURS, ids=lambda setup: setup.name)
def test_every_setup_is_a_valid_recipe_and_has_its_tokens(setup) -> None:
    recipe = build_recipe(setup, Path("model"), torch.device("cpu"))
    assert recipe.model.dtype == "bf16"
    for length in setup.lengths:
        [batch] = make_step(setup, length).micro_batches
        assert batch.input_ids.shape == (setup.num_rows, length)
        packed = batch.position_ids is not None
        assert packed == (setup.num_documents > 1)


def test_names_and_setups_differ() -> None:
    setups = list_setups(full=False)
    assert len({setup.name for setup in setups}) == len(setups)


def test_the_plot_has_every_series_and_is_xml() -> None:
    points = [(512.0, 10.0), (1024.0, 20.0), (2048.0, 40.0)]
    svg = draw("A & B", "tokens", "MB", {"one": points, "two": points})
    root = ET.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"A & B", "one", "two", "tokens", "MB"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 6


def test_the_fit_tells_a_line_from_a_curve() -> None:
    lengths = (100, 200, 400, 800)
    straight = fit_line(lengths, [7000 + 30 * n for n in lengths])
    assert straight.token_bytes == pytest.approx(30)
    assert straight.r_squared == pytest.approx(1)
    curved = fit_line(lengths, [7000 + 30 * n + n * n for n in lengths])
    assert curved.r_squared < 0.99
    assert curved.quadratic_share == pytest.approx(800 * 800 / curved.peaks[-1])
