"""Do the ranks add up right, on the device and in host memory?"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fsdpq.dist import rank, world_size
from fsdpq.worker.self_test.check import Bench, Check, CheckSkippedError, require_same_bytes

GROUP = "collectives"
NUMBERS_A_RANK = 100_003
REMEDY = (
    "on GPUs try `NCCL_P2P_DISABLE=1` in the environment (some cards copy wrongly between each "
    "other); else update driver and torch"
)


def _numbers(of_rank: int, count: int, device: torch.device) -> Tensor:
    """Returns whole numbers so small that sums over 1000 ranks are exact in fp32."""
    return ((torch.arange(count, device=device) * 7 + of_rank * 31) % 1009).float()


def _sum_over_ranks(count: int, device: torch.device) -> Tensor:
    total = torch.zeros(count, device=device)
    for of_rank in range(world_size()):
        total += _numbers(of_rank, count, device)
    return total


def check_all_reduce(bench: Bench) -> str:
    """Adds numbers up over all ranks."""
    return _all_reduce(bench.device)


def check_reduce_scatter(bench: Bench) -> str:
    """Adds numbers up over all ranks, each rank receiving its part."""
    count = NUMBERS_A_RANK * world_size()
    own = torch.empty(NUMBERS_A_RANK, device=bench.device)
    dist.reduce_scatter_tensor(own, _numbers(rank(), count, bench.device))
    parts = _sum_over_ranks(count, bench.device).split(NUMBERS_A_RANK)
    require_same_bytes("this rank's part of the sum", own, parts[rank()])
    return f"{count:,} sums over {world_size()} ranks exact"


def check_host_tensors(bench: Bench) -> str:
    """Adds up numbers in host memory, as the gradient norm under CPU offload needs it."""
    if bench.device.type == "cpu":
        raise CheckSkippedError("on CPUs every tensor is in host memory")
    return _all_reduce(torch.device("cpu"))


def _all_reduce(device: torch.device) -> str:
    numbers = _numbers(rank(), NUMBERS_A_RANK, device)
    dist.all_reduce(numbers)
    require_same_bytes("the sum", numbers, _sum_over_ranks(NUMBERS_A_RANK, device))
    return f"{NUMBERS_A_RANK:,} sums over {world_size()} ranks exact"


CHECKS = (
    Check(GROUP, "all-reduce", check_all_reduce, REMEDY),
    Check(GROUP, "reduce-scatter", check_reduce_scatter, REMEDY),
    Check(GROUP, "host memory", check_host_tensors, "install a torch that is built with gloo"),
)
