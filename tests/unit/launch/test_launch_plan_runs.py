"""What a trace and a measurement start from: a machine, and a config made of a shape."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.cards.find import CARDS
from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch import plan_runs
from fsdpq.plan.result import Moment, RankMemory
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.plan.traced import Traced

FIRST_OF_FAMILY = {card.model_type: card for card in reversed(CARDS)}


def test_measurement_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_runs, "list_gpus", list)
    recipe = tiny_recipe(launch={"device": "cuda", "nproc_per_node": 8})
    with pytest.raises(EnvironmentProblemError) as caught:
        plan_runs.measure_recipe(recipe, shape_from_card(CARDS[0]))
    assert "--trace" in (caught.value.hint or "")


@pytest.mark.parametrize("family", FIRST_OF_FAMILY)
def test_config_of_a_card_gives_transformers_the_same_weights(family: str, tmp_path: Path) -> None:
    shape = shape_from_card(FIRST_OF_FAMILY[family])
    groups = tuple(dataclasses.replace(group, count=1) for group in shape.groups)
    shape = dataclasses.replace(shape, groups=groups)
    (tmp_path / "config.json").write_text(json.dumps(plan_runs.config_of(shape)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_weights


def test_a_trace_survives_its_file() -> None:
    moments = (Moment("forward", "the loss", {"loss": 3}), Moment("backward", "layer 1", {}))
    traced = Traced("measure", RankMemory(moments), {"resident": 5}, 1.5, 7, None, ("a note",))
    assert Traced.from_json(json.loads(json.dumps(traced.as_json()))) == traced
