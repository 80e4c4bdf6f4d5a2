"""FSDP groups made of given tensors, and what FSDP's own gather makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard

from fsdpq.dist import assign_own_rows
from fsdpq.worker.self_test.check import Bench


class TensorGroup(nn.Module):
    """Holds tensors as Parameters of one FSDP group; the fp32 ones are trained, as LoRA's are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            empty = torch.empty_like(tensor, device="meta")
            trained = tensor.dtype is torch.float32
            self.register_parameter(name, nn.Parameter(empty, requires_grad=trained))


def shard_tensors(
    tensors: Mapping[str, Tensor], bench: Bench, *, policy: OffloadPolicy | None = None
) -> nn.Module:
    """Returns a group of which this rank holds its own rows.

    Ranks: all (collective).

    Args:
        tensors: the same on all ranks.
        bench: device and mesh.
        policy: where shards lie between uses; None is the device.
    """
    policy = OffloadPolicy() if policy is None else policy
    group = TensorGroup(tensors)
    fully_shard(group, mesh=bench.mesh, offload_policy=policy)
    offloads = type(policy) is not OffloadPolicy
    group.to_empty(device="cpu" if offloads else bench.device)
    for name, parameter in group.named_parameters():
        assign_own_rows(parameter, tensors[name].to(parameter.device))
    return group


def gather_group(group: nn.Module) -> dict[str, Tensor]:
    """Returns the whole tensors of a group, gathered as a forward pass gathers them.

    Ranks: all (collective).
    """
    module = cast("FSDPModule", group)
    module.unshard()
    whole = {name: parameter.detach().clone() for name, parameter in group.named_parameters()}
    module.reshard()
    return whole
