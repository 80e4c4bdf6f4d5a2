"""The last norm and the loss, which computes its gradients in forward, in chunks of logits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fsdpq.plan.device.operations import FP32_BYTES, FROZEN, Norm, norm
from fsdpq.plan.device.tape import Parts, Tape, Tensor, peak_of, sum_of

MAX_CHUNK_LOGITS = 1 << 25
"""Logits that exist at once on a GPU (`fsdpq.model.chunked_loss`; a test compares)."""

MAX_CHUNK_LOGITS_CPU = 1 << 23


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch.

    Attributes:
        tokens: of it; all but one of each row carry loss.
        rows: of it.
        hidden_size: width of the residual stream.
        vocab_size: of the head.
        element: bytes of an element of hidden states and of the head.
        softcap: logits are capped.
        trained_bytes: of the gradient of the head as it is gathered, 0 where it is frozen.
        on_cpu: chunks are those of a CPU.
        norm: the last one.
    """

    tokens: int
    rows: int
    hidden_size: int
    vocab_size: int
    element: int
    softcap: bool
    trained_bytes: int
    on_cpu: bool
    norm: Norm

    @property
    def targets(self) -> int:
        """Positions that carry loss."""
        return self.tokens - self.rows

    @property
    def head_elements(self) -> int:
        """Weights of a trained head."""
        return self.vocab_size * self.hidden_size if self.trained_bytes else 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk's logits and of what becomes of them, at the most."""
        most = MAX_CHUNK_LOGITS_CPU if self.on_cpu else MAX_CHUNK_LOGITS
        logits = min(self.targets, max(1, most // self.vocab_size)) * self.vocab_size
        in_forward = logits * (12 if self.softcap else 8)
        is_narrow = self.element != FP32_BYTES
        # A trained head: logits in fp32 and rounded, their product, and on a CPU its copy.
        product = self.element + (FP32_BYTES if is_narrow and self.on_cpu else 0)
        rounded = self.element if is_narrow else 0
        for_head = logits * (FP32_BYTES + rounded) + self.head_elements * product
        return max(in_forward, for_head if self.trained_bytes else 0)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the hidden states of these positions."""
        return self.targets * self.hidden_size * self.element

    @property
    def computing_bytes(self) -> int:
        """Bytes that computing the loss takes at the most, gradients included."""
        return self.kept_bytes + self.head_elements * FP32_BYTES + self.chunk_bytes


@functools.lru_cache(maxsize=64)
def loss_passes(loss: Loss) -> tuple[Parts, Parts]:
    """Returns what forward and backward hold at the most, the last layer's output included."""
    hidden = loss.tokens * loss.hidden_size * loss.element
    tape = Tape()
    output = tape.hold(hidden, "loss", needs_grad=True)
    normed = norm(tape, output, loss.norm, hidden=loss.element)
    tape.drop(output)
    kept_bytes = loss.kept_bytes
    kept = tape.run(kept_bytes, "loss", [normed])
    head = Tensor(loss.trained_bytes, "gradients", needs_grad=loss.trained_bytes > 0)
    sums = loss.head_elements * FP32_BYTES
    total = tape.run(
        0,
        "loss",
        [kept, head],
        saves=[FROZEN],
        saves_bytes=kept_bytes + sums,
        beside=("loss", loss.computing_bytes),
        backward=("loss", sums),
    )
    tape.drop(kept, normed)
    forward, tape.events = tape.events, []
    total.grad = tape.hold(0, "loss").storage
    tape.backward(tape.nodes)
    left = list(sum_of(forward).items())
    return _as_loss(peak_of(forward)), _as_loss(peak_of([*left, *tape.events]))


def _as_loss(parts: Parts) -> Parts:
    """Returns the same, the work of the last norm counted as the loss's."""
    gradients = parts.get("gradients", 0)
    return {"loss": sum(parts.values()) - gradients, "gradients": gradients}
