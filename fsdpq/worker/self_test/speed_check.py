"""How fast the ranks add up, and whether sums stay exact when many follow each other."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from fsdpq.dist import rank, world_size
from fsdpq.worker.self_test.check import Bench, Check, require_same_bytes
from fsdpq.worker.self_test.collective_checks import GROUP, REMEDY

SECONDS = 2.0
MAX_ROUNDS = 500
GPU_BYTES, CPU_BYTES = 64 * 2**20, 4 * 2**20
"""Summed at a time: about what FSDP reduces of a layer's adapters, and enough to fill a link."""


def check_speed(bench: Bench) -> str:
    """Adds numbers up over all ranks again and again, for two seconds."""
    return measure_all_reduce(bench.device, seconds=SECONDS)


def measure_all_reduce(device: torch.device, *, seconds: float) -> str:
    """Returns the bandwidth of all-reduces in words, after comparing the last sum.

    The bandwidth is that of a ring: each rank sends ``2 (n - 1) / n`` of the bytes (nccl-tests'
    bus bandwidth, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

    Ranks: all (collective).
    """
    num_bytes, ranks = (GPU_BYTES if device.type == "cuda" else CPU_BYTES), world_size()
    numbers = (torch.arange(num_bytes // 4, device=device) % 1009).float()
    total = torch.empty_like(numbers)
    once = max(_time_rounds(total, numbers, 1) for _ in range(2))
    slowest = torch.tensor(once, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    rounds = max(1, min(MAX_ROUNDS, int(seconds / float(slowest))))
    took = _time_rounds(total, numbers, rounds)
    require_same_bytes("the sum", total, numbers * (ranks * (ranks + 1) // 2))
    rate = num_bytes * rounds / took
    size = f"{rounds} sums of {num_bytes // 2**20} MiB exact"
    if ranks == 1:
        return f"{size}, on one rank"
    return f"{size}, {2 * (ranks - 1) / ranks * rate / 1e9:.2f} GB/s between {ranks} ranks"


def _time_rounds(total: torch.Tensor, numbers: torch.Tensor, rounds: int) -> float:
    """Adds ``(rank + 1) * numbers`` up into ``total``, in place; returns the seconds it took."""
    _wait(total.device)
    started = time.perf_counter()
    for _ in range(rounds):
        torch.mul(numbers, rank() + 1, out=total)
        dist.all_reduce(total)
    _wait(total.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


CHECKS = (Check(GROUP, "speed", check_speed, REMEDY),)
