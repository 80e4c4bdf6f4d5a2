"""Sharding of a meta model by FSDP2.

Frozen bytes, norms and adapters of one decoder layer share a group: a group of several dtypes is
gathered as raw bytes, and nothing in it is cast, because no mixed-precision policy is set (adapters
cast their fp32 masters themselves). Where weights of the base are trained, a policy casts their
masters before they are gathered. Embedding and head have groups of their own, since the root
group stays gathered; tied weights must share one group (torch >= 2.13 raises otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from fsdpq.dist import world_size
from fsdpq.recipe.sections.fsdp import FsdpOptions


def build_mesh(device: torch.device) -> DeviceMesh:
    """Returns the 1-D mesh over all ranks."""
    return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))


def build_policy(*, trains_base: bool, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Returns what FSDP casts.

    Args:
        trains_base: whether weights of the base are trained, as masters of another dtype.
        dtype: in which the model computes; gradients are reduced in fp32.
    """
    if not trains_base:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def apply_fsdp(
    model: nn.Module,
    options: FsdpOptions,
    *,
    mesh: DeviceMesh,
    layers: Iterable[nn.Module],
    embedding_groups: Sequence[list[nn.Module]],
    forward_methods: Sequence[str],
    policy: MixedPrecisionPolicy,
) -> int:
    """Shards ``model`` in place, bottom-up; returns the number of groups.

    Gradients are summed over ranks, not averaged: the loss is already divided by the token count
    of all ranks.

    Args:
        model: the root, on meta, with adapters attached and checkpointing applied.
        options: how long gathered weights live.
        mesh: 1-D mesh over all ranks.
        layers: decoder layers, one group each.
        embedding_groups: modules that share a group, for embedding and head.
        forward_methods: methods of ``model`` that gather like its forward.
        policy: what `build_policy` returned.
    """
    reshard = options.strategy == "full_shard"
    num_layers = 0
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        num_layers += 1
    for group in embedding_groups:
        trained = any(parameter.requires_grad for m in group for parameter in m.parameters())
        fully_shard(group, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        if not trained:
            # The loss computes the gradient of the head's input in forward: no gather in backward.
            cast("FSDPModule", group[0]).set_unshard_in_backward(False)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in forward_methods:
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)
    return num_layers + len(embedding_groups) + 1
