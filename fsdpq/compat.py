"""What fsdpq needs of libraries beyond their public interfaces: one function each, with its end.

Nothing is patched. A function here sets state that an object of the library keeps for itself; a
test fails once the library is newer than what the function was read against.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy

FSDP_READ_AGAINST = "2.13"
"""torch whose ``torch/distributed/fsdp/_fully_shard`` `keep_trained_on_device` was read against."""


def keep_trained_on_device(model: nn.Module) -> int:
    """Takes trained Parameters out of FSDP2's CPU offload, in place; frozen ones stay in it.

    ``fully_shard`` has one offload policy for a group, and a group holds a layer's frozen bytes and
    its adapter. Whether a Parameter is offloaded is kept for each of them, and the copies to and
    from the host are made one by one, so the choice can differ inside a group. The group's own
    policy is only read to insist that everything lies on the host. A public way is proposed
    upstream: https://github.com/pytorch/pytorch/issues/187615, a map from names to policies
    (https://github.com/pytorch/pytorch/pull/188120). Once it is there, this goes.

    Args:
        model: after ``fully_shard``, still on meta.

    Returns:
        The number of Parameters taken out.

    Raises:
        RuntimeError: a trained Parameter has memory already, on the host.
    """
    num_kept = 0
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            trained = [each for each in group.fsdp_params if each.sharded_param.requires_grad]
            if not trained or not isinstance(group.offload_policy, CPUOffloadPolicy):
                continue
            group.offload_policy = OffloadPolicy()
            for each in trained:
                if not each.sharded_param.is_meta:
                    raise RuntimeError(f"`{each._param_fqn}` is on {each.sharded_param.device}")
                each.offload_to_cpu = each.pin_memory = False
            num_kept += len(trained)
    return num_kept
