"""Copies that happen as late as a device may do them, on tensors that may be gone by then.

A CUDA stream copies at any time between the start of a copy and the wait for it. What goes wrong
then is memory that is freed, written or read too early. Here a copy is done by the wait and not
before: a result that is read too early is NaN, and memory that went too early is told.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsdpq.fsdp.activations import HostActivations


@dataclass(frozen=True)
class Pending:
    """A copy that was started. It owns the host's side, as CUDA's host allocator does until a copy
    is done, and not the device's."""

    host: Tensor
    on_device: weakref.ref[Tensor]
    leaves: bool


class LateTransfer:
    """A `fsdpq.fsdp.activations.Transfer` in host memory.

    Attributes:
        log: what was done, in order: ``out`` and ``in`` for started copies, and what a test adds.
        num_allocated: buffers of host memory made.
        most: the most copies that were under way at once, by direction.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_allocated = 0
        self.most = {"out": 0, "in": 0}
        # They stay: the addresses of freed ones would be those of other tensors.
        self._buffers: dict[int, Tensor] = {}
        self._pending: dict[int, Pending] = {}
        self._num_started = 0

    def host_memory(self, num_bytes: int) -> Tensor:
        """Returns new memory, with nonsense in it."""
        self.num_allocated += 1
        buffer = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self._buffers[buffer.untyped_storage().data_ptr()] = buffer
        return buffer

    def start(self, source: Tensor, target: Tensor) -> int:
        """Notes the copy; its target is NaN until `wait`."""
        leaves = target.untyped_storage().data_ptr() in self._buffers
        assert leaves or source.untyped_storage().data_ptr() in self._buffers
        if not leaves:
            target.fill_(float("nan"))
        self._num_started += 1
        host, on_device = (target, source) if leaves else (source, target)
        self._pending[self._num_started] = Pending(host, weakref.ref(on_device), leaves)
        word = "out" if leaves else "in"
        self.log.append(word)
        under_way = sum(pending.leaves == leaves for pending in self._pending.values())
        self.most[word] = max(self.most[word], under_way)
        return self._num_started

    def wait(self, copied: Any) -> None:
        """Does all copies up to this one, in the order in which they were started."""
        for number in [number for number in self._pending if number <= copied]:
            pending = self._pending.pop(number)
            on_device = pending.on_device()
            assert on_device is not None, "the device's memory was freed before the copy was done"
            if pending.leaves:
                pending.host.copy_(on_device)
            else:
                on_device.copy_(pending.host)

    def check_nothing_was_freed_early(self) -> None:
        """Raises AssertionError where a copy is still to be done and its memory is gone."""
        for pending in self._pending.values():
            assert pending.on_device() is not None


def late_activations(device: torch.device) -> tuple[HostActivations, str]:
    """As `fsdpq.fsdp.activations.build_host_activations`, with late copies of every tensor."""
    return HostActivations(device, LateTransfer(), min_bytes=0), ""
