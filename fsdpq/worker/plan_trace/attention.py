"""What attention's kernels on a GPU allocate, as fake tensors see it.

transformers asks tensors for values to choose a mask, and a fake tensor has none. So a traced model
gets an attention of its own by transformers' registry, which takes the path that a GPU takes:
torch's flash kernel where there is no mask, else the memory-efficient one with repeated keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "fsdpq_trace"
ROWS_OF_BLOCK = 128
"""The flash kernel rounds rows up to it."""


class _Flash(torch.autograd.Function):
    """Memory of torch's flash kernel (torch 2.13, aten/.../flash_attn/flash_api.cpp).

    Tensors are ``(rows, heads, tokens, head_dim)``, tokens before heads in memory.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = torch.empty_like(query)
        log_sums = query.new_empty((rows, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        rows, heads, tokens, head_dim = query.shape
        rounded = -(-tokens // ROWS_OF_BLOCK) * ROWS_OF_BLOCK
        width = -(-head_dim // 32) * 32 if head_dim <= 192 else 256
        grads = [torch.empty_like(x) for x in (query, key, value)]
        # Where heads share keys: one gradient a head of queries, summed afterwards.
        shared = 2 if key.shape[1] != heads else 0
        expanded = [query.new_empty(rows, tokens, heads, head_dim) for _ in range(shared)]
        row_sums = query.new_empty((rows, heads, rounded), dtype=torch.float32)
        sums = query.new_empty((rows, rounded, heads, width), dtype=torch.float32)
        del expanded, row_sums, sums, grad_out
        return grads[0], grads[1], grads[2]


def _repeat(x: Tensor, times: int) -> Tensor:
    rows, heads, tokens, head_dim = x.shape
    if times == 1:
        return x
    spread = x[:, :, None].expand(rows, heads, times, tokens, head_dim)
    return spread.reshape(rows, heads * times, tokens, head_dim)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Returns ``(rows, tokens, heads, head_dim)`` and None, as transformers' ``sdpa`` does."""
    del options
    if query.device.type == "cpu":
        shared = query.shape[1] != key.shape[1]
        if attention_mask is not None and shared:
            key, value = (_repeat(x, query.shape[1] // key.shape[1]) for x in (key, value))
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling,
            is_causal=attention_mask is None, enable_gqa=attention_mask is None and shared,
        )  # fmt: skip
    elif attention_mask is None:
        out = _Flash.apply(query, key, value)
    else:
        times = query.shape[1] // key.shape[1]
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, _repeat(key, times), _repeat(value, times),
            bias.expand(-1, query.shape[1], -1, -1), module.training, dropout, False,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None  # pyright: ignore[reportOptionalMemberAccess]


def mask_of(*, q_length: int, local_size: int | None = None, **options: Any) -> Tensor | None:
    """Returns the mask of a window that is shorter than the row, ``(1, 1, tokens, tokens)``."""
    if local_size is None or q_length <= local_size:
        return None
    return torch.ones(1, 1, q_length, q_length, dtype=torch.bool, device=options.get("device"))


def register_attention() -> None:
    """Makes `NAME` an ``attn_implementation`` of this process."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask_of)
