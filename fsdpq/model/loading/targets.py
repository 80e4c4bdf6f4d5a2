"""What of a model a base fills: each target by the name that transformers gives its tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fsdpq.dist import Shard, own_shard, placement, shard_range
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.quantized_experts import PackedExperts
from fsdpq.model.quantized_linear import PackedMatrix, packed_parameter_ids
from fsdpq.protocols import BASE


def checkpoint_name(name: str) -> str:
    """Returns the checkpoint's name of a parameter or module of a `CausalLM`.

    The wrapper's ``hf.`` in front and an adapter's ``base`` in between are ours.
    """
    parts = name.removeprefix("hf.").split(".")
    return ".".join(part for part in parts if part != BASE)


LoadingTarget = PackedMatrix | nn.Parameter


def loading_targets(model: CausalLM) -> dict[str, LoadingTarget]:
    """Maps names of transformers to what of the base they fill; tied weights once."""
    packed = packed_parameter_ids(model)
    targets: dict[str, LoadingTarget] = {
        checkpoint_name(name if isinstance(module, PackedExperts) else f"{name}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, PackedMatrix)
    }
    for name, parameter in model.named_parameters():
        parent = model.get_submodule(name.rpartition(".")[0])
        is_adapter = hasattr(parent, BASE)
        if not is_adapter and id(parameter) not in packed:
            targets[checkpoint_name(name)] = parameter
    for name, buffer in model.named_buffers():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
            targets[checkpoint_name(name)] = buffer  # pyright: ignore[reportArgumentType]
    return targets


def tied_names(model: CausalLM, targets: dict[str, LoadingTarget]) -> set[str]:
    """Returns the names of weights that share the memory of a target under another name."""
    names = {checkpoint_name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    return names - targets.keys()


def full_shape(target: LoadingTarget) -> tuple[int, ...]:
    """Shape of the tensor in the checkpoint that fills ``target``."""
    if isinstance(target, PackedExperts):
        rows = target.rows_per_expert
        return (target.out_features // rows, rows, target.in_features)
    return _sharded_shape(target)


def _sharded_shape(target: LoadingTarget) -> tuple[int, ...]:
    if isinstance(target, PackedMatrix):
        return (target.out_features, target.in_features)
    return tuple(target.shape)


def own_weights(target: LoadingTarget) -> int:
    """Returns how many weights of the target this rank owns."""
    start, stop = own_matrix_rows(target)
    return (stop - start) * torch.Size(_sharded_shape(target)[-1:]).numel()


def own_matrix_rows(target: LoadingTarget) -> tuple[int, int]:
    """Returns this rank's rows, all dimensions but the last flattened to one; a scalar is one."""
    shape = _sharded_shape(target)
    tensor = target if isinstance(target, Tensor) else getattr(target, target.packed_names[0])
    place = placement(tensor)
    start, stop = shard_range(shape[0] if shape else 1, place.index, place.size)
    rows_each = torch.Size(shape[1:-1]).numel()
    return start * rows_each, stop * rows_each


def packed_shards(module: PackedMatrix) -> dict[str, Shard]:
    """Returns this rank's rows of every packed Parameter of a matrix."""
    return {name: own_shard(getattr(module, name)) for name in module.packed_names}
