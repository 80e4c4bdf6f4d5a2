"""Checkpointed activations in host memory, copied out and back beside the computation.

Autograd hands what it saves to `HostActivations.pack` and asks for it by `HostActivations.unpack`.
A copy out begins when a layer's input is saved; a copy back begins one layer before it is needed.
An input takes far less time to copy than its layer takes to compute (hidden 4096, bf16: 0.3 us a
token at 25 GB/s, against 4 us forward and 12 us backward at 100 TFLOP/s), so one copy ahead is
enough. Device memory is bounded: `HostActivations.depth` inputs on their way out, as many on their
way back, whatever the number of layers. ``Tensor.record_stream`` would not bound it: memory came
back only when the device, not the program, had passed the copy.

This file decides what is copied when; a `Transfer` does it. The saved object that autograd holds
owns its host memory: it is free again as soon as autograd drops it, also where no backward comes.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fsdpq.fsdp.offload import SLOW_NOTICE, why_not_pinned

MIN_BYTES = 64 << 10
"""Smaller tensors stay where they are: positions and masks that layers share."""

DEPTH = 1
"""Copies ahead of the computation, in each direction."""


class Transfer(Protocol):
    """Copies beside the computation, done in the order in which they were started."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Returns memory of the host, ``(num_bytes,)``, uint8."""
        ...

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Copies ``source`` into ``target`` once what is computed so far is done.

        Neither may be freed before `wait` was called with what this returns.
        """
        ...

    def wait(self, copied: Any) -> None:
        """Makes what is computed from now on wait for a copy."""
        ...


class CudaTransfer:
    """Copies on a CUDA stream of their own.

    Args:
        device: this rank's device.
        pin: copy through pinned memory; other memory works, and the program waits for its copies.
    """

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self.device = device
        self.pin = pin
        self.module = torch.get_device_module(device)  # ``torch.cuda``; a trace has one of its own
        self.stream = self.module.Stream(device)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Returns memory of the host, ``(num_bytes,)``, uint8."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pin)

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Copies ``source`` into ``target`` once what is computed so far is done."""
        self.stream.wait_stream(self.module.current_stream(self.device))
        with self.module.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Makes what is computed from now on wait for a copy."""
        self.module.current_stream(self.device).wait_event(copied)


class HostBuffers:
    """Host memory that is used again: pinning it anew in every step is slow.

    There are as many buffers as were in use at once, however many sizes were asked for: where no
    free one is large enough, a new one takes the place of the smallest.

    Args:
        allocate: returns new memory of so many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._free: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """Returns a buffer of at least ``num_bytes``, uint8, with any content."""
        by_size = sorted(range(len(self._free)), key=lambda index: self._free[index].numel())
        for index in by_size:
            if self._free[index].numel() >= num_bytes:
                return self._free.pop(index)
        if by_size:
            del self._free[by_size[0]]
        # torch rounds pinned memory up to a power of two anyway (`CachingHostAllocator`).
        return self._allocate(1 << max(0, num_bytes - 1).bit_length())

    def give_back(self, buffer: Tensor) -> None:
        """Takes back what `take` returned; copies from and to it may still be under way."""
        self._free.append(buffer)


@dataclass
class HostCopy:
    """One tensor in host memory.

    Attributes:
        buffer: as `HostBuffers` gave it.
        values: the part of it that holds the tensor, in its shape and dtype.
        fetched: the tensor on the device and its copy's token, between a copy back and its use.
    """

    buffer: Tensor
    values: Tensor
    fetched: tuple[Tensor, Any] | None = None


@dataclass(eq=False)
class Saved:
    """What autograd holds instead of a tensor.

    Attributes:
        where: the tensor where it stayed on the device, else its copy.
        previous: what was saved before it, needed after it.
        used: it was asked for.
    """

    where: Tensor | HostCopy
    previous: weakref.ref[Saved] | None
    used: bool = False


class HostActivations:
    """Keeps tensors that autograd saves in host memory until backward needs them.

    Args:
        device: this rank's device.
        transfer: copies between device and host.
        depth: copies ahead of the computation, in each direction.
        min_bytes: smaller tensors stay on the device.
    """

    def __init__(
        self,
        device: torch.device,
        transfer: Transfer,
        *,
        depth: int = DEPTH,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        self._device = device
        self._transfer = transfer
        self._depth = depth
        self._min_bytes = min_bytes
        self._newest: weakref.ref[Saved] | None = None
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._num_ahead = 0
        self._buffers = HostBuffers(transfer.host_memory)

    def saving(self, *, stays: bool = False) -> AbstractContextManager[Any]:
        """Returns a context in which this object holds what autograd saves.

        Args:
            stays: leave it on the device: backward needs it at once. It still says when to begin
                with the copy back of what was saved before it.
        """
        pack = functools.partial(self.pack, stays=stays)
        return torch.autograd.graph.saved_tensors_hooks(pack, self.unpack)

    def pack(self, tensor: Tensor, *, stays: bool = False) -> Saved:
        """Starts the copy to the host."""
        if stays or tensor.nbytes < self._min_bytes:
            return self._remember(tensor)
        self._wait_for_leaving(at_most=self._depth - 1)
        buffer = self._buffers.take(tensor.nbytes)
        values = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        # Detached: the graph behind it must not live on for the sake of a copy.
        source = tensor.detach()
        self._leaving.append((source, self._transfer.start(source, values)))
        copy = HostCopy(buffer, values)
        saved = self._remember(copy)
        weakref.finalize(saved, self._release, copy).atexit = False
        return saved

    def unpack(self, saved: Saved) -> Tensor:
        """Returns the tensor on its device, and starts the copy back of what comes next."""
        self._wait_for_leaving(at_most=0)
        tensor = self._arrive(saved.where) if isinstance(saved.where, HostCopy) else saved.where
        saved.used = True
        self._fetch_ahead(saved)
        return tensor

    def _remember(self, where: Tensor | HostCopy) -> Saved:
        saved = Saved(where, self._newest)
        self._newest = weakref.ref(saved)
        return saved

    def _wait_for_leaving(self, *, at_most: int) -> None:
        """Frees the device's memory of copies out until no more than ``at_most`` are under way."""
        while len(self._leaving) > at_most:
            _, copied = self._leaving[0]
            self._transfer.wait(copied)
            self._leaving.popleft()

    def _fetch(self, copy: HostCopy) -> tuple[Tensor, Any]:
        """Starts a copy back."""
        tensor = torch.empty_like(copy.values, device=self._device)
        return tensor, self._transfer.start(copy.values, tensor)

    def _arrive(self, copy: HostCopy) -> Tensor:
        """Returns the tensor on the device once it is there."""
        fetched = self._take_fetched(copy) or self._fetch(copy)
        self._transfer.wait(fetched[1])
        return fetched[0]

    def _fetch_ahead(self, saved: Saved) -> None:
        """Starts copies back of what was saved before ``saved``, up to ``depth`` of them."""
        earlier = saved
        while self._num_ahead < self._depth and earlier.previous is not None:
            previous = earlier.previous()
            if previous is None:
                return
            earlier = previous
            copy = earlier.where
            if isinstance(copy, HostCopy) and copy.fetched is None and not earlier.used:
                copy.fetched = self._fetch(copy)
                self._num_ahead += 1

    def _take_fetched(self, copy: HostCopy) -> tuple[Tensor, Any] | None:
        fetched, copy.fetched = copy.fetched, None
        self._num_ahead -= fetched is not None
        return fetched

    def _release(self, copy: HostCopy) -> None:
        """Makes the memory of a dropped object free, also that of a copy back nobody asked for."""
        fetched = self._take_fetched(copy)
        if fetched is not None:
            self._transfer.wait(fetched[1])
        self._buffers.give_back(copy.buffer)


def build_host_activations(device: torch.device) -> tuple[HostActivations | None, str]:
    """Returns what holds activations, and a notice for the user or an empty text.

    On a CPU activations are in host memory already: nothing holds them.
    """
    if device.type == "cpu":
        return None, ""
    reason = why_not_pinned()
    transfer = CudaTransfer(device, pin=not reason)
    return HostActivations(device, transfer), SLOW_NOTICE.format(reason) if reason else ""
