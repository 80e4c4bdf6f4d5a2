"""What the tensors of a decoder layer say of how it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.config_facts import size_of
from fsdpq.plan.shapes.experts import is_stack

RESIDUAL_ENDINGS = (
    "o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "c_proj", "wo",
    "w2",
)  # fmt: skip
"""Last parts of the names of linear layers that write to the residual stream."""

GATE_PARTS = ("gate_proj", "gate_up", ".w3.")
"""In the names of what a gated feed-forward has."""

Tensors = Mapping[str, tuple[int, ...]]


def with_layer_facts(shape: ModelShape, text: Mapping[str, Any]) -> ModelShape:
    """Returns ``shape`` with what its config and the tensors of its layers say.

    Args:
        shape: with its groups and sizes of attention.
        text: the part of the config that is about the language model.
    """
    hidden = shape.hidden_size
    tensors = {t.name: t.shape for group in shape.layers for t in group.tensors}
    first = next(shape.layers)
    norms = [t.name for t in first.tensors if t.shape == (hidden,) and t.name.endswith(".weight")]
    return dataclasses.replace(
        shape,
        intermediate_size=size_of(text, "intermediate_size") or _widest(tensors, hidden),
        gated=any(part in name for name in tensors for part in GATE_PARTS),
        layer_norms=sum(not n.endswith(("q_norm.weight", "k_norm.weight")) for n in norms),
        qk_norm=_qk_norm(tensors, shape.head_dim),
        softcap=bool(text.get("final_logit_softcapping")),
        residual_linears=tuple(_residual_linears(tensors, hidden)),
        **_expert_sizes(tensors, text, hidden),
    )


def _expert_sizes(tensors: Tensors, text: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    for name, shape in tensors.items():
        if is_stack(name, shape) and name.endswith("down_proj"):
            return {
                "num_experts": shape[0],
                "num_experts_per_tok": size_of(text, "num_experts_per_tok") or 1,
                "moe_intermediate_size": shape[2] if shape[1] == hidden else shape[1],
            }
    return {}


def _widest(tensors: Tensors, hidden: int) -> int:
    """Returns the inputs of the widest matrix that gives the hidden size."""
    return max((s[1] for s in tensors.values() if len(s) == 2 and s[0] == hidden), default=0)


def _qk_norm(tensors: Tensors, head_dim: int) -> Literal["none", "head", "full"]:
    for name, shape in tensors.items():
        if name.endswith(("q_norm.weight", "query_layernorm.weight")):
            return "head" if shape == (head_dim,) else "full"
    return "none"


def _residual_linears(tensors: Tensors, hidden: int) -> list[str]:
    names = [
        n.removesuffix(".weight") for n, s in tensors.items() if len(s) == 2 and s[0] == hidden
    ]
    return [name for name in names if name.rpartition(".")[2] in RESIDUAL_ENDINGS]
