"""Sharding of a meta model by FSDP2.

Frozen bytes, norms and adapters of one decoder layer share a group: a group of several dtypes is
gathered as raw bytes, and nothing in it is cast, because no ``param_dtype`` is set (adapters cast
their masters themselves). Where weights of the base are trained, a policy casts their masters
before they are gathered. Embedding and head have groups of their own, since the root group stays
gathered; tied weights must share one group (torch >= 2.13 raises otherwise).

What is trained in a group must have one dtype: weights that stay fp32 beside others in bf16
(magnitudes of DoRA) make a second group of the same layer, gathered and reduced in the same hooks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

# Named by the documentation of `fully_shard`, and exported nowhere else (torch 2.13).
from torch.distributed.fsdp._fully_shard._fsdp_common import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
)
from torch.distributed.tensor import Shard

from fsdpq.compat import keep_trained_on_device
from fsdpq.fsdp.activations import build_host_activations
from fsdpq.fsdp.layers import apply_layer_runs
from fsdpq.fsdp.mesh import build_mesh, build_twin
from fsdpq.fsdp.offload import offload_policy
from fsdpq.fsdp.precision import apply_param_dtype, build_policy
from fsdpq.protocols import BASE
from fsdpq.recipe.precision import Precision
from fsdpq.recipe.sections.fsdp import FsdpOptions

ApartFn = Callable[[nn.Parameter], ShardPlacementResult | None]
"""Returns where a Parameter is sharded, None for the mesh of the others."""


def apply_fsdp(
    model: nn.Module,
    options: FsdpOptions,
    *,
    device: torch.device,
    layers: Sequence[nn.Module],
    embedding_groups: Sequence[list[nn.Module]],
    forward_methods: Sequence[str],
    precision: Precision,
    layer_chunks: int = 1,
) -> tuple[int, str]:
    """Applies the ``fsdp`` section to ``model`` in place.

    Ranks: all (collective).

    Args:
        model: the root, on meta, with adapters attached.
        options: strategy, offload, activations.
        device: this rank's device.
        layers: decoder layers, one group each.
        embedding_groups: modules that share a group, for embedding and head.
        forward_methods: methods of ``model`` that gather like its forward.
        precision: the dtypes of the run.
        layer_chunks: parts of a micro-batch that a layer runs over.

    Returns:
        The number of groups, and a notice for the user or an empty text.
    """
    policy, notice = offload_policy(options.offload, device)
    host, about_host = build_host_activations(device) if options.activation_offload else (None, "")
    # Before sharding: a group's trained weights must have one dtype, and shards inherit it.
    kept_fp32 = apply_param_dtype(model, precision)
    # Before sharding: FSDP's hooks belong outside, or recomputing a layer would gather it again.
    apply_layer_runs(
        layers,
        checkpointing=options.activation_checkpointing,
        num_chunks=layer_chunks,
        host=host,
    )
    mesh = build_mesh(device, options)
    num_groups = apply_groups(
        model,
        mesh=mesh,
        layers=layers,
        embedding_groups=embedding_groups,
        reshard=reshards_after_forward(options),
        casts=build_policy(precision),
        policy=policy,
        apart=shard_apart(mesh, kept_fp32) if kept_fp32 else None,
    )
    # After the root is sharded: these reach every group below it.
    if not options.offload_trained:
        keep_trained_on_device(model)
    apply_forward_methods(model, forward_methods)
    apply_gradient_sums(model)
    return num_groups, notice or about_host or _about_kept(options, device)


def _about_kept(options: FsdpOptions, device: torch.device) -> str:
    if options.offload_trained or device.type != "cpu":
        return ""
    return "`fsdp.offload_trained: false` changes nothing here: the CPU's memory is the host's"


def reshards_after_forward(options: FsdpOptions) -> bool:
    """Whether gathered weights of a layer are freed after its forward.

    ``ddp`` frees them too: what it gathers are copies, of trained weights and a tied embedding.
    """
    return options.strategy not in ("shard_grad_op", "hybrid_shard_grad_op")


def apply_groups(
    model: nn.Module,
    *,
    mesh: DeviceMesh,
    layers: Sequence[nn.Module],
    embedding_groups: Sequence[list[nn.Module]],
    reshard: bool,
    casts: MixedPrecisionPolicy,
    policy: OffloadPolicy,
    apart: ApartFn | None = None,
) -> int:
    """Shards ``model`` in place, bottom-up; returns the number of groups.

    ``apart`` puts Parameters of a decoder layer into a second group.
    """
    whole = whole_parameters(model, mesh, policy, casts)
    shard = functools.partial(fully_shard, mesh=mesh, offload_policy=policy, ignored_params=whole)
    for layer in layers:
        shard(
            layer,
            reshard_after_forward=reshard,
            shard_placement_fn=apart,
            mp_policy=_policy_of([layer], casts),
        )
    gathered = [
        group for group in embedding_groups if any(p not in whole for p in _parameters(group))
    ]
    for group in gathered:
        shard(group, reshard_after_forward=True, mp_policy=_policy_of(group, casts))
        if not any(parameter.requires_grad for parameter in _parameters(group)):
            # The loss computes the gradient of the head's input in forward: no gather in backward.
            cast("FSDPModule", group[0]).set_unshard_in_backward(False)
    shard(model, mp_policy=_policy_of([model], casts))
    return len(layers) + len(gathered) + 1


def whole_parameters(
    model: nn.Module, mesh: DeviceMesh, policy: OffloadPolicy, casts: MixedPrecisionPolicy
) -> set[nn.Parameter]:
    """Returns the parameters that FSDP has nothing to do for: it would only copy them.

    They lie on the device, and one rank has all of their rows: frozen ones with ``ddp`` or one rank
    alone, and adapters of one rank alone, where their gradients are neither summed nor cast. Tied
    weights are none of them: FSDP keeps them one when they are given memory. Trained ones are left
    out all together or not at all: an optimizer takes no DTensors beside plain tensors.
    """
    if mesh.shape[-1] > 1 or isinstance(policy, CPUOffloadPolicy):
        return set()
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    frozen = {p for p in model.parameters() if not p.requires_grad and names[id(p)] == 1}
    trained = {p for p in model.parameters() if p.requires_grad}
    of_adapters = {
        parameter
        for module in model.modules()
        if hasattr(module, BASE)
        for parameter in module.parameters(recurse=False)
    }
    uncast = all(p.dtype == (casts.reduce_dtype or p.dtype) for p in trained)
    return frozen | trained if mesh.size() == 1 and uncast and trained <= of_adapters else frozen


def _parameters(group: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    return itertools.chain.from_iterable(module.parameters() for module in group)


def shard_apart(mesh: DeviceMesh, parameters: set[nn.Parameter]) -> ApartFn:
    """Returns a function that shards ``parameters`` over a twin of ``mesh``.

    Ranks: all (collective).
    """
    twin = build_twin(mesh)
    info = (
        HSDPMeshInfo(mesh=twin, shard_mesh_dim=1, replicate_mesh_dim=0)
        if twin.ndim == 2
        else FSDPMeshInfo(mesh=twin, shard_mesh_dim=0)
    )
    return lambda p: ShardPlacementResult(Shard(0), info) if p in parameters else None


def _policy_of(group: Sequence[nn.Module], casts: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Returns ``casts`` for a group that holds trained weights of the base.

    Elsewhere nothing is cast: adapters cast their own weights, and magnitudes of DoRA stay fp32.
    """
    trains_base = any(
        parameter.requires_grad
        for root in group
        for module in root.modules()
        if not hasattr(module, BASE)
        for parameter in module.parameters(recurse=False)
    )
    return casts if trains_base else dataclasses.replace(casts, param_dtype=None)


def apply_forward_methods(model: nn.Module, names: Sequence[str]) -> None:
    """Makes methods of the root gather as its forward does, in place."""
    for name in names:
        register_fsdp_forward_method(model, name)


def apply_gradient_sums(model: nn.Module) -> None:
    """Makes every group sum gradients over ranks instead of averaging them, in place.

    The loss is already divided by the token count of all ranks. gloo has no scaled sum, so sums are
    asked for by name; along both axes of a mesh they are sums then.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)
