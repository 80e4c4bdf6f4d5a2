"""Peaks of memory, and the rate at which this machine multiplies the model's matrices."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from scripts.bench_train.shapes import Batch, Shape


def status_bytes(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def reset_peaks(device: torch.device) -> None:
    """Starts to measure peaks from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int]:
    """Returns the peak on the device and on the host since `reset_peaks`, in bytes."""
    host = status_bytes("VmHWM")
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host
    return {"peak_bytes": on_device, "host_bytes": host}


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MatmulRate:
    """Multiplies what a step multiplies: activations by weights, in forward and in backward.

    Args:
        shape: of the model.
        dtype: of the products.
        device: where.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self._sizes = [*shape.linears.values(), (shape.vocab, shape.hidden)]
        self._times = [shape.layers] * len(shape.linears) + [1]
        self._dtype = dtype
        self._device = torch.device(device)

    def flops_per_s(self, batch: Batch) -> float:
        """Returns operations a second, each product weighted by how often a step does it."""
        seconds, flops = 0.0, 0.0
        for size, times in zip(self._sizes, self._times, strict=True):
            seconds += times * self._seconds(size, batch.size)
            flops += times * 4.0 * batch.size * size[0] * size[1]
        return flops / seconds

    def _seconds(self, size: tuple[int, int], tokens: int) -> float:
        """Returns the seconds of one product and the gradient of its input."""
        weight = torch.randn(size, dtype=self._dtype, device=self._device)
        x = torch.randn(tokens, size[1], dtype=self._dtype, device=self._device)
        output = torch.nn.functional.linear(x, weight)
        torch.matmul(output, weight, out=x)
        x.fill_(1.0)
        synchronize(self._device)
        started = time.perf_counter()
        torch.matmul(x, weight.T, out=output)
        torch.matmul(output, weight, out=x)
        synchronize(self._device)
        return time.perf_counter() - started
