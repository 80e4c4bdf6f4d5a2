"""Muon: momentum, made orthogonal matrix by matrix (https://kellerjordan.github.io/posts/muon/).

The numbers are those of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` of torch 2.13, which
takes whole matrices: on sharded ones its Newton-Schulz steps would be a chain of small collectives.
Here momentum stays sharded; the update is gathered once per matrix, in bf16 as the iteration reads
it, every rank iterates, and keeps its own rows.

Muon is for the matrices of hidden layers. Vectors, embedding and head are updated by AdamW with the
same learning rate, which ``match_rms_adamw`` (https://arxiv.org/abs/2502.16982) makes fit both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fsdpq.dist import own_shard
from fsdpq.recipe.sections.optimizer import MuonOptions

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
TINY = 1e-7
"""Least norm that an update is divided by. All three as in ``torch.optim.Muon``."""


class Muon(torch.optim.Optimizer):
    """Muon over matrices and AdamW over the rest; parameters may be DTensors of FSDP2.

    Args:
        matrices: of hidden layers, of two dimensions.
        others: updated by AdamW.
        options: of the recipe.
    """

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], options: MuonOptions
    ) -> None:
        both = [{"params": matrices, "is_muon": True}, {"params": others, "is_muon": False}]
        super().__init__(
            [group for group in both if group["params"]],
            {
                "lr": options.lr,
                "weight_decay": options.weight_decay,
                "momentum": options.momentum,
                "nesterov": options.nesterov,
                "betas": options.betas,
                "eps": options.eps,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient, in place.

        Ranks: all (collective).
        Memory: one whole matrix in bf16, four times.
        """
        loss = None if closure is None else closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not group["is_muon"]:
                self._update_others(trained, group)
                continue
            for parameter in trained:
                self._update_matrix(parameter, group)
        return loss

    def _update_matrix(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        shard, mean = own_shard(parameter), own_shard(state["momentum_buffer"]).rows
        gradient = own_shard(parameter.grad).rows  # pyright: ignore[reportArgumentType]
        mean.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
        whole = orthogonalize(shard.gather(update.bfloat16(), parameter.shape[0]))
        shard.rows.mul_(1 - group["lr"] * group["weight_decay"])
        factor = 0.2 * math.sqrt(max(parameter.shape))
        shard.rows.add_(whole[shard.start : shard.stop], alpha=-group["lr"] * factor)

    def _update_others(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros((), device=own_shard(parameter).rows.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [own_shard(p).rows for p in parameters],
            [own_shard(p.grad).rows for p in parameters],  # pyright: ignore[reportArgumentType]
            [own_shard(state["exp_avg"]).rows for state in states],
            [own_shard(state["exp_avg_sq"]).rows for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrix: Tensor) -> Tensor:
    """Returns the matrix with its singular values moved close to 1, bf16.

    Args:
        matrix: ``(rows, columns)``, bf16; not changed.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=TINY)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def build_muon(
    options: MuonOptions, parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Returns Muon over the matrices of hidden layers, AdamW over all other ``parameters``."""
    matrices = [p for name, p in parameters.items() if _is_hidden(name, p)]
    others = [p for name, p in parameters.items() if not _is_hidden(name, p)]
    return Muon(matrices, others, options)


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether a matrix is inside the numbered layers, where no embedding or head is."""
    return parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))
