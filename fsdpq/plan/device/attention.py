"""Attention of queries, keys and values: what its kernels make and keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsdpq.plan.device.tape import Tape, Tensor

Kernel = Literal["flash", "flash_cpu", "eager", "flex", "masked"]
"""``flash`` stands for kernels that never hold the scores: torch's flash kernel on CUDA for one.
``masked`` is torch's ``sdpa`` with a mask, whose kernels repeat keys and values."""


@dataclass(frozen=True)
class Attention:
    """Attention of a chunk of rows.

    Attributes:
        kernel: what computes it.
        rows: of the chunk.
        seq_len: tokens of a row.
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: of each.
        element: bytes of one.
        softcap: scores of ``eager`` are capped.
    """

    kernel: Kernel
    rows: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    softcap: bool

    @property
    def tokens(self) -> int:
        """Tokens of the chunk."""
        return self.rows * self.seq_len

    @property
    def query_bytes(self) -> int:
        """Bytes of the queries."""
        return self.tokens * self.heads * self.head_dim * self.element

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys, and of the values."""
        return self.tokens * self.kv_heads * self.head_dim * self.element

    @property
    def statistics_bytes(self) -> int:
        """Bytes of one fp32 number for each query."""
        return self.tokens * self.heads * 4

    @property
    def score_elements(self) -> int:
        """Pairs of queries and keys, over all heads."""
        return self.rows * self.heads * self.seq_len**2


def attend(tape: Tape, query: Tensor, key: Tensor, value: Tensor, size: Attention) -> Tensor:
    """Returns the result, as large as the queries; the caller still holds all three."""
    if size.kernel == "eager":
        return _eager(tape, query, key, value, size)
    if size.kernel == "masked":
        return _masked(tape, query, key, value, size)
    return _fused(tape, [query, key, value], size)


def _fused(tape: Tape, tensors: list[Tensor], size: Attention) -> Tensor:
    """A kernel that never holds the scores."""
    return tape.run(
        size.query_bytes,
        "attention",
        tensors,
        saves=tensors,
        saves_output=True,
        saves_bytes=size.statistics_bytes,
        backward=("attention", _backward_bytes(size)),
    )


def _masked(tape: Tape, query: Tensor, key: Tensor, value: Tensor, size: Attention) -> Tensor:
    """With a mask: each layer makes numbers of it, and keys and values are repeated before."""
    mask = tape.run(size.rows * size.seq_len**2 * size.element, "attention")
    if size.heads > size.kv_heads:
        key, value = (_repeat(tape, tensor, size) for tensor in (key, value))
    else:
        key, value = tape.view(key), tape.view(value)
    output = _fused(tape, [query, key, value, mask], size)
    tape.drop(key, value, mask)
    return output


def _backward_bytes(size: Attention) -> int:
    """Returns what the kernel's backward takes beside the three gradients."""
    if size.kernel == "flash_cpu":
        return 0
    # fp32 sums of the gradients of queries, one number for each query, and keys and values of all
    # heads where fewer share them (torch 2.13, aten/.../flash_attn/flash_api.cpp, `mha_bwd`).
    sums = size.query_bytes // size.element * 4 + size.statistics_bytes
    shared = 2 * size.query_bytes if size.heads > size.kv_heads else 0
    return sums + shared


def _repeat(tape: Tape, x: Tensor, size: Attention) -> Tensor:
    return tape.run(size.query_bytes, "attention", [x])


def _eager(tape: Tape, query: Tensor, key: Tensor, value: Tensor, size: Attention) -> Tensor:
    """Every score exists: in the dtype of the products, and in fp32."""
    narrow, wide = size.score_elements * size.element, size.score_elements * 4
    if size.heads > size.kv_heads:
        key, value = (_repeat(tape, tensor, size) for tensor in (key, value))
    else:
        key, value = tape.view(key), tape.view(value)
    products = tape.run(narrow, "attention", [query, key], saves=[query, key])
    scaled = tape.run(narrow, "attention", [products])
    tape.drop(products)
    if size.softcap:
        divided = tape.run(narrow, "attention", [scaled])
        bent = tape.run(narrow, "attention", [divided], saves_output=True)
        tape.drop(scaled, divided)
        scaled = tape.run(narrow, "attention", [bent])
        tape.drop(bent)
    masked = tape.run(narrow, "attention", handed=[scaled])
    tape.drop(scaled)
    scores = masked
    if size.element != 4:  # a copy, also on a GPU: its softmax from 16 bits to 32 is one for fp16
        scores = tape.run(wide, "attention", [masked])
    shares = tape.run(wide, "attention", [scores], saves_output=True)
    if scores is not masked:
        tape.drop(scores)
    rounded = tape.view(shares)
    if size.element != 4:
        tape.drop(rounded)
        rounded = tape.run(narrow, "attention", [shares])
    tape.drop(shares, masked)
    output = tape.run(size.query_bytes, "attention", [rounded, value], saves=[rounded, value])
    tape.drop(rounded, key, value)
    return output
