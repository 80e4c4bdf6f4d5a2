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
from fsdpq.plan.sharding import shard_size
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
