"""A decoder layer as operations: attention, then a feed-forward, each beside a residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsdpq.plan.device.attention import Attention, attend
from fsdpq.plan.device.experts import Experts, mix
from fsdpq.plan.device.operations import (
    FP32_BYTES,
    Linear,
    Norm,
    Sizes,
    activate,
    linear,
    norm,
    rotary,
)
from fsdpq.plan.device.tape import Block, Tape, Tensor

Layout = Literal["before", "after", "both", "parallel"]


@dataclass(frozen=True)
class Layer:
    """A decoder layer under a recipe, and the tokens that it sees.

    Attributes:
        tokens: of a chunk of a micro-batch.
        hidden_size: width of the residual stream.
        sizes: bytes of an element.
        attention: sizes of queries, keys and values, and how they meet.
        entering: linear layers before attention, in order; one where they are fused.
        leaving: the linear layer behind attention.
        into: linear layers into the feed-forward, in order.
        out_of: the linear layer out of it, None where experts are all there is.
        gated: it multiplies two projections.
        experts: of a mixture, None where there is none.
        norm: over the hidden size.
        layout: where norms are: ``before`` attention and feed-forward, ``after`` them, ``both``, or
            ``parallel``: one norm before both, which run beside each other; or two, one for each.
        shares_norm: with ``parallel``, it is one norm.
        composed_gelu: its activation is of several operations.
        qk_norm: over queries and keys, None where they are not normed.
    """

    tokens: int
    hidden_size: int
    sizes: Sizes
    attention: Attention
    entering: tuple[Linear, ...]
    leaving: Linear
    into: tuple[Linear, ...]
    out_of: Linear | None
    gated: bool
    experts: Experts | None
    norm: Norm
    layout: Layout
    shares_norm: bool
    composed_gelu: bool
    qk_norm: Norm | None

    @property
    def hidden_bytes(self) -> int:
        """Bytes of its input."""
        return self.tokens * self.hidden_size * self.sizes.hidden

    @property
    def keeps_input(self) -> bool:
        """Whether its graph keeps its input as it is; a norm by operations casts to fp32 first."""
        first_casts = self.norm.kind != "layer" and self.sizes.hidden != FP32_BYTES
        return self.layout == "after" or not first_casts

    def normed(self, tape: Tape, x: Tensor) -> Tensor:
        """Returns ``x`` normed over the hidden size."""
        return norm(tape, x, self.norm, hidden=self.sizes.hidden)

    def project(self, tape: Tape, x: Tensor, layer: Linear) -> Tensor:
        """Returns the output of one of its linear layers."""
        return linear(tape, x, layer, tokens=self.tokens, sizes=self.sizes)

    def run(self, tape: Tape, x: Tensor) -> Tensor:
        """Does its operations."""
        if self.layout == "parallel":
            return self._run_parallel(tape, x)
        between = self._residual(tape, x, self._attention)
        output = self._residual(tape, between, self._feed_forward)
        tape.drop(between)
        return output

    def _residual(self, tape: Tape, x: Tensor, block: Block) -> Tensor:
        """Returns ``x`` and what ``block`` makes of it."""
        normed = tape.view(x) if self.layout == "after" else self.normed(tape, x)
        result = block(tape, normed)
        tape.drop(normed)
        if self.layout in ("after", "both"):
            plain, result = result, self.normed(tape, result)
            tape.drop(plain)
        output = tape.run(self.hidden_bytes, "recomputed", handed=[x, result])
        tape.drop(result)
        return output

    def _run_parallel(self, tape: Tape, x: Tensor) -> Tensor:
        normed = self.normed(tape, x)
        attended = self._attention(tape, normed)
        if not self.shares_norm:
            tape.drop(normed)
            normed = self.normed(tape, x)
        fed = self._feed_forward(tape, normed)
        tape.drop(normed)
        total = tape.run(self.hidden_bytes, "recomputed", handed=[attended, fed])
        tape.drop(attended, fed)
        output = tape.run(self.hidden_bytes, "recomputed", handed=[total, x])
        tape.drop(total)
        return output

    def _attention(self, tape: Tape, x: Tensor) -> Tensor:
        size = self.attention
        wanted = (size.query_bytes, size.key_bytes, size.key_bytes)
        projected = [self.project(tape, x, layer) for layer in self.entering]
        if len(projected) == len(wanted):
            query, key, value = projected
        else:
            query, key, value = (tape.part(projected[0], num_bytes) for num_bytes in wanted)
            tape.drop(projected[0])
        if self.qk_norm is not None:
            plain = (query, key)
            query, key = (
                norm(tape, tensor, self.qk_norm, hidden=self.sizes.compute) for tensor in plain
            )
            tape.drop(*plain)
        turned = [rotary(tape, query), rotary(tape, key)]
        tape.drop(query, key)
        result = attend(tape, turned[0], turned[1], value, size)
        output = self.project(tape, result, self.leaving)
        tape.drop(result, *turned, value)
        return output

    def _feed_forward(self, tape: Tape, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        if self.experts is not None:
            outputs.append(mix(tape, x, self.experts, tokens=self.tokens, sizes=self.sizes))
        if self.out_of is not None:
            outputs.append(self._dense(tape, x, self.out_of))
        if len(outputs) == 1:
            return outputs[0]
        total = tape.run(self.hidden_bytes, "recomputed", handed=outputs)
        tape.drop(*outputs)
        return total

    def _dense(self, tape: Tape, x: Tensor, out_of: Linear) -> Tensor:
        num_bytes = self.tokens * out_of.in_features * self.sizes.compute
        first = self.project(tape, x, self.into[0])
        if self.gated and len(self.into) == 1:
            both = first
            first, second = (tape.part(both, num_bytes) for _ in range(2))
            tape.drop(both)
            active = activate(tape, first, composed=False)
        else:
            active = activate(tape, first, composed=self.composed_gelu)
            second = self.project(tape, x, self.into[1]) if self.gated else None
        inner = active
        if second is not None:
            inner = tape.run(num_bytes, "recomputed", [active, second], saves=[active, second])
            tape.drop(active, second)
        output = self.project(tape, inner, out_of)
        tape.drop(inner)
        return output
