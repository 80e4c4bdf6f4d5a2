"""How long a step and a run take: work and traffic at the rates of a machine.

What hides behind what today:

- Copies of shards to the device: not at all on one rank, where FSDP2 makes them in the stream that
  computes (torch 2.13, ``FSDPParamGroup.wait_for_unshard``); measured, docs/benchmarks/gpu.md. With
  several ranks they have a stream of their own, and so have gathers and reductions: they are taken
  to hide behind the computation. Nobody has measured that with this program yet.
- Copies from a mapped file: not at all, for that memory is not pinned. Reading ahead of them hides.
- Inputs of layers under ``fsdp.activation_offload``: wholly; measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fsdpq.plan.hardware.machine import Gpu, Machine
from fsdpq.plan.result import StepTime, Transfer
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.time.rates import (
    OVER_HOST_SHARE,
    UNPINNED_BANDWIDTH,
    ComputeTime,
    compute_time,
    computes_fast,
)
from fsdpq.plan.time.traffic import Traffic, step_traffic
from fsdpq.plan.time.work import step_work
from fsdpq.plan.weights import Weights
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe

SECONDS_PER_HOUR = 3600.0

OPTIONS = {
    "disk": "`--disk 5GB/s` says what the disk reads",
    "network": "`--network 12.5GB/s` says what goes between two machines",
}
"""Links that no table of GPUs knows, and what tells them."""


@dataclass(frozen=True)
class Link:
    """What one link does in a step.

    Attributes:
        name: as `fsdpq.plan.result.Transfer` has it.
        num_bytes: of one rank; of one machine for ``network`` and ``disk``, whose link it shares.
        seconds: alone, None where the link is not known.
        hides: it runs beside the computation.
        shares_bus: it keeps the host's bus busy.
        grows_with_rows: its bytes grow with the rows of a micro-batch.
    """

    name: str
    num_bytes: int
    seconds: float | None
    hides: bool
    shares_bus: bool
    grows_with_rows: bool = False


def plan_time(
    recipe: Recipe,
    shape: ModelShape,
    weights: Weights,
    machine: Machine,
    num_rows: int | None = None,
    *,
    free_ram_bytes: int | None = None,
) -> StepTime:
    """Returns what a step and the run of a resolved recipe take.

    Args:
        recipe: resolved.
        shape: of the model.
        weights: of the run.
        machine: one of all machines; its GPUs are alike.
        num_rows: of the training data; None where it is not known.
        free_ram_bytes: host memory that is left for pages of the base's file; None counts every
            use of a page as read from the disk.
    """
    workload = workload_of(recipe)
    work = step_work(recipe, shape)
    gpu = machine.gpus[0] if machine.gpus and recipe.launch.device == "cuda" else None
    compute = None if gpu is None else compute_time(work, recipe, shape, weights, workload, gpu)
    links = step_links(recipe, shape, weights, machine, gpu, free_ram_bytes=free_ram_bytes)
    step_s = None if compute is None else step_seconds(compute, links)
    total_steps = count_steps(recipe, num_rows)
    total_s = None if step_s is None or total_steps is None else step_s * total_steps
    price = machine.price_per_hour
    return StepTime(
        flops=work.flops,
        compute_s=None if compute is None else compute.total_s,
        transfers=tuple(_transfer(link, compute, workload) for link in links),
        step_s=step_s,
        tokens_per_s=None if step_s is None else workload.step_tokens / step_s,
        total_steps=total_steps,
        total_s=total_s,
        price=None if total_s is None or price is None else total_s / SECONDS_PER_HOUR * price,
    )


def time_notes(recipe: Recipe, machine: Machine, time: StepTime) -> tuple[str, ...]:
    """Returns what the reader should know about the seconds of a plan, where its GPU is known.

    Args:
        recipe: resolved.
        machine: that it is for.
        time: what `plan_time` said.
    """
    if recipe.launch.device != "cuda":
        return ("time on a CPU is not estimated",)
    if not machine.gpus or machine.gpus[0].bf16_flops is None:
        return ()
    gpu, dtype = machine.gpus[0], precision_of(recipe).compute
    if dtype == "bf16" and not gpu.has_bf16:
        return (f"the {gpu.name} does not compute in bf16: use `model.dtype=fp16`",)
    if not computes_fast(recipe, gpu):
        return (f"time is not known: no rate of the {gpu.name} in {dtype} is known",)
    found = ["seconds are estimates, within about 30% of what was measured (docs/concepts/time.md)"]
    if int(recipe.launch.nproc_per_node) * recipe.launch.max_nodes > 1:
        found.append("how far transfers between ranks hide behind computing was not measured yet")
    unknown = {each.link for each in time.transfers if each.seconds is None}
    found += [f"time is not known: {OPTIONS[link]}" for link in OPTIONS if link in unknown]
    return tuple(found)


def _transfer(link: Link, compute: ComputeTime | None, workload: Workload) -> Transfer:
    return Transfer(
        link.name,
        link.num_bytes,
        link.seconds,
        None if compute is None else hiding_tokens(link, compute, workload),
        link.hides,
        link.num_bytes / compute.kernels_s if compute is not None and compute.kernels_s else None,
    )


def hiding_tokens(link: Link, compute: ComputeTime, workload: Workload) -> int | None:
    """Returns from how many tokens of a micro-batch on a transfer takes less than computing.

    A micro-batch moves the same weights however many tokens it has. It is taken to grow by chunks
    as large as those of the recipe (`training.layer_chunks`): memory stays that of one chunk, and
    the time to compute grows with the tokens.

    Returns:
        None where the link is not known, or carries what grows with the tokens too.
    """
    if link.seconds is None or link.grows_with_rows or not compute.kernels_s:
        return None
    return math.ceil(link.seconds / compute.kernels_s * workload.tokens)


def count_steps(recipe: Recipe, num_rows: int | None) -> int | None:
    """Returns the optimizer steps of a run, None where that depends on rows nobody has counted."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    if num_rows is None:
        return None
    rows = math.ceil(num_rows * (training.epochs or 1.0))
    return max(1, math.ceil(rows / workload_of(recipe).global_rows))


def step_links(
    recipe: Recipe,
    shape: ModelShape,
    weights: Weights,
    machine: Machine,
    gpu: Gpu | None,
    *,
    free_ram_bytes: int | None,
) -> tuple[Link, ...]:
    """Returns what every link that carries anything does in a step."""
    traffic, workload = step_traffic(recipe, shape, weights), workload_of(recipe)
    on_disk, apart = recipe.fsdp.offload == "disk", weights.num_shards > 1
    bus = None if gpu is None else gpu.link_bandwidth
    copying = bus if bus is None or not on_disk else min(bus, UNPINNED_BANDWIDTH)
    peer = None if gpu is None else gpu.peer_bandwidth
    over_host = peer is None
    if over_host and bus is not None:
        peer = bus * OVER_HOST_SHARE
    read = _read_bytes(recipe, weights, workload, traffic, free_ram_bytes)
    links = (
        _link("host to device", traffic.shards_to_device, copying, apart and not on_disk, True),
        _link("device to host", traffic.gradients_to_host, bus, apart, False),
        _link("activations", 2 * traffic.activations, bus, True, True, True),
        _link("gather", traffic.received, peer, True, over_host),
        _link("reduce", traffic.sent, peer, True, over_host),
        _link("network", traffic.network, machine.network_bandwidth, True, False),
        _link("disk", read, machine.disk_bandwidth, True, False),
    )
    return tuple(link for link in links if link.num_bytes)


def _link(
    name: str,
    num_bytes: int,
    bandwidth: float | None,
    hides: bool,
    shares_bus: bool,
    grows_with_rows: bool = False,
) -> Link:
    seconds = None if bandwidth is None else num_bytes / bandwidth
    return Link(name, num_bytes, seconds, hides, shares_bus, grows_with_rows)


def _read_bytes(
    recipe: Recipe,
    weights: Weights,
    workload: Workload,
    traffic: Traffic,
    free_ram_bytes: int | None,
) -> int:
    """Returns what a step reads from the disk: what memory does not hold of the file.

    A step runs over the layers forward and backward, so of a file larger than memory the pages used
    last are needed first again.
    """
    file_bytes = workload.num_local_ranks * weights.shard.frozen
    if free_ram_bytes is None or not file_bytes or recipe.fsdp.offload != "disk":
        return traffic.read
    missing = max(0.0, 1.0 - max(0, free_ram_bytes) / file_bytes)
    return int(traffic.read * missing)


def step_seconds(compute: ComputeTime, links: tuple[Link, ...]) -> float | None:
    """Returns how long a step takes, None where a link that carries something is not known."""
    if any(link.seconds is None for link in links):
        return None
    exposed = sum(link.seconds or 0.0 for link in links if not link.hides)
    bus = sum(link.seconds or 0.0 for link in links if link.hides and link.shares_bus)
    others = [link.seconds or 0.0 for link in links if link.hides and not link.shares_bus]
    return max(compute.kernels_s, bus, *others) + exposed + compute.optimizer_s
