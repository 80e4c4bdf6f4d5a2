"""Experts of a mixture whose weights live as packed bytes.

transformers keeps all experts of a layer as two parameters of three dimensions, ``gate_up_proj``
``(experts, 2 * intermediate, hidden)`` and ``down_proj`` ``(experts, hidden, intermediate)``; some
families keep both transposed, and a bias for each (gpt-oss). Here each is one matrix, the experts
stacked on top of each other as the parameter lies in memory, packed by the quantizer as any other
matrix and sharded by rows: the reference is the library's quantization of that stacked matrix.
Biases stay as they are.

Tokens are sorted by expert, and only experts that tokens chose are dequantized, one at a time, once
in forward and once in backward; autograd keeps the packed Parameters and activations only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsdpq.model.quantized_linear import PackedMatrix, dequantized_product
from fsdpq.protocols import Quantizer

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""The parameters of an experts module of transformers that are replaced."""

_LAYOUT = ("is_transposed", "has_bias", "has_post_expert_norm")
"""What transformers' ``use_experts_implementation`` says of the module; the last is not done."""


@dataclass(frozen=True)
class _ExpertRows:
    """The rows of one expert in a stack, as `fsdpq.model.quantized_linear.Dequantizer`."""

    stack: PackedExperts
    expert: int

    def dequantize(self, packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        stack = self.stack
        start = self.expert * stack.rows_per_expert
        if stack.kept is not None and stack.kept.dtype == dtype:
            kept = stack.kept[start : start + stack.rows_per_expert]
            return kept.T if stack.is_transposed else kept
        rows = stack.quantizer.dequantize_rows(
            dict(zip(stack.packed_names, packed, strict=True)),
            (stack.out_features, stack.in_features),
            start,
            start + stack.rows_per_expert,
            dtype,
        )
        return rows.T if stack.is_transposed else rows


class PackedExperts(PackedMatrix):
    """One weight of all experts, stacked to a ``(experts * rows, columns)`` matrix.

    Args:
        weight: the parameter that it replaces, ``(experts, rows, columns)``.
        is_transposed: rows are inputs and columns outputs of an expert, not the other way round.
        quantizer: packs and unpacks the stacked matrix.
    """

    def __init__(self, weight: Tensor, *, is_transposed: bool, quantizer: Quantizer) -> None:
        num_experts, rows, columns = weight.shape
        super().__init__(num_experts * rows, columns, quantizer=quantizer, device=weight.device)
        self.rows_per_expert = rows
        self.is_transposed = is_transposed

    def product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        """Returns the expert's outputs for ``x`` ``(tokens, inputs)``, in the dtype of ``x``."""
        return dequantized_product(x, _ExpertRows(self, expert), bias, self.packed)


class QuantizedExperts(nn.Module):
    """Stands in for an experts module of transformers.

    Args:
        experts: the module it replaces; for its activation and gating.
        quantizer: packs and unpacks the weights.
    """

    def __init__(self, experts: nn.Module, *, quantizer: Quantizer) -> None:
        super().__init__()
        self.num_experts = int(experts.get_parameter("gate_up_proj").shape[0])
        transposed = bool(experts.is_transposed)
        for name in EXPERT_WEIGHTS:
            weight = experts.get_parameter(name)
            packed = PackedExperts(weight, is_transposed=transposed, quantizer=quantizer)
            setattr(self, name, packed)
            delattr(experts, name)
            bias = experts._parameters.pop(f"{name}_bias", None)
            self.register_parameter(f"{name}_bias", bias)
        self.gating = experts
        """What is left of the module: its activation, no weights."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of the chosen experts' outputs, ``(tokens, hidden)``.

        Sums over the experts of a token are made in the dtype of the weighted outputs, in the
        order of ``top_k_index``, as transformers' ``batched_mm`` and ``grouped_mm`` do.

        Args:
            hidden: ``(tokens, hidden)``.
            top_k_index: the experts of each token, ``(tokens, top_k)``, int64.
            top_k_weights: their weights, ``(tokens, top_k)``.
        """
        return self._run_experts(hidden, top_k_index, top_k_weights)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _run_experts(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Which experts run depends on values: a compiler would make graphs without end.
        num_tokens, top_k = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        pieces = hidden[order // top_k].split(counts)
        gating: Any = self.gating
        outputs: list[Tensor] = []
        for expert, piece in enumerate(pieces):
            if piece.shape[0]:
                inner = gating._apply_gate(self._product("gate_up_proj", piece, expert))
                outputs.append(self._product("down_proj", inner, expert))
        by_choice = torch.cat(outputs)[order.argsort()]
        weighted = by_choice * top_k_weights.reshape(-1, 1)
        return weighted.view(num_tokens, top_k, -1).sum(dim=1).to(hidden.dtype)

    def _product(self, name: str, x: Tensor, expert: int) -> Tensor:
        stack: PackedExperts = getattr(self, name)
        bias: Tensor | None = getattr(self, f"{name}_bias")
        return stack.product(x, expert, None if bias is None else bias[expert])


def named_experts(layers: nn.ModuleList) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yields every experts module inside the decoder layers that `QuantizedExperts` can replace.

    Yields:
        Its name below ``layers`` (``0.mlp.experts``), its parent, its attribute there, itself.
    """
    for parent_name, parent in list(layers.named_modules()):
        for attribute, child in list(parent.named_children()):
            if _is_replaceable(child):
                yield f"{parent_name}.{attribute}".lstrip("."), parent, attribute, child


def router_ids(layers: nn.ModuleList) -> set[int]:
    """Returns ``id()`` of every linear that chooses among experts.

    That is one beside an experts module, with as many outputs as there are experts. It is tiny and
    decides everything, families look into it (its dtype), and some inherit from ``nn.Linear`` to
    return several things (Phi-3.5-MoE), so it stays as it is. Most routers are no ``nn.Linear``.
    """
    return {
        id(linear)
        for block in layers.modules()
        for count in _numbers_of_experts(block)
        for linear in block.modules()
        if isinstance(linear, nn.Linear) and linear.out_features == count
    }


def _numbers_of_experts(block: nn.Module) -> set[int]:
    """Returns how many experts the experts modules right below ``block`` have."""
    counts: set[int] = set()
    for child in block.children():
        weights = (child._parameters.get(name) for name in EXPERT_WEIGHTS)
        counts |= {
            weight.shape[0] for weight in weights if weight is not None and weight.dim() == 3
        }
        counts |= {child.num_experts} if isinstance(child, QuantizedExperts) else set()
    return counts


def _is_replaceable(module: nn.Module) -> bool:
    weights = [module._parameters.get(name) for name in EXPERT_WEIGHTS]
    stacked = all(weight is not None and weight.dim() == 3 for weight in weights)
    if not stacked or not all(hasattr(module, name) for name in _LAYOUT):
        return False
    num_parameters = len(EXPERT_WEIGHTS) * (2 if module.has_bias else 1)
    return not module.has_post_expert_norm and len(module._parameters) == num_parameters
