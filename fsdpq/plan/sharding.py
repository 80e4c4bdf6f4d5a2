"""How many ranks share one copy of the base, and who has which rows. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.fsdp import FsdpOptions


@dataclass(frozen=True)
class Sharding:
    """How the tensors of a run are dealt.

    Attributes:
        num_ranks: of the run.
        num_shards: ranks that share one copy of the base.
        is_whole: a rank has all rows of a tensor on its device, so that FSDP would only copy it.
    """

    num_ranks: int
    num_shards: int
    is_whole: bool


def sharding_of(recipe: Recipe) -> Sharding:
    """Returns the sharding of a resolved recipe.

    Raises:
        RecipeError: ``fsdp.shard_size`` does not divide the ranks.
    """
    num_local = int(recipe.launch.nproc_per_node)
    num_ranks = num_local * recipe.launch.max_nodes
    num_shards = shard_size(recipe.fsdp, num_ranks, num_local)
    is_whole = num_shards == 1 and recipe.fsdp.offload == "none"
    return Sharding(num_ranks, num_shards, is_whole)


def shard_size(options: FsdpOptions, num_ranks: int, num_local_ranks: int) -> int:
    """Returns how many ranks share one copy of the base.

    Args:
        options: strategy and, for the ``hybrid`` ones, maybe the size.
        num_ranks: ranks of the run.
        num_local_ranks: ranks of this machine.

    Raises:
        RecipeError: ``fsdp.shard_size`` does not divide the ranks.
    """
    if options.strategy == "ddp" or num_ranks == 1:
        return 1  # one rank answers prompts of a run that many trained
    if not options.strategy.startswith("hybrid"):
        return num_ranks
    if options.shard_size is not None:
        if num_ranks % options.shard_size:
            message = f"`fsdp.shard_size` is {options.shard_size}, which does not divide "
            message += f"{num_ranks} ranks"
            hint = "use a divisor of the number of ranks, or delete it"
            raise RecipeError([Problem(message, "fsdp.shard_size", None, hint)])
        return options.shard_size
    if num_local_ranks < num_ranks and num_ranks % num_local_ranks == 0:
        return num_local_ranks
    return next(size for size in range(max(1, num_ranks // 2), 0, -1) if num_ranks % size == 0)
