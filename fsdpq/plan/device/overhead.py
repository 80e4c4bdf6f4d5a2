"""Memory of a GPU beside what the allocator hands out: CUDA itself, and what fits nowhere.

Measured on one H200 with torch 2.11 (docs/benchmarks/gpu.md): with Llama-2-70B's shape and its base
on the host a step reserves 2.45 GiB, and the device gives 3.4 GiB.
"""

from __future__ import annotations

from fsdpq.plan.device.tape import Parts
from fsdpq.plan.hardware.machine import MIB

CUDA_BYTES = 970 * MIB
"""The context of CUDA with the kernels of torch and its libraries: 3.4 GiB less 2.45 GiB."""

WORKSPACE_BYTES = 2 * 32 * MIB
"""What cuBLAS asks torch's allocator for on GPUs since Hopper, for each of the two threads that run
forward and backward; a quarter of it on older ones (aten/src/ATen/cuda/CublasHandlePool.cpp)."""

UNUSABLE = 0.4
"""Reserved beyond allocated, as a share of what comes and goes within a step."""


def overhead(parts: Parts) -> Parts:
    """Returns what a GPU holds beside ``parts``."""
    stays = ("codes", "scales", "plain", "trained", "gradients", "optimizer")
    passing = sum(num_bytes for category, num_bytes in parts.items() if category not in stays)
    return {"context": CUDA_BYTES, "fragmentation": int(UNUSABLE * passing)}
