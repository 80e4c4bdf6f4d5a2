"""More of anything never takes fewer bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fsdpq.cards.find import find_card
from fsdpq.plan.shapes import shape_from_card
from fsdpq.plan.weights import Stored, Weights, plan_weights
from fsdpq.recipe.root import Recipe

CARD = find_card("meta-llama/Llama-3.2-1B")
SIZES = ("rank", "num_layers", "vocab_size", "intermediate_size")
QUANTIZATIONS: list[dict[str, Any]] = [
    {"kind": "bnb"},
    {"kind": "bnb", "block_size": 256, "double_quant": False},
    {"kind": "hqq", "nbits": 3, "group_size": None},
    {"kind": "none"},
]


def planned(
    sizes: dict[str, int], num_ranks: int, quantization: dict[str, Any], adapter: str
) -> Weights:
    """Returns the weights of a small Llama with other sizes."""
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "grows",
            "model": {"name_or_path": "org/name", "dtype": "bf16"},
            "quantization": quantization,
            "adapter": {"kind": adapter, "rank": sizes["rank"]},
            "data": {"path": "rows.jsonl"},
            "launch": {"device": "cuda", "nproc_per_node": num_ranks},
        }
    )
    assert CARD is not None
    card = dataclasses.replace(CARD, **{name: sizes[name] for name in SIZES if name != "rank"})
    return plan_weights(recipe, shape_from_card(card))


def all_bytes(weights: Weights) -> list[Stored]:
    return [weights.whole, weights.shard]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "rank": st.integers(1, 300),
            "num_layers": st.integers(1, 40),
            "vocab_size": st.integers(10, 5000),
            "intermediate_size": st.integers(1, 3000).map(lambda size: 2 * size),
        }
    ),
    grown=st.sampled_from(SIZES),
    by=st.integers(1, 500).map(lambda size: 2 * size),
    num_ranks=st.integers(1, 9),
    quantization=st.sampled_from(QUANTIZATIONS),
    adapter=st.sampled_from(["lora", "dora"]),
)
def test_bytes_never_fall_as_sizes_grow(
    sizes: dict[str, int],
    grown: str,
    by: int,
    num_ranks: int,
    quantization: dict[str, Any],
    adapter: str,
) -> None:
    before = planned(sizes, num_ranks, quantization, adapter)
    after = planned(sizes | {grown: sizes[grown] + by}, num_ranks, quantization, adapter)
    for one, other in zip(all_bytes(before), all_bytes(after), strict=True):
        assert one.total <= other.total
        assert one.trained <= other.trained
        assert one.optimizer <= other.optimizer
    for weights in (before, after):
        whole, shard = all_bytes(weights)
        assert whole.total / weights.num_shards <= shard.total <= whole.total
