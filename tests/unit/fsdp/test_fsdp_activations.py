"""Activations in host memory: when copies start, what they hold, what is free again."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.late_transfer import LateTransfer
from torch import Tensor, nn

from fsdpq.fsdp.activations import HostActivations, HostBuffers
from fsdpq.fsdp.layers import apply_layer_runs

CPU = torch.device("cpu")
NUM_LAYERS = 5
WIDTH = 6


class Layer(nn.Module):
    """A layer that says when it runs."""

    def __init__(self, index: int, log: list[str]) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.index = index
        self.log = log
        self.fails = False

    def forward(self, hidden: Tensor) -> Tensor:
        self.log.append(f"layer {self.index}")
        if self.fails:
            raise RuntimeError("out of memory")
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Stack(nn.Module):
    """Layers whose inputs go to the host, and what carries them there."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        offload, depth = settings.pop("offload", True), settings.pop("depth", 1)
        self.transfer = LateTransfer()
        self.layers = [Layer(index, self.transfer.log) for index in range(NUM_LAYERS)]
        self.registered = nn.ModuleList(self.layers)
        self.host = HostActivations(CPU, self.transfer, depth=depth, min_bytes=0)
        host = self.host if offload else None
        options: dict[str, Any] = {"checkpointing": "full", "num_chunks": 1} | settings
        apply_layer_runs(self.layers, host=host, **options)

    def forward(self, rows: int, tokens: int = 2) -> Tensor:
        hidden = torch.linspace(-1, 1, rows * tokens * WIDTH).view(rows, tokens, WIDTH)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().sum()

    def take_gradients(self) -> list[Tensor]:
        """Returns the gradients and forgets them."""
        found = [parameter.grad for parameter in self.parameters()]
        self.zero_grad(set_to_none=True)
        self.transfer.check_nothing_was_freed_early()
        return [gradient for gradient in found if gradient is not None]

    def take_log(self) -> list[str]:
        """Returns what was done since the last call."""
        log = list(self.transfer.log)
        self.transfer.log.clear()
        return log


def step(stack: Stack, rows: int = 3) -> list[Tensor]:
    """Does two micro-batches of different shape; returns loss and gradients."""
    losses = [stack(rows), stack(rows + 1, tokens=5)]
    for loss in losses:
        loss.backward()
    return [*(loss.detach() for loss in losses), *stack.take_gradients()]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 2 + 4 * NUM_LAYERS
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("checkpointing", ["full", "selective", "none"])
def test_numbers_are_those_without_offload_bit_for_bit(
    checkpointing: str, num_chunks: int, depth: int
) -> None:
    settings = {"checkpointing": checkpointing, "num_chunks": num_chunks}
    plain, stack = Stack(offload=False, **settings), Stack(depth=depth, **settings)
    expected = step(plain)
    for _ in range(2):
        same_bits(step(stack), expected)
    num_moved = {"full": NUM_LAYERS - 1, "selective": 2, "none": 0}[checkpointing]
    log = stack.take_log()
    assert log.count("out") == log.count("in") == 2 * 2 * num_moved * num_chunks
    assert max(stack.transfer.most.values()) <= depth
    assert "out" not in plain.take_log()


def test_a_copy_back_starts_one_layer_before_it_is_needed() -> None:
    stack = Stack()
    stack(2).backward()
    forward = ["out", "layer 0", "out", "layer 1", "out", "layer 2", "out", "layer 3", "layer 4"]
    # The input of layer 4 stayed; before layer 4 is computed again, that of layer 3 is fetched.
    backward = ["in", "layer 4", "in", "layer 3", "in", "layer 2", "in", "layer 1", "layer 0"]
    assert stack.take_log() == forward + backward


def test_two_copies_ahead_start_two_layers_before() -> None:
    stack = Stack(depth=2)
    stack(2).backward()
    backward = stack.take_log()[9:]
    assert backward == [
        "in", "in", "layer 4", "in", "layer 3", "in", "layer 2", "layer 1", "layer 0",
    ]  # fmt: skip


def test_chunks_come_back_last_one_first() -> None:
    stack = Stack(checkpointing="selective", num_chunks=2)
    stack(2).backward()
    backward = stack.take_log()[-13:]
    # Layers 1 and 3 are kept, both parts of layer 4's input stay on the device. The second part of
    # layer 2 is fetched before layer 4 is computed again, and waits until it is needed.
    assert [word for word in backward if word != "out"][-10:] == [
        "in", "layer 4", "layer 4", "in", "layer 2", "in", "layer 2", "in", "layer 0", "layer 0",
    ]  # fmt: skip


def test_later_steps_pin_no_memory() -> None:
    stack = Stack()
    step(stack)
    first = stack.transfer.num_allocated
    assert first == 2 * (NUM_LAYERS - 1)
    for _ in range(3):
        step(stack)
    assert stack.transfer.num_allocated == first


def test_rows_of_many_lengths_share_the_buffers_of_the_longest() -> None:
    stack = Stack()
    for rows in (1, 2, 5, 9, 3, 9, 1, 7):
        stack(rows).backward()
    # 1, 2, 5 and 9 rows of 48 bytes round up to four sizes.
    assert stack.transfer.num_allocated == 4 * (NUM_LAYERS - 1)
    assert len(stack.host._buffers._free) == NUM_LAYERS - 1


def test_buffers_grow_in_place_of_the_smallest_and_are_found_by_size() -> None:
    made: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        made.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    buffers = HostBuffers(allocate)
    large, small = buffers.take(1000), buffers.take(33)
    buffers.give_back(large)
    buffers.give_back(small)
    assert buffers.take(60) is small
    assert buffers.take(65) is large
    buffers.give_back(large)
    buffers.give_back(small)
    larger = buffers.take(1025)
    assert buffers.take(64) is large, "the smaller one went"
    assert made == [1024, 64, larger.numel()] == [1024, 64, 2048]


def test_evaluation_moves_nothing() -> None:
    stack = Stack()
    with torch.no_grad():
        without_grad = stack(2)
    stack.eval()
    in_eval = stack(2)
    assert torch.equal(without_grad, in_eval)
    assert {"out", "in"}.isdisjoint(stack.take_log())


def test_a_loss_without_backward_gives_its_memory_back() -> None:
    stack = Stack()
    expected = step(Stack(offload=False))
    for _ in range(3):
        loss = stack(4, tokens=5)
        del loss
    assert stack.transfer.num_allocated == NUM_LAYERS - 1
    assert len(stack.host._buffers._free) == NUM_LAYERS - 1
    same_bits(step(stack), expected)


def test_a_copy_back_nobody_used_is_finished_before_its_memory_goes() -> None:
    transfer = LateTransfer()
    host = HostActivations(CPU, transfer, min_bytes=0)
    saved = [host.pack(torch.ones(4), stays=n == 2) for n in range(3)]
    host.unpack(saved[2])
    assert transfer.log == ["out", "out", "in"]
    saved.clear()
    transfer.check_nothing_was_freed_early()
    assert host._num_ahead == 0
    assert len(host._buffers._free) == 2


def test_a_backward_that_fails_does_not_spoil_the_next_step() -> None:
    stack = Stack()
    hook = stack.layers[4].up.weight.register_hook(_stop)
    with pytest.raises(RuntimeError, match="stopped"):
        stack(2).backward()
    hook.remove()
    # Backward ended at layer 4: the input of layer 3 was on its way by then.
    assert stack.take_log()[-2:] == ["in", "layer 4"]
    stack.take_gradients()
    same_bits(step(stack), step(Stack(offload=False)))
    # torch itself holds the graph of the failed one until the next backward.
    gc.collect()
    assert stack.host._num_ahead == 0


def _stop(_gradient: Tensor) -> None:
    raise RuntimeError("stopped")


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    stack = Stack()
    stack.layers[3].fails = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            stack(2)
    stack.layers[3].fails = False
    assert len(stack.host._buffers._free) == NUM_LAYERS - 1 == stack.transfer.num_allocated
    same_bits(step(stack), step(Stack(offload=False)))


def test_a_second_backward_through_the_same_graph_fetches_again() -> None:
    plain, stack = Stack(offload=False), Stack()
    for each in (plain, stack):
        loss = each(2)
        loss.backward(retain_graph=True)
        loss.backward()
    for one, other in zip(stack.take_gradients(), plain.take_gradients(), strict=True):
        assert torch.equal(one, other)
    assert stack.take_log().count("in") == 2 * (NUM_LAYERS - 1)


def test_any_order_of_use_gives_the_values_and_never_more_ahead_than_asked() -> None:
    transfer = LateTransfer()
    host = HostActivations(CPU, transfer, depth=2, min_bytes=0)
    values = [torch.full((3, n + 1), float(n)) for n in range(8)]
    saved = [host.pack(value, stays=n == 7) for n, value in enumerate(values)]
    for n in (0, 5, 3, 7, 3, 6, 1, 2, 4):
        assert torch.equal(host.unpack(saved[n]), values[n])
        assert host._num_ahead <= 2
    del saved
    transfer.check_nothing_was_freed_early()
    assert host._num_ahead == 0
    assert len(host._buffers._free) == 7


def test_two_inputs_of_a_layer_are_fetched_once_each() -> None:
    transfer = LateTransfer()
    host = HostActivations(CPU, transfer, min_bytes=0)
    first, second = ([host.pack(torch.ones(4)) for _ in range(2)] for _ in range(2))
    # Backward takes the layers from the last one, and the inputs of a layer in their order.
    for each in (*second, *first):
        host.unpack(each)
    assert transfer.log.count("in") == 4


def test_small_tensors_and_strides_come_back_as_they_were() -> None:
    transfer = LateTransfer()
    host = HostActivations(CPU, transfer, min_bytes=100)
    small, turned = torch.arange(3.0), torch.arange(60.0).view(6, 10).T
    bf16 = torch.randn(80).bfloat16()
    saved = [host.pack(tensor) for tensor in (small, turned, bf16)]
    assert host.unpack(saved[0]) is small
    for one, tensor in zip(saved[1:], (turned, bf16), strict=True):
        found = host.unpack(one)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert transfer.log.count("out") == 2
