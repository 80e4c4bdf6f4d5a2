"""AdamW whose two running means are kept in 8 bits, by bitsandbytes, over sharded parameters.

bitsandbytes' optimizer classes know no DTensors; its update itself works on plain tensors, so it is
called here on each rank's own rows. A block of 256 running means shares one scale
(https://arxiv.org/abs/2110.02861). The result is that of one process, bit for bit, wherever shards
begin at a block: where ``rows of a rank * width`` is a multiple of 256. Elsewhere blocks are cut
differently and results differ by the rounding of the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from fsdpq.dist import own_shard
from fsdpq.optimizer.groups import lora_plus_groups
from fsdpq.plan.costs.optimizer import BLOCK_SIZE, MIN_8BIT_SIZE
from fsdpq.recipe.sections.optimizer import AdamW8bitOptions


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit states; parameters may be DTensors that FSDP2 sharded.

    States hold this rank's rows only; `fsdpq.optimizer.saved_8bit` deals them to other ranks.

    Args:
        groups: parameter groups with ``params`` and ``lr``.
        betas: decay rates of the means.
        eps: added to the denominator.
        weight_decay: decoupled.

    Attributes:
        keeps_blocks: states are codes and scales of this rank's rows (`saved_state`).
    """

    keeps_blocks = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates this rank's rows of every parameter that has a gradient, in place."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        rows = own_shard(parameter).rows
        if rows.numel() == 0:
            return
        state = self.state[parameter]
        if not state:
            state |= _first_state(rows, in_8_bits=parameter.numel() >= MIN_8BIT_SIZE)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        both = {
            "optimizer_name": "adam",
            "g": own_shard(parameter.grad).rows.contiguous(),  # pyright: ignore[reportArgumentType]
            "p": rows,
            "state1": state["state1"],
            "state2": state["state2"],
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "step": state["step"],
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        if "absmax1" not in state:
            bnb.optimizer_update_32bit(**both)
            return
        bnb.optimizer_update_8bit_blockwise(
            **both,
            beta3=0.0,
            alpha=0.0,
            qmap1=code_map(rows.device, signed=True),
            qmap2=code_map(rows.device, signed=False),
            absmax1=state["absmax1"],
            absmax2=state["absmax2"],
        )


def _first_state(rows: Tensor, *, in_8_bits: bool) -> dict[str, Any]:
    """Returns running means of zero for one rank's rows."""
    dtype = torch.uint8 if in_8_bits else torch.float32
    means = {f"state{i}": torch.zeros_like(rows, dtype=dtype) for i in (1, 2)}
    if not in_8_bits:
        return {"step": 0, **means}
    num_blocks = -(-rows.numel() // BLOCK_SIZE)
    scales = {f"absmax{i}": torch.zeros(num_blocks, device=rows.device) for i in (1, 2)}
    return {"step": 0, **means, **scales}


_MAPS: dict[tuple[torch.device, bool], Tensor] = {}


def code_map(device: torch.device, *, signed: bool) -> Tensor:
    """Returns the 256 values of an 8-bit mean; the mean of squares has no sign."""
    if (device, signed) not in _MAPS:
        _MAPS[device, signed] = bnb.create_dynamic_map(signed=signed).to(device)
    return _MAPS[device, signed]


def quantize_means(means: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Returns the codes of running means, uint8, and the scale of every block of them, fp32.

    Args:
        means: fp32, ``(means,)``.
        signed: False for means of squares.
    """
    qmap = code_map(means.device, signed=signed)
    codes, state = bnb.quantize_blockwise(means, code=qmap, blocksize=BLOCK_SIZE)
    return codes, state.absmax


def build_adamw_8bit(
    options: AdamW8bitOptions, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Returns bitsandbytes' 8-bit AdamW over ``parameters``."""
    return AdamW8bit(
        lora_plus_groups(parameters, lr=options.lr, ratio=options.lora_plus_ratio),
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
