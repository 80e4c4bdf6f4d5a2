"""Where shards lie between uses.

With ``fsdp.offload: cpu`` FSDP2 keeps shards in host memory, copies a group to the device for its
gather, and reduced gradients back; the optimizer runs on the host. Pinned memory makes the copies
run beside the computation. Pinning fails on some systems
(https://github.com/axolotl-ai-cloud/axolotl/issues/2743), so it is tried first.

With ``fsdp.offload: disk`` the frozen shards are pages of the quantized base's file, which the
system reads when they are used and drops when memory is short. They cannot be pinned.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

PIN_PROBE_BYTES = 64 << 20

SLOW_NOTICE = "host memory cannot be pinned ({}): offloading works, and is slower"


def offload_policy(offload: str, device: torch.device) -> tuple[OffloadPolicy, str]:
    """Returns FSDP2's policy for ``fsdp.offload``, and a notice for the user or an empty text."""
    if offload == "none":
        return OffloadPolicy(), ""
    if device.type == "cpu" or offload == "disk":
        return CPUOffloadPolicy(pin_memory=False), ""
    if reason := why_not_pinned():
        return CPUOffloadPolicy(pin_memory=False), SLOW_NOTICE.format(reason)
    return CPUOffloadPolicy(pin_memory=True), ""


def why_not_pinned() -> str:
    """Returns why the system refuses to pin host memory, an empty text where it does not."""
    try:
        torch.empty(PIN_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return str(error)
    return ""
