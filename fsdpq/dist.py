"""The process group and the few collectives that the worker half needs.

Knows ranks and devices, nothing about models. Under torchrun the group comes from the environment;
without it (``fsdpq generate``, single-process tests) a group of one rank is made, so that every
other module sees the same world. GPUs get ``cpu:gloo,cuda:nccl``: collectives on host tensors,
such as the gradient norm under CPU offload, need gloo beside nccl.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import random
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TensorShard

from fsdpq.errors import EnvironmentProblemError, TrainingError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)
WATCHED_TIMEOUT = datetime.timedelta(days=1)
"""Of a run whose launcher sees when it hangs: that tells where each rank is, a timeout does not."""


def start_process_group(device_type: str, *, timeout: datetime.timedelta = TIMEOUT) -> torch.device:
    """Joins the process group and returns this rank's device.

    Ranks: all (collective).

    Args:
        device_type: ``cuda`` or ``cpu``.
        timeout: how long a collective waits for the other ranks.

    Raises:
        EnvironmentProblemError: ``cuda`` is asked for, but this torch sees no GPU.
    """
    device = _own_device(device_type)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    return device


def _own_device(device_type: str) -> torch.device:
    if device_type != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblemError(
            f"the recipe runs on a GPU, but torch {torch.__version__} sees none",
            hint="install a CUDA build of torch and a driver that fits it, or add "
            "`launch.device=cpu` to the command line",
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def new_host_group() -> dist.ProcessGroup:
    """Returns a group of all ranks over gloo, for a thread whose collectives are its own.

    Ranks: all (collective).
    """
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=TIMEOUT))


def gather_texts(text: str) -> list[str]:
    """Returns ``text`` of every rank, in order of ranks.

    Ranks: all (collective).
    """
    texts: list[Any] = [text]
    if world_size() > 1:
        texts = [""] * world_size()
        dist.all_gather_object(texts, text)
    return texts


def wait_for_all() -> None:
    """Returns once every rank is here: no rank leaves while a peer still has work.

    Ranks: all (collective).
    """
    if world_size() > 1:
        dist.barrier()


def rank() -> int:
    """This process's rank; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched_rank() -> int:
    """This process's rank as torchrun says, also before there is a process group; else 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_everything(seed: int) -> None:
    """Seeds torch's and Python's generators, differently on every rank (dropout)."""
    random.seed(seed + rank())
    torch.manual_seed(seed + rank())


def shard_range(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns the rows ``[start, stop)`` of a tensor that a rank owns.

    FSDP2 shards dim 0 as ``torch.chunk`` does: ``ceil(num_rows / world_size)`` rows each, fewer or
    none on the last ranks. `placement` says which rank of how many one is for a given tensor.
    """
    rows_per_rank = -(-num_rows // world_size)
    start = min(rank * rows_per_rank, num_rows)
    return start, min(start + rows_per_rank, num_rows)


@dataclass(frozen=True)
class Shard:
    """The rows of a tensor that this rank owns.

    Attributes:
        rows: the local rows, with shape ``(stop - start, ...)``; writing to them writes the tensor.
        start: global index of the first local row.
        stop: global index after the last local row; equal to ``start`` when the rank owns none.
        group: the ranks that share one copy of the tensor; None where this rank owns all rows.
    """

    rows: Tensor
    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    def gather(self, local: Tensor, num_rows: int) -> Tensor:
        """Returns the whole of a tensor that is sharded as this one is.

        Ranks: all that share the tensor (collective).

        Args:
            local: this rank's rows, with shape ``(stop - start, ...)``.
            num_rows: rows of the whole tensor, as many as this one has.
        """
        return local if self.group is None else all_gather_rows(local, num_rows, group=self.group)


@dataclass(frozen=True)
class Placement:
    """Where this rank stands among the ranks that share one copy of a tensor.

    Attributes:
        index: place of this rank in the group.
        size: ranks of the group.
        group: None where every rank has all rows.
    """

    index: int
    size: int
    group: dist.ProcessGroup | None


def placement(tensor: Tensor) -> Placement:
    """Returns how the rows of a parameter are dealt: along the sharded axis of its own mesh.

    A mesh of two axes shards along one and replicates along the other; a plain tensor is whole.
    """
    if not isinstance(tensor, DTensor):
        return Placement(0, 1, None)
    mesh = tensor.device_mesh
    axes = [axis for axis, kind in enumerate(tensor.placements) if isinstance(kind, TensorShard)]
    if not axes or mesh.size(axes[0]) == 1:
        return Placement(0, 1, None)
    axis = axes[0]
    return Placement(mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis))


def own_shard(tensor: Tensor) -> Shard:
    """Returns this rank's rows of a tensor sharded by FSDP2; all rows of a plain tensor.

    Raises:
        RuntimeError: FSDP2 gave this rank other rows than `shard_range` says.
    """
    if not isinstance(tensor, DTensor):
        return Shard(tensor.detach(), 0, tensor.shape[0] if tensor.dim() else 1)
    local, place = tensor.to_local().detach(), placement(tensor)
    start, stop = shard_range(tensor.shape[0], place.index, place.size)
    if local.shape[0] != stop - start:
        raise RuntimeError(
            f"rank {rank()} holds {local.shape[0]} rows of a tensor of shape "
            f"{list(tensor.shape)}, expected rows {start} to {stop}"
        )
    return Shard(local, start, stop, place.group)


def assign_own_rows(parameter: Tensor, whole: Tensor) -> None:
    """Copies this rank's rows of ``whole``, with the parameter's global shape, in place."""
    shard = own_shard(parameter)
    shard.rows.copy_(whole[shard.start : shard.stop])


def gather_whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor sharded by FSDP2; a plain tensor as it is.

    Ranks: all (collective).
    """
    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def all_gather_rows(
    local: Tensor, num_rows: int, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Returns the whole of a tensor that is sharded by `shard_range`.

    Ranks: all of the group (collective).

    Args:
        local: this rank's rows, with shape ``(rows, ...)``; rows may be 0.
        num_rows: rows of the whole tensor.
        group: the ranks that have one part each; None is all ranks.
    """
    num_ranks = world_size() if group is None else group.size()
    if num_ranks == 1:
        return local
    rows_per_rank = -(-num_rows // num_ranks)
    padded = local.new_zeros((rows_per_rank, *local.shape[1:]))
    padded[: local.shape[0]] = local
    whole = local.new_empty((rows_per_rank * num_ranks, *local.shape[1:]))
    dist.all_gather_single(whole, padded, group=group)
    return whole[:num_rows]


def broadcast_from_first(tensor: Tensor) -> None:
    """Gives all ranks the values of rank 0, in place.

    Ranks: all (collective).
    """
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def gather_numbers(value: float) -> list[float]:
    """Returns ``value`` of every rank, in order of ranks.

    Ranks: all (collective).
    """
    if world_size() == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.float64)
    return all_gather_rows(mine, world_size()).tolist()


def check_same_on_all_ranks(what: str, text: str) -> None:
    """Compares ``text`` over the ranks.

    Ranks: all (collective).

    Raises:
        TrainingError: a rank has another text; names the ranks.
    """
    if world_size() == 1:
        return
    digests: list[str | None] = [None] * world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    others = [r for r, other in enumerate(digests) if other != digests[0]]
    if others:
        raise TrainingError(
            f"{what} differ between rank 0 and ranks {others}",
            hint="all ranks must read the same files: did one change while the run started?",
        )


def share_from_first(value: T) -> T:
    """Returns rank 0's value, on all ranks.

    Ranks: all (collective).

    Args:
        value: can be pickled; that of the other ranks is left alone.
    """
    if world_size() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]
