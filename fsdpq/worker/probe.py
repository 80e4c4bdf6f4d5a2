"""Tries the devices of this machine, for ``fsdpq doctor``: a process of the launcher.

Prints JSON lines: ``{"probe": name, "state": "start"}`` before each try and its facts after it, or
its ``error``. A try that hangs or kills the process is the last one that started, and what came
before it is not lost. Words and remedies are the launcher's (`fsdpq.launch.doctor.device`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

MIB = 2**20
COPIED_BYTES = 64 * MIB
"""The largest try takes some 10 times as much of a GPU."""

PINNED_BYTES, PIECE_BYTES = 4096 * MIB, 256 * MIB
"""Enough to meet the limits that are known; pinning all that a 70B needs takes a quarter minute."""

PINNED_SHARE = 0.25
"""Of free memory, at most."""

SIDE = 256
"""Of matrices of -1, 0 and 1: sums up to 256 are exact in bf16, whatever the order."""

MODULES = ("flash_attn", "triton")
"""Compiled for one torch: importing them shows whether it is this one."""

Facts = dict[str, Any]


def main() -> None:
    """Tries everything, one line each."""
    parser = argparse.ArgumentParser(prog="python -m fsdpq.worker.probe")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device_type = parser.parse_args().device
    if not attempt("torch", describe_torch):
        return
    import torch

    count = torch.cuda.device_count() if device_type == "cuda" else 0
    devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    for device in devices:
        attempt(f"products {device}", lambda device=device: multiply(device))
    if count:
        attempt("pinned", pin_memory)
        for device in devices:
            attempt(f"host {device}", lambda device=device: copy_to_host(device))
        for source, target in itertools.permutations(devices, 2):
            attempt(f"peer {source} {target}", lambda s=source, t=target: copy_to_peer(s, t))
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            attempt(f"import {name}", lambda name=name: import_module(name))


def attempt(probe: str, function: Callable[[], Facts]) -> bool:
    """Prints what ``function`` returns, or how it failed; returns whether it did not."""
    write({"probe": probe, "state": "start"})
    started = time.perf_counter()
    try:
        facts = function()
    except Exception as error:  # whatever a broken installation raises is the finding
        first = (str(error).strip().splitlines() or [""])[0]
        write({"probe": probe, "error": f"{type(error).__name__}: {first}"})
        return False
    write({"probe": probe, "seconds": time.perf_counter() - started, **facts})
    return True


def write(row: Facts) -> None:
    """Prints one line, at once."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def describe_torch() -> Facts:
    """Returns versions of torch and what it brings, and why CUDA does not start."""
    import torch

    facts: Facts = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": 0}
    if torch.version.cuda is None:
        return facts
    try:
        torch.cuda.init()
        facts["gpus"] = torch.cuda.device_count()
    except Exception as error:
        facts["why_no_cuda"] = (str(error).strip().splitlines() or [""])[0]
        return facts
    facts["cudnn"] = torch.backends.cudnn.version()
    if torch.distributed.is_nccl_available():
        from torch.cuda import nccl

        facts["nccl"] = ".".join(map(str, nccl.version()))
    return facts


def multiply(device: Any) -> Facts:
    """Returns how many entries of a bf16 product on ``device`` are not exact."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-1, 2, (SIDE, SIDE), generator=generator) for _ in range(2))
    found = left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)
    return {"different": int((found.cpu().long() != left @ right).sum()), "entries": SIDE**2}


def pin_memory() -> Facts:
    """Pins memory in pieces until it fails or is enough, and returns how much that was."""
    import torch

    wanted = int(min(PINNED_BYTES, PINNED_SHARE * psutil.virtual_memory().available))
    pieces: list[Any] = []
    error = ""
    while len(pieces) * PIECE_BYTES < wanted and not error:
        try:
            pieces.append(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True))
        except RuntimeError as failure:
            error = (str(failure).strip().splitlines() or [""])[0]
    return {"pinned_bytes": len(pieces) * PIECE_BYTES, "failure": error}


def copy_to_host(device: Any) -> Facts:
    """Returns bytes/s to and from ``device``, from pinned memory where there is any."""
    import torch

    try:
        host = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        host = torch.empty(COPIED_BYTES, dtype=torch.uint8)
    there = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    pattern(there, 1)
    rates = {
        "from_device": _rate(lambda: host.copy_(there), device),
        "to_device": _rate(lambda: there.copy_(host), device),
    }
    expected = torch.empty_like(there)
    pattern(expected, 1)
    return {**rates, "different": int((there != expected).sum()), "pinned": host.is_pinned()}


def copy_to_peer(source: Any, target: Any) -> Facts:
    """Copies from one device to another and returns how many bytes arrive wrong."""
    import torch

    sent = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=source)
    pattern(sent, 1 + source.index)
    arrived = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=target)
    rate = _rate(lambda: arrived.copy_(sent), source, target)
    expected = torch.empty_like(arrived)
    pattern(expected, 1 + source.index)
    different = int((arrived != expected).sum())
    access = torch.cuda.can_device_access_peer(source, target)
    return {"access": access, "different": different, "bytes_per_s": rate}


def pattern(bytes_: Any, seed: int) -> None:
    """Fills ``bytes_`` with the same numbers on every device, in place."""
    import torch

    numbers = torch.arange(bytes_.numel(), device=bytes_.device, dtype=torch.int32)
    bytes_.copy_((numbers * 31 + numbers // 257 + seed) % 251)


def _rate(copy: Callable[[], object], *devices: Any) -> float:
    """Returns bytes/s of the best of three copies."""
    return COPIED_BYTES / min(_seconds(copy, devices) for _ in range(3))


def _seconds(copy: Callable[[], object], devices: tuple[Any, ...]) -> float:
    import torch

    def wait() -> None:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    copy()
    wait()
    return time.perf_counter() - started


def import_module(name: str) -> Facts:
    """Imports a package and returns its version."""
    return {"version": str(getattr(importlib.import_module(name), "__version__", ""))}


if __name__ == "__main__":
    main()
