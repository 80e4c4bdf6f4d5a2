"""The device mesh of a strategy: which ranks share one copy of the base, which repeat it.

``full_shard`` and ``shard_grad_op`` have one axis over all ranks. ``ddp`` and the ``hybrid`` ones
have two: shards lie along the inner axis, whose ranks follow each other and so sit on one machine,
and the outer axis repeats them. Gradients are summed along both.
"""

from __future__ import annotations

import os
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fsdpq.dist import TIMEOUT, world_size
from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.fsdp import FsdpOptions


def build_mesh(device: torch.device, options: FsdpOptions) -> DeviceMesh:
    """Returns the mesh over all ranks: ``(shard,)``, or ``(replicate, shard)``.

    Ranks: all (collective).

    Raises:
        RecipeError: ``fsdp.shard_size`` does not divide the ranks.
    """
    num_ranks = world_size()
    size = shard_size(options, num_ranks, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
    if size == num_ranks:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("shard",))
    shape = (num_ranks // size, size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def build_twin(mesh: DeviceMesh) -> DeviceMesh:
    """Returns a mesh of the same ranks and axes whose shard axis is a process group of its own.

    FSDP makes one group of Parameters for each process group: this is how Parameters of one layer
    are gathered and reduced apart (torch 2.13, ``fully_shard(shard_placement_fn=...)``).

    Ranks: all (collective).
    """
    rows = mesh.mesh.view(-1, mesh.size(mesh.ndim - 1)).tolist()
    own, _ = dist.new_subgroups_by_enumeration(rows, timeout=TIMEOUT)
    own = cast("dist.ProcessGroup", own)  # this rank is in one of them
    names = mesh.mesh_dim_names
    if mesh.ndim == 1:
        return DeviceMesh.from_group(own, mesh.device_type, mesh_dim_names=names)
    groups = [mesh.get_group("replicate"), own]
    return DeviceMesh.from_group(groups, mesh.device_type, mesh=mesh.mesh, mesh_dim_names=names)


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
