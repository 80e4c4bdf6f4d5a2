"""Tokens a second that were measured, with the recipe that each belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fsdpq.cards.find import find_card
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.from_card import shape_from_card
from fsdpq.recipe.root import Recipe

SEVEN, SEVENTY = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"
LARGEST = "meta-llama/Llama-3.1-405B"


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Attributes:
        name: for people.
        gpus: as `fsdpq.plan.hardware.gpus.parse_gpus` takes them.
        tokens_per_s: measured, over all ranks.
        sections: of the recipe, over those of `speed_recipe`.
        model: a card's name.
        num_layers: of the model, where it was cut.
        of_others: another program's.
    """

    name: str
    gpus: str
    tokens_per_s: float
    sections: dict[str, dict[str, Any]]
    model: str = SEVEN
    num_layers: int | None = None
    of_others: bool = False


def _rows(rows: int, length: int = 2048, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    training = sections.pop("training", {}) | {"micro_batch_size": rows}
    return {"data": {"seq_len": length}, "training": training, **sections}


def _fsdp(**values: Any) -> dict[str, dict[str, Any]]:
    return {"fsdp": values}


R64, R16 = ({"adapter": {"kind": "lora", "rank": rank}} for rank in (64, 16))
DORA = {"adapter": {"kind": "dora", "rank": 64}}
CPU, BOTH = _fsdp(offload="cpu"), _fsdp(offload="cpu", activation_offload=True)
TWO = {"launch": {"nproc_per_node": 2}}
COMPILED = {"training": {"compile": True}}

SPEEDS = (
    Speed("7B r64, 4 x 2048", "H200", 9790, _rows(4, **R64)),
    Speed("7B r64, 4 x 2048, `compile`", "H200", 11650, _rows(4, **R64, **COMPILED)),
    Speed("7B r64, 1 x 2048", "H200", 2884, _rows(1, **R64)),
    Speed(
        "the same, checkpointing `selective`", "H200", 3554,
        _rows(1, **R64, **_fsdp(activation_checkpointing="selective")),
    ),
    Speed(
        "the same, checkpointing `none`", "H200", 3772,
        _rows(1, **R64, **_fsdp(activation_checkpointing="none")),
    ),
    Speed("the same, `compile`", "H200", 3360, _rows(1, **R64, **COMPILED)),
    Speed(
        "the same, `activation_offload`", "H200", 2891,
        _rows(1, **R64, **_fsdp(activation_offload=True)),
    ),
    Speed("the same, `offload: cpu`", "H200", 1779, _rows(1, **R64, **CPU)),
    Speed(
        "the same, trained weights on the device", "H200", 2892,
        _rows(1, **R64, **_fsdp(offload="cpu", offload_trained=False)),
    ),
    Speed("the same, bf16 base", "H200", 4889, _rows(1, **R64, quantization={"kind": "none"})),
    Speed("the same, DoRA", "H200", 1697, _rows(1, **DORA)),
    Speed("7B r64, 8 of 32 layers, 1 x 8192", "H200", 34297, _rows(1, 8192, **R64), num_layers=8),
    Speed("70B r16, 1 x 2048", "H200", 999, _rows(1, **R16), SEVENTY),
    Speed("70B r16, 2 x 2048", "H200", 1240, _rows(2, **R16), SEVENTY),
    Speed("70B r16, `offload: cpu`, 1 x 2048", "H200", 605, _rows(1, **R16, **CPU), SEVENTY),
    Speed("the same, 2 x 2048", "H200", 865, _rows(2, **R16, **CPU), SEVENTY),
    Speed("the same, `activation_offload`", "H200", 864, _rows(2, **R16, **BOTH), SEVENTY),
    Speed(
        "the same, 8 x 2048, `layer_chunks: 8`", "H200", 1047,
        _rows(8, **R16, **BOTH, training={"layer_chunks": 8}), SEVENTY,
    ),
    Speed("the same, 1 x 8192", "H200", 1001, _rows(1, 8192, **R16, **BOTH), SEVENTY),
    Speed(
        "7B r64, 4 x 2048, fsdp_qlora", "2x RTX 4090", 4600, _rows(4, **R64, **TWO),
        of_others=True,
    ),
    Speed(
        "70B r64, `offload: cpu`, 2 x 2048, fsdp_qlora", "2x RTX 4090", 481,
        _rows(2, **R64, **CPU, **TWO), SEVENTY, of_others=True,
    ),
    Speed(
        "the same", "2x RTX 3090", 178, _rows(2, **R64, **CPU, **TWO), SEVENTY, of_others=True
    ),
    Speed(
        "405B r16, 1 x 2048, torchtune", "8x A100 80GB", 653,
        _rows(1, **R16, launch={"nproc_per_node": 8}), LARGEST, of_others=True,
    ),
)  # fmt: skip
"""docs/benchmarks/gpu.md; others' numbers are those that their projects published. How long
torchtune's rows were was not said."""


def speed_recipe(sections: dict[str, dict[str, Any]]) -> Recipe:
    """Returns the resolved recipe of a measurement: one step of one micro-batch a rank."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "speed",
        "model": {"name_or_path": "shape", "dtype": "bf16"},
        "quantization": {"kind": "bnb"},
        "adapter": {"kind": "lora"},
        "fsdp": {},
        "data": {"format": "dummy"},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "lr_scheduler": {"kind": "constant"},
        "training": {"steps": 1, "micro_batch_size": 1},
        "launch": {"device": "cuda", "nproc_per_node": 1},
    }
    for name, section in sections.items():
        document[name] = section if "kind" in section else document[name] | section
    ranks = document["launch"]["nproc_per_node"] * document["launch"].get("nnodes", 1)
    rows = document["training"]["micro_batch_size"] * ranks
    document["training"].setdefault("global_batch_size", rows)
    return Recipe.model_validate(document)


def card_shape(name: str, num_layers: int | None = None) -> ModelShape:
    """Returns a card's shape, cut to its first layers where a number is given."""
    card = find_card(name)
    assert card is not None, name
    return shape_from_card(card if num_layers is None else replace(card, num_layers=num_layers))
