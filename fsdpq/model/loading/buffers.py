"""Gives a sharded meta model memory, and fills the buffers that no checkpoint holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.protocols import BASE


def allocate(
    model: CausalLM,
    device: torch.device,
    *,
    buffers: torch.device,
    frozen: bool = True,
    trained: torch.device | None = None,
) -> None:
    """Gives a meta model memory without content, in place.

    Args:
        model: on meta.
        device: of its parameters.
        buffers: the device of its buffers.
        frozen: False leaves frozen parameters of the base on meta, to be mapped from a file.
        trained: device of trained parameters, None for that of all.
    """
    of_adapters = {
        id(parameter)
        for module in model.modules()
        if hasattr(module, BASE)
        for parameter in module.parameters(recurse=False)
    }

    def place(tensor: Tensor) -> torch.device:
        if not isinstance(tensor, nn.Parameter):
            return device
        if tensor.requires_grad:
            return trained or device
        return device if frozen or id(tensor) in of_adapters else torch.device("meta")

    def give_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=place(tensor))

    tied = _tied_places(model)
    model._apply(give_memory)
    for (owner, name), *others in tied:
        for module, attribute in others:
            setattr(module, attribute, getattr(owner, name))
    if buffers == device:
        return
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            empty = torch.empty_like(buffer, device=buffers)
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, empty, persistent=persistent)


def _tied_places(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Returns where plain Parameters are that several modules share; FSDP ties its own again."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def recompute_buffers(hf: PreTrainedModel) -> None:
    """Fills buffers that no checkpoint holds (RoPE ``inv_freq``), in their own dtype.

    transformers recomputes them in ``_init_weights``; weights that it touches on the way are loaded
    afterwards.

    Raises:
        CheckpointError: a family does not recompute one of them; names it.
    """
    for name, module in hf.named_modules():
        buffers = {n: getattr(module, n) for n in module._non_persistent_buffers_set}
        floating = {n: b for n, b in buffers.items() if b is not None and b.is_floating_point()}
        if not floating:
            continue
        for buffer in floating.values():
            buffer.fill_(float("nan"))
        hf._init_weights(module)
        left = [n for n in floating if getattr(module, n).isnan().any()]
        if left:
            raise CheckpointError(
                f"`{type(hf).__name__}` does not recompute `{name}.{left[0]}`, which is in "
                "no checkpoint",
                hint="train a model of another family",
            )
