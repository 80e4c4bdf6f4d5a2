"""Bytes that tensors of this rank hold between uses, exactly, by what they are for.

Categories are those of a plan (`fsdpq.plan.result.Category`) that can be counted: ``codes``,
``scales``, ``plain``, ``trained``, ``gradients`` and ``optimizer``. Places are ``device``, and
``host`` where that is another; rows that are pages of a file are in host memory, as far as torch
knows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CODES = "codes"
"""Last part of the names of Parameters that hold quantized weights; other bytes are scales."""

Held = dict[str, dict[str, int]]


class StepHeld:
    """What is held in one step: told of its phases' ends, while gradients are there.

    Args:
        model: sharded.
        optimizer: of its trained weights.
        device: of this rank.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._gradients: Held = {}

    def end_phase(self, phase: str) -> None:
        """Takes the gradients at the end of ``backward``."""
        if phase == "backward":
            self._gradients = held_gradients(self._model, self._device)

    def all(self) -> Held:
        """Returns weights, gradients and states: place -> category -> bytes; after the step."""
        weights = held_weights(self._model, self._device)
        return merge_held(weights, self._gradients, held_states(self._optimizer, self._device))


def held_weights(model: nn.Module, device: torch.device) -> Held:
    """Returns the weights of this rank's shards: place -> category -> bytes.

    Args:
        model: sharded, between two steps.
        device: of this rank.
    """
    held: Held = {}
    for name, parameter in model.named_parameters():
        _add(held, _category(name, parameter), parameter, device)
    return held


def held_gradients(model: nn.Module, device: torch.device) -> Held:
    """Returns the gradients that are there."""
    held: Held = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            _add(held, "gradients", parameter.grad, device)
    return held


def held_states(optimizer: torch.optim.Optimizer, device: torch.device) -> Held:
    """Returns the states of the optimizer."""
    held: Held = {}
    for tensor in _state_tensors(optimizer):
        _add(held, "optimizer", tensor, device)
    return held


def merge_held(*parts: Held) -> Held:
    """Returns all of ``parts``; no category is in two of them."""
    places = {place for part in parts for place in part}
    return {
        place: {name: size for part in parts for name, size in part.get(place, {}).items()}
        for place in sorted(places)
    }


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _category(name: str, parameter: nn.Parameter) -> str:
    if parameter.requires_grad:
        return "trained"
    if parameter.dtype is not torch.uint8:
        return "plain"
    return "codes" if name.rpartition(".")[2] == CODES else "scales"


def _add(held: Held, category: str, tensor: Tensor, device: torch.device) -> None:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    place = "device" if local.device.type == device.type else "host"
    of_place = held.setdefault(place, {})
    of_place[category] = of_place.get(category, 0) + local.nbytes
