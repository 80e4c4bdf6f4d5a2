"""Where shards lie between uses, and checkpointed activations in host memory.

With ``fsdp.offload: cpu`` FSDP2 keeps shards in host memory, copies a group to the device for its
gather, and reduced gradients back; the optimizer runs on the host. Pinned memory makes the copies
run beside the computation. Pinning fails on some systems
(https://github.com/axolotl-ai-cloud/axolotl/issues/2743), so it is tried first.

With ``fsdp.offload: disk`` the frozen shards are pages of the quantized base's file, which the
system reads when they are used and drops when memory is short. They cannot be pinned.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

PIN_PROBE_BYTES = 64 << 20


def offload_policy(offload: str, device: torch.device) -> tuple[OffloadPolicy, str]:
    """Returns FSDP2's policy for ``fsdp.offload``, and a notice for the user or an empty text."""
    if offload == "none":
        return OffloadPolicy(), ""
    if device.type == "cpu" or offload == "disk":
        return CPUOffloadPolicy(pin_memory=False), ""
    try:
        torch.empty(PIN_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        notice = f"host memory cannot be pinned ({error}): offloading works, and is slower"
        return CPUOffloadPolicy(pin_memory=False), notice
    return CPUOffloadPolicy(pin_memory=True), ""


@dataclass(frozen=True)
class OnHost:
    """A saved tensor's copy in pinned memory.

    Attributes:
        copy: filled once ``copied`` has happened on the device.
        device: where the tensor came from.
        copied: event after the copy.
    """

    copy: Tensor
    device: torch.device
    copied: Any


class HostActivations:
    """Keeps tensors that autograd saves in host memory until backward needs them.

    Copies to the host run on a stream of their own, beside the forward pass; copies back run in the
    compute stream. On a CPU tensors are in host memory already and stay what they are.

    Args:
        device: this rank's device.

    Attributes:
        num_saved: tensors taken so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_saved = 0

    def saving(self) -> AbstractContextManager[Any]:
        """Returns a context in which this object holds what autograd saves."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor | OnHost:
        """Starts the copy to the host."""
        self.num_saved += 1
        if self.stream is None:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        # The allocator must not hand out the tensor's memory before the copy has read it.
        tensor.record_stream(self.stream)
        return OnHost(host, tensor.device, self.stream.record_event())

    def unpack(self, saved: Tensor | OnHost) -> Tensor:
        """Returns the tensor on its device."""
        if isinstance(saved, Tensor):
            return saved
        torch.cuda.current_stream(saved.device).wait_event(saved.copied)
        return saved.copy.to(saved.device, non_blocking=True)
