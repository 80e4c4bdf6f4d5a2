"""Peaks of memory between two moments: of the device by its allocator, of the host by Linux."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

GIB = 2**30
STATUS = Path("/proc/self/status")


def read_status(*names: str) -> list[int]:
    """Returns fields of /proc/self/status, such as ``VmHWM`` and ``RssAnon``, in bytes."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [1024 * int(fields[name].split()[0]) for name in names]


def status_bytes(name: str) -> int:
    """Returns one of the fields of `read_status`."""
    return read_status(name)[0]


def reset_host_peak() -> None:
    """Sets ``VmHWM``, the highest resident memory of this process, back to what it is now.

    Raises:
        OSError: the system does not allow it, or is no Linux.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def reset_peaks(device: torch.device) -> None:
    """Starts to measure peaks from here."""
    reset_host_peak()
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


def cap_memory(gib: float | None, device: torch.device) -> None:
    """Limits what torch's allocator may take of the device from now on, None for all of it."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = 1.0 if gib is None else gib * GIB / total
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    torch.cuda.reset_peak_memory_stats(device)


def release(device: torch.device) -> None:
    """Gives memory of what is dropped back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
