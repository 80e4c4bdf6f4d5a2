"""The load-balancing loss of a mixture's routers, as transformers computes it.

It is ``experts * sum_e f_e * P_e``, with ``f_e`` the share of (token, choice) pairs that went to an
expert and ``P_e`` its mean probability, both over the tokens of all layers (Switch Transformer,
https://arxiv.org/abs/2101.03961, equations 4 to 6); balanced routers give ``top_k``. transformers
adds it in the forward of its ``*ForCausalLM`` classes, which we do not call, with a function that
each family's file holds. It is called here, so a family has the loss where transformers has it.

The router's logits are recorded by transformers' hooks in forward alone: recomputing a layer in
backward records nothing. They stay until backward, two bytes a token, expert and layer in bf16.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError

FUNCTION = "load_balancing_loss_func"
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Doge's function has more: it chooses experts by two halves of a key."""


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of one model.

    Attributes:
        function: the family's, of transformers.
        num_experts: of each mixture.
        top_k: experts of a token.
        coefficient: the factor on it in the training loss, at least 0.
    """

    function: Callable[..., Any]
    num_experts: int
    top_k: int
    coefficient: float

    def __call__(self, router_logits: Sequence[Tensor], is_token: Tensor) -> Tensor:
        """Returns the loss of a micro-batch, without the coefficient, fp32, a scalar.

        Args:
            router_logits: ``(tokens, experts)`` of every layer in order, or of every chunk of rows
                of every layer.
            is_token: False at padding, ``(rows, tokens)``, bool; one token at least is none.
        """
        layers = tuple(_join_chunks(router_logits, is_token.numel()))
        return self.function(layers, self.num_experts, self.top_k, is_token)


def _join_chunks(router_logits: Sequence[Tensor], num_rows: int) -> Iterator[Tensor]:
    """Yields the logits of each layer, ``(num_rows, experts)``: chunks of a layer follow it."""
    chunks: list[Tensor] = []
    for logits in router_logits:
        chunks.append(logits.reshape(-1, logits.shape[-1]))
        if sum(chunk.shape[0] for chunk in chunks) == num_rows:
            yield chunks[0] if len(chunks) == 1 else torch.cat(chunks)
            chunks = []
    if chunks:
        raise RuntimeError(f"router logits of {len(router_logits)} chunks are no whole layers")


def build_router_loss(hf: PreTrainedModel, coefficient: float | None) -> RouterLoss | None:
    """Returns the model's load-balancing loss, None where it has none or it is off.

    Args:
        hf: the transformers model.
        coefficient: of the recipe; None for what the model's config says, which is 0 unless it
            sets ``output_router_logits``.

    Raises:
        CheckpointError: a coefficient is given, and transformers has no such loss for the model.
    """
    found = _find_router_loss(hf)
    if found is None and coefficient:
        raise CheckpointError(
            f"`training.router_aux_loss_coef: {coefficient:g}`: transformers has no load-balancing "
            f"loss for `{type(hf).__name__}`",
            hint="delete `training.router_aux_loss_coef`",
        )
    if found is None or coefficient == 0:
        return None
    if coefficient is None:
        return found if found.coefficient and _asks_for_it(hf) else None
    return RouterLoss(found.function, found.num_experts, found.top_k, coefficient)


def _find_router_loss(hf: PreTrainedModel) -> RouterLoss | None:
    """Returns the loss with the coefficient of the model's config, None where it has no routers."""
    function = getattr(sys.modules[type(hf).__module__], FUNCTION, None)
    model: Any = hf
    # Granite's hybrids may be dense; MoE classes keep these numbers for their own forward.
    num_experts, top_k = getattr(hf, "num_experts", 0), getattr(hf, "num_experts_per_tok", 0)
    if function is None or not num_experts or not top_k:
        return None
    if list(inspect.signature(function).parameters) != ARGUMENTS:
        return None
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the second is JetMoe's
    coefficient = next((getattr(model, name) for name in names if hasattr(model, name)), 0.0)
    return RouterLoss(function, int(num_experts), int(top_k), float(coefficient))


def _asks_for_it(hf: PreTrainedModel) -> bool:
    return bool(getattr(hf.config, "output_router_logits", False))
