"""Which ranks share one copy of the base."""

from __future__ import annotations

import pytest

from fsdpq.errors import RecipeError
from fsdpq.plan.sharding import shard_size
from fsdpq.recipe.sections.fsdp import FsdpOptions


@pytest.mark.parametrize(
    ("options", "num_ranks", "num_local", "expected"),
    [
        ({"strategy": "full_shard"}, 4, 4, 4),
        ({"strategy": "shard_grad_op"}, 6, 2, 6),
        ({"strategy": "ddp"}, 4, 4, 1),
        ({"strategy": "hybrid_full_shard"}, 16, 8, 8),
        ({"strategy": "hybrid_full_shard"}, 8, 8, 4),
        ({"strategy": "hybrid_full_shard"}, 9, 9, 3),
        ({"strategy": "hybrid_shard_grad_op"}, 3, 3, 1),
        ({"strategy": "hybrid_full_shard", "shard_size": 2}, 1, 1, 1),
        ({"strategy": "hybrid_full_shard", "shard_size": 2}, 8, 8, 2),
    ],
)
def test_shard_size_follows_strategy_and_machines(
    options: dict[str, object], num_ranks: int, num_local: int, expected: int
) -> None:
    assert shard_size(FsdpOptions.model_validate(options), num_ranks, num_local) == expected


def test_a_size_that_does_not_divide_the_ranks_is_a_problem() -> None:
    options = FsdpOptions(strategy="hybrid_full_shard", shard_size=3)
    with pytest.raises(RecipeError) as caught:
        shard_size(options, 4, 4)
    assert "does not divide 4 ranks" in caught.value.problems[0].message
