"""What flash-attn 2 computes, in plain torch: its functions, by its signatures.

https://github.com/Dao-AILab/flash-attention, ``flash_attn/flash_attn_interface.py``, 2.8. With it
transformers' own code decides what its kernels are told, on a machine without a GPU.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import modeling_flash_attention_utils as transformers_flash


class FakeFlashAttention:
    """Stands in for the package.

    Attributes:
        calls: names of the functions that were called.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """``flash_attn_func``: ``(rows, tokens, heads, head_dim)``."""
        assert dropout_p == softcap == 0.0
        assert causal
        self.calls.append("dense")
        return _attend(q, k, v, softmax_scale, window_size[0])

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """``flash_attn_varlen_func``: ``(tokens, heads, head_dim)`` of all documents."""
        assert dropout_p == softcap == 0.0
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == q.shape[0]
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
        assert max(sizes) == int(max_seqlen_q) == int(max_seqlen_k)
        self.calls.append("varlen")
        parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        window = window_size[0]
        return torch.cat([_attend(*(x[None] for x in p), softmax_scale, window)[0] for p in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, left: int) -> Tensor:
    """Causal attention of ``(rows, tokens, heads, head_dim)``; -1 sees all tokens before."""
    places = torch.arange(q.shape[1])
    distance = places[:, None] - places[None, :]
    seen = (distance >= 0) & ((distance <= left) | (left < 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def install_fake_flash_attention(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention:
    """Makes transformers find the stand-in as ``flash_attn``, until the test ends."""
    fake = FakeFlashAttention()
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    functions: dict[str, Any] = {
        "flash_attn_func": fake.dense,
        "flash_attn_varlen_func": fake.varlen,
        "flash_attn_with_kvcache": None,
    }
    vars(package).update(functions)
    vars(padding).update({"pad_input": None, "unpad_input": None})
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(transformers_flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(transformers_flash, "_loaded_implementation", None)
    known = transformers_flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(known, "general_availability_check", lambda: True)
    return fake
