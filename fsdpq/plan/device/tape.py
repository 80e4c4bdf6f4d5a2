"""Allocations of a sequence of operations, and of their backward: autograd in bytes.

An operation is what it allocates, what it keeps for backward, and what backward allocates for it.
Memory comes back as in torch: a tensor's when neither a name nor the graph holds it, a gradient's
when the operation that it belongs to has used it. So one description of a layer gives its forward
without a graph, its forward with one, its backward, and its recomputation in backward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fsdpq.plan.result import Category

Event = tuple[Category, int]
"""Bytes that a category gets (positive) or gives back."""

Parts = dict[Category, int]
"""Bytes by what they are for."""


class Storage:
    """Memory that several tensors may share.

    Attributes:
        num_bytes: of it.
        category: what it is counted as.
        holders: names, operations of the graph, and gradients.
    """

    __slots__ = ("category", "holders", "num_bytes")

    def __init__(self, num_bytes: int, category: Category) -> None:
        self.num_bytes = num_bytes
        self.category: Category = category
        self.holders = 1


class Tensor:
    """A tensor under a name.

    Attributes:
        num_bytes: of it, and of its gradient.
        category: of its gradient.
        storage: its memory; None where it is counted elsewhere, as weights are.
        needs_grad: backward computes its gradient.
        grad: while backward runs; a Parameter's stays.
    """

    __slots__ = ("category", "grad", "needs_grad", "num_bytes", "storage")

    def __init__(
        self,
        num_bytes: int,
        category: Category,
        storage: Storage | None = None,
        *,
        needs_grad: bool = False,
    ) -> None:
        self.num_bytes = num_bytes
        self.category: Category = category
        self.storage = storage
        self.needs_grad = needs_grad
        self.grad: Storage | None = None


@dataclass(slots=True, eq=False)
class Node:
    """An operation in the graph.

    Attributes:
        output: its result.
        inputs: get gradients of their own.
        handed: get the gradient of the output itself.
        saved: memory that it keeps for its backward.
        beside: bytes that its backward takes while it runs, and what they are for.
        asks: its backward asks for what it saved, weights included: then a checkpointed layer is
            computed again.
    """

    output: Tensor
    inputs: list[Tensor]
    handed: list[Tensor]
    saved: list[Storage]
    beside: Event
    asks: bool = False


@dataclass
class Tape:
    """Records operations.

    Attributes:
        records: operations are put into a graph.
        events: so far.
        nodes: the graph.
        last_save: number of events when something was last kept for backward. Computed again, a
            checkpointed layer stops there.
    """

    records: bool = True
    events: list[Event] = field(default_factory=list[Event])
    nodes: list[Node] = field(default_factory=list[Node])
    last_save: int = 0

    def hold(self, num_bytes: int, category: Category, *, needs_grad: bool = False) -> Tensor:
        """Returns a new tensor that no operation of the graph made."""
        return Tensor(num_bytes, category, self._take(num_bytes, category), needs_grad=needs_grad)

    def run(  # noqa: PLR0913 - each is a fact of an operation, given by name
        self,
        num_bytes: int,
        category: Category,
        inputs: Sequence[Tensor] = (),
        *,
        handed: Sequence[Tensor] = (),
        saves: Sequence[Tensor] = (),
        saves_output: bool = False,
        saves_bytes: int = 0,
        beside: Event = ("dequantized", 0),
        backward: Event = ("dequantized", 0),
    ) -> Tensor:
        """Does an operation whose result is new memory.

        Args:
            num_bytes: of its result.
            category: of its result.
            inputs: tensors that it reads; each gets a gradient of its own.
            handed: tensors that it reads; each gets the gradient of the result, as of a sum.
            saves: what backward needs of what it read.
            saves_output: backward needs the result.
            saves_bytes: what else it keeps for backward, such as statistics.
            beside: bytes that it takes while it runs, and what they are for.
            backward: the same of its backward, beside the gradients.
        """
        start = len(self.events)
        self.events.append(beside)
        output = Tensor(num_bytes, category, self._take(num_bytes, category))
        self.events.append((beside[0], -beside[1]))
        if not self._is_recorded(output, inputs, handed):
            return output
        kept = [tensor.storage for tensor in saves if tensor.storage is not None]
        if saves_output and output.storage is not None:
            kept.append(output.storage)
        for storage in kept:
            storage.holders += 1
        if saves_bytes:
            kept.append(self._take(saves_bytes, category))
        after = saves_output or saves_bytes > 0
        if after or saves:
            self.last_save = len(self.events) if after else start
        self._record(output, inputs, handed, kept, backward, asks=bool(after or saves))
        return output

    def view(self, source: Tensor) -> Tensor:
        """Returns the same memory under another name, as a cast to its own dtype does."""
        output = Tensor(source.num_bytes, source.category, source.storage)
        self._hold_again(source)
        if self._is_recorded(output, (), (source,)):
            self._record(output, (), (source,), [], ("dequantized", 0))
        return output

    def part(self, source: Tensor, num_bytes: int) -> Tensor:
        """Returns a slice: no memory, and a whole gradient in backward."""
        output = Tensor(num_bytes, source.category, source.storage)
        self._hold_again(source)
        if self._is_recorded(output, (source,), ()):
            self._record(output, (source,), (), [], ("dequantized", 0))
        return output

    def add_to(self, target: Tensor, inputs: Sequence[Tensor], *, beside: Event) -> Tensor:
        """Adds to ``target`` in place and returns the name that takes it over.

        Args:
            target: the sum; gets the gradient of the result.
            inputs: of the summand; each gets a gradient of its own.
            beside: bytes that forward and backward take while they run, and what they are for.
        """
        self.pass_by(*beside)
        output = Tensor(target.num_bytes, target.category, target.storage)
        if self._is_recorded(output, inputs, (target,)):
            self._record(output, inputs, (target,), [], beside)
        return output

    def pass_by(self, category: Category, num_bytes: int) -> None:
        """Takes memory and gives it back."""
        self.events.append((category, num_bytes))
        self.events.append((category, -num_bytes))

    def drop(self, *tensors: Tensor) -> None:
        """Takes names away."""
        for tensor in tensors:
            if tensor.storage is not None:
                self._release(tensor.storage)

    def backward(self, nodes: Sequence[Node]) -> None:
        """Runs the backward of ``nodes``, the last first; their results hold gradients."""
        for node in reversed(nodes):
            grad, node.output.grad = node.output.grad, None
            if grad is None:  # nothing that is trained depends on it
                continue
            for tensor in node.handed:
                if tensor.needs_grad:
                    grad.holders += 1
                    self._give(tensor, grad)
            self.events.append(node.beside)
            for tensor in node.inputs:
                if tensor.needs_grad:
                    self._give(tensor, self._take(tensor.num_bytes, tensor.category))
            self.events.append((node.beside[0], -node.beside[1]))
            for storage in node.saved:
                self._release(storage)
            self._release(grad)

    def _is_recorded(
        self, output: Tensor, inputs: Sequence[Tensor], handed: Sequence[Tensor]
    ) -> bool:
        wanted = (tensor.needs_grad for tensor in itertools.chain(inputs, handed))
        output.needs_grad = self.records and any(wanted)
        return output.needs_grad

    def _record(
        self,
        output: Tensor,
        inputs: Sequence[Tensor],
        handed: Sequence[Tensor],
        saved: list[Storage],
        beside: Event,
        *,
        asks: bool = False,
    ) -> None:
        self.nodes.append(Node(output, list(inputs), list(handed), saved, beside, asks))

    def _give(self, tensor: Tensor, grad: Storage) -> None:
        """Adds a gradient, in place where nothing else holds the sum so far."""
        before = tensor.grad
        if before is None:
            tensor.grad = grad
        elif before.holders == 1:
            self._release(grad)
        else:
            tensor.grad = self._take(tensor.num_bytes, tensor.category)
            self._release(before)
            self._release(grad)

    def _hold_again(self, source: Tensor) -> None:
        if source.storage is not None:
            source.storage.holders += 1

    def _take(self, num_bytes: int, category: Category) -> Storage:
        self.events.append((category, num_bytes))
        return Storage(num_bytes, category)

    def _release(self, storage: Storage) -> None:
        storage.holders -= 1
        if storage.holders == 0:
            self.events.append((storage.category, -storage.num_bytes))


Block = Callable[[Tape, Tensor], Tensor]
"""Operations from a tensor to another; all other names are dropped at their end."""


def peak_of(events: Sequence[Event]) -> Parts:
    """Returns what is held where ``events`` hold the most, by category."""
    sums = list(itertools.accumulate(num_bytes for _, num_bytes in events))
    if not sums or max(sums) <= 0:
        return {}
    return sum_of(events[: sums.index(max(sums)) + 1])


def joined(*several: Mapping[Category, int]) -> Parts:
    """Returns the sums."""
    return sum_of(list(itertools.chain.from_iterable(parts.items() for parts in several)))


def times(parts: Parts, count: int) -> Parts:
    """Returns ``count`` times as much."""
    return {category: count * num_bytes for category, num_bytes in parts.items()}


def sum_of(events: Sequence[Event]) -> Parts:
    """Returns what is held after ``events``, by category."""
    held: Counter[Category] = Counter()
    for category, num_bytes in events:
        held[category] += num_bytes
    return {category: num_bytes for category, num_bytes in held.items() if num_bytes}
