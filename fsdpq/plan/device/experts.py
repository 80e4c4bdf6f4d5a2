"""A mixture of experts as operations: every token sees several of them.

Tokens are taken to be spread evenly, so an expert has as many as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.plan.device.operations import FROZEN, Sizes
from fsdpq.plan.device.tape import Tape, Tensor


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        count: of them.
        per_token: of them that see a token.
        hidden_size: of their input and output.
        intermediate_size: of one.
        matrix_bytes: of the largest matrix of one that is dequantized, 0 where none is.
        unpacking_bytes: the most that exists while it is made.
        trained_bytes: of the gradients of all of them, 0 where they are frozen.
    """

    count: int
    per_token: int
    hidden_size: int
    intermediate_size: int
    matrix_bytes: int = 0
    unpacking_bytes: int = 0
    trained_bytes: int = 0


def mix(tape: Tape, x: Tensor, experts: Experts, *, tokens: int, sizes: Sizes) -> Tensor:
    """Returns the weighted sum of the chosen experts' outputs; the caller still holds ``x``."""
    size = sizes.compute
    routed = tokens * experts.per_token
    wide, inner = routed * experts.hidden_size * size, routed * experts.intermediate_size * size
    scores = tape.run(tokens * experts.count * 4, "recomputed", [x], saves=[FROZEN])
    pieces = tape.run(wide, "recomputed", [x])
    both = _product(tape, pieces, 2 * inner, experts)
    gate, up = (tape.part(both, inner) for _ in range(2))
    tape.drop(both)
    active = tape.run(inner, "recomputed", [gate], saves=[gate])
    gated = tape.run(inner, "recomputed", [active, up], saves=[active, up])
    tape.drop(gate, active, up)
    outputs = _product(tape, gated, wide, experts)
    tape.drop(gated)
    joined = tape.run(wide, "recomputed", handed=[outputs])
    by_choice = tape.run(wide, "recomputed", [joined])
    tape.drop(joined)
    weighted = tape.run(wide, "recomputed", [by_choice], saves=[by_choice])
    total = tape.run(tokens * experts.hidden_size * sizes.hidden, "recomputed", [weighted])
    tape.drop(weighted, by_choice, outputs, pieces, scores)
    return total


def _product(tape: Tape, x: Tensor, num_bytes: int, experts: Experts) -> Tensor:
    """Returns the outputs of one matrix of every expert, which exist one matrix at a time."""
    matrix = ("dequantized", max(experts.matrix_bytes, experts.unpacking_bytes))
    return tape.run(num_bytes, "recomputed", [x], beside=matrix, backward=matrix)
