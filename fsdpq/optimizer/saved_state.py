"""An optimizer's states as a checkpoint keeps them: by parameter name, for any number of ranks.

``torch.distributed.checkpoint.state_dict`` would do this for torch's optimizers. It makes missing
states by a step with gradients of zero, which doubles the memory of what is trained, and takes no
states that belong to a rank, such as blocks of 8-bit means. Learning rates are not kept: they
follow from the recipe and the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fsdpq.dist import own_shard
from fsdpq.protocols import Piece, own_piece

PREFIX = "optimizer"


class OptimizerState:
    """Takes an optimizer's states apart, and puts saved ones in their place.

    Args:
        optimizer: over ``parameters``.
        parameters: the trained ones by name.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._blocks: Any = None
        if getattr(optimizer, "keeps_blocks", False):
            from fsdpq.optimizer.saved_8bit import SavedBlocks  # imports bitsandbytes

            self._blocks = SavedBlocks()

    def pieces(self) -> dict[str, Piece]:
        """Returns this rank's rows of every state that has rows, not copied."""
        found: dict[str, Piece] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._state(parameter).items():
                if not isinstance(value, Tensor) or value.ndim == 0:
                    continue
                full = f"{PREFIX}/{name}/{key}"
                if self._blocks is None:
                    found[full] = own_piece(value)
                else:
                    found[full] = self._blocks.piece(parameter, key, value)
        return found

    def facts(self) -> dict[str, Any]:
        """Returns what is needed to put the pieces back, and all that has no rows, as JSON data.

        The facts of rank 0 hold for all ranks: it has rows of every tensor.
        """
        found: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            state = self._state(parameter)
            if not state:
                continue
            tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
            found[name] = {
                "rows": {
                    key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()
                },
                "numbers": {
                    key: {"value": float(value), "is_tensor": isinstance(value, Tensor)}
                    for key, value in state.items()
                    if key not in tensors and value is not None
                },
            }
            if self._blocks is not None:
                found[name] |= self._blocks.facts(parameter)
        return found

    def prepare(self, facts: Mapping[str, Any]) -> dict[str, Piece]:
        """Makes the states that ``facts`` speak of, of zeros; returns the pieces to load into."""
        self._optimizer.state.clear()
        found: dict[str, Piece] = {}
        for name, parameter in self._parameters.items():
            if name not in facts:
                continue
            state = self._optimizer.state[parameter]
            group = self._group_of(parameter)
            for key, number in facts[name]["numbers"].items():
                state[key] = _restore_number(number, parameter, group)
            for key, dtype in facts[name]["rows"].items():
                if self._blocks is None:
                    state[key] = torch.zeros_like(parameter, dtype=getattr(torch, dtype))
                    found[f"{PREFIX}/{name}/{key}"] = own_piece(state[key])
        if self._blocks is not None:
            named = {name: p for name, p in self._parameters.items() if name in facts}
            found |= {
                f"{PREFIX}/{name}": piece
                for name, piece in self._blocks.prepare(named, facts).items()
            }
        return found

    def finish(self) -> None:
        """Ends a restore: everything is loaded."""
        if self._blocks is not None:
            for parameter, state in self._blocks.finish():
                self._optimizer.state[parameter] |= state

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        return cast("dict[str, Any]", self._optimizer.state.get(parameter, {}))

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(
            group
            for group in self._optimizer.param_groups
            if any(each is parameter for each in group["params"])
        )


def _restore_number(
    number: Mapping[str, Any], parameter: nn.Parameter, group: Mapping[str, Any]
) -> Tensor | int:
    """Returns a count of steps as the optimizer keeps it.

    Fused updates want it where the weights are, others on the host (`torch.optim.Optimizer`'s
    ``load_state_dict`` has the same rule).
    """
    if not number["is_tensor"]:
        return int(number["value"])
    beside = group.get("fused") or group.get("capturable") or "is_muon" in group
    device = own_shard(parameter).rows.device if beside else torch.device("cpu")
    return torch.tensor(number["value"], dtype=torch.float32, device=device)
