"""The passes of a block of operations: without a graph, with one, and computed again."""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.plan.device.tape import Block, Event, Parts, Tape, Tensor, peak_of, sum_of


@dataclass(frozen=True)
class Passes:
    """What one decoder layer holds beside its input, in each way to run it.

    Attributes:
        plain: at the most in a forward without a graph, its output included.
        graph: at the most in a forward with a graph, its output included.
        kept: after a forward with a graph, its output left out.
        backward: at the most in the backward of that graph: the graph, and the gradients of its
            output, of its input and of its Parameters.
        again: the same where backward computes the layer again first.
        gradients: bytes of the gradients of its Parameters.
    """

    plain: Parts
    graph: Parts
    kept: Parts
    backward: Parts
    again: Parts
    gradients: int


def passes_of(block: Block, *, hidden_bytes: int) -> Passes:
    """Returns the passes of ``block``, something below which is trained.

    Where nothing is, as below the first layer, backward leaves out the gradient of the input, and
    the layer after it holds more.

    Args:
        block: the operations of a layer.
        hidden_bytes: of its input and of its output.
    """
    plain = Tape(records=False)
    block(plain, Tensor(hidden_bytes, "recomputed"))
    tape = Tape()
    output = block(tape, Tensor(hidden_bytes, "recomputed", needs_grad=True))
    with_output = list(tape.events)
    tape.drop(output)
    graph, tape.events = tape.events, []
    asking = max((index for index, node in enumerate(tape.nodes) if node.asks), default=-1)
    output.grad = tape.hold(hidden_bytes, "recomputed").storage
    tape.backward(tape.nodes[asking + 1 :])
    before, tape.events = tape.events, []
    tape.backward(tape.nodes[: asking + 1])
    after = tape.events
    kept = sum_of(graph)
    return Passes(
        plain=peak_of(plain.events),
        graph=peak_of(with_output),
        kept=kept,
        backward=peak_of([*kept.items(), *before, *after]),
        again=peak_of([*before, *_stopped(graph, tape.last_save), *after]),
        gradients=sum_of([*graph, *before, *after]).get("gradients", 0),
    )


def _stopped(graph: list[Event], last_save: int) -> list[Event]:
    """Returns a forward that ends where it saves for the last time; names go away there."""
    return [*graph[:last_save], *sum_of(graph[last_save:]).items()]
