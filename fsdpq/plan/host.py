"""Host memory of one machine: its processes, what is offloaded to it, and on a CPU everything.

What CUDA may copy beside the computation lies in pinned memory, which takes more than its bytes
(`fsdpq.plan.costs.pinned`). Rows of prepared data, and with ``fsdp.offload: disk`` the base, are
pages of files, which the system drops when memory is short.
"""

from __future__ import annotations

from collections.abc import Iterator

from fsdpq.plan.costs.expansion import layer_sources
from fsdpq.plan.costs.parameters import DTYPE_BYTES
from fsdpq.plan.costs.pinned import pinned_bytes
from fsdpq.plan.device import plan_device_memory
from fsdpq.plan.hardware.machine import MIB
from fsdpq.plan.result import Category, HostMemory, Moment
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.weights import Weights
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LlamaProOptions

LAUNCHER_BYTES = 35 * MIB
"""``fsdpq train``, without what it shares. Measured on Linux x86-64, as the four that follow, with
torch 2.13 (CPU) and Python 3.12; `docs/developing/plan.md` says how."""

TORCHRUN_BYTES = 146 * MIB
"""torchrun's own process, without what it shares."""

CPU_RANK_BYTES = 305 * MIB
"""A rank on a CPU that has imported torch and transformers."""

LATE_BYTES = 33 * MIB
"""What a rank on a CPU imports later, up to its second step."""

SHARED_BYTES = 125 * MIB
"""Pages of the libraries' files that the processes of a machine share."""

HEAP_BYTES = 320 * MIB
"""What a rank on a CPU holds beyond what it asked for: glibc's heap keeps freed blocks of up to 32
MiB, and leaves holes, more of them with every new length of rows; oneDNN keeps what it compiled for
one. Measured: 300 MiB in the 24 steps of the quickstart, 0 to 350 MiB elsewhere. Half as much where
glibc is told to map every block of half a MiB, which makes a step 12 to 15% slower."""

EARLY_HEAP_BYTES = 128 * MIB
"""The same after two steps, which is what ``fsdpq plan --measure`` does."""

CUDA_RANK_BYTES = 1790 * MIB
"""A rank on a GPU: libraries, CUDA's context, pages of the libraries' files. Measured as resident
memory over pinned and other tensors, one rank of 70B on an H200 (``docs/benchmarks/gpu.md``)."""

_CPU_PARTS: dict[Category, str] = {
    "codes": "base", "scales": "base", "plain": "base",
    "trained": "trained", "gradients": "gradients", "optimizer": "optimizer",
}  # fmt: skip

STAGED_ROWS_BYTES = 16 * MIB
"""Rows of an unquantized tensor that are read at once (``model/loading/source.py``)."""

MIN_OFFLOADED_BYTES = 64 << 10
"""Smaller activations stay on the device (``fsdp/activations.py``)."""


def plan_host_memory(recipe: Recipe, shape: ModelShape, weights: Weights) -> HostMemory:
    """Returns the host memory of the machine with the most of a run.

    Args:
        recipe: resolved.
        shape: of its model.
        weights: what its FSDP groups store.
    """
    work = workload_of(recipe)
    if recipe.launch.device == "cpu":
        return _on_cpu(recipe, shape, weights, work)
    parts = {"processes": LAUNCHER_BYTES + TORCHRUN_BYTES + work.num_local_ranks * CUDA_RANK_BYTES}
    unpinned = 0
    if recipe.fsdp.offload != "none":
        for name, own in _offloaded(recipe, weights).items():
            parts[name] = work.num_local_ranks * own
        unpinned = work.num_local_ranks * _loaded_bytes(recipe, weights)
    if recipe.fsdp.activation_offload:
        own = sum(map(pinned_bytes, offloaded_inputs(recipe, shape, work)))
        parts["activations"] = work.num_local_ranks * own
    staged = work.num_local_ranks * _staged_bytes(weights)
    return HostMemory(
        parts={name: num_bytes for name, num_bytes in parts.items() if num_bytes},
        file_backed_bytes=_mapped_bytes(weights, work) if recipe.fsdp.offload == "disk" else 0,
        load_bytes=parts["processes"] + unpinned + staged,
    )


def offloaded_inputs(recipe: Recipe, shape: ModelShape, work: Workload) -> Iterator[int]:
    """Yields the bytes of every layer input that lies in host memory at the end of a forward.

    One for each chunk of a layer that is computed again, but for the last such layer, which
    backward begins with.
    """
    element = DTYPE_BYTES[precision_of(recipe).base]
    row_bytes = work.seq_len * shape.hidden_size * element
    rows, extra = divmod(work.rows, work.layer_chunks)
    num_inputs = max(0, _num_recomputed(recipe, shape) - 1)
    for chunk in range(work.layer_chunks):
        chunk_bytes = (rows + (chunk < extra)) * row_bytes
        if chunk_bytes >= MIN_OFFLOADED_BYTES:
            yield from (chunk_bytes for _ in range(num_inputs))


def _num_recomputed(recipe: Recipe, shape: ModelShape) -> int:
    """Returns the decoder layers that backward computes again (`fsdpq.fsdp.layers`)."""
    num_layers, first = shape.num_layers, 0
    if isinstance(recipe.adapter, LlamaProOptions):  # nothing is kept for layers below all new ones
        sources = layer_sources(recipe.adapter, num_layers)
        first = next(i for i in range(1, len(sources)) if sources[i] == sources[i - 1])
        num_layers = len(sources)
    every = {"full": 1, "selective": 2, "none": 0}[recipe.fsdp.activation_checkpointing]
    return sum(layer >= first for layer in range(0, num_layers, every)) if every else 0


def _offloaded(recipe: Recipe, weights: Weights) -> dict[str, int]:
    """What one rank holds in host memory because of ``fsdp.offload``, by what it is for."""
    own, pins = weights.shard, recipe.fsdp.offload == "cpu"
    found = {"base": own.frozen_pinned} if pins else {}
    if recipe.fsdp.offload_trained:
        found["trained"] = found["gradients"] = own.trained_pinned if pins else own.trained
        found["optimizer"] = own.optimizer
    return found


def _loaded_bytes(recipe: Recipe, weights: Weights) -> int:
    """What one rank has in host memory once it is loaded; the first step pins it."""
    own = weights.shard
    base = own.frozen if recipe.fsdp.offload == "cpu" else 0
    return base + (own.trained if recipe.fsdp.offload_trained else 0)


def _mapped_bytes(weights: Weights, work: Workload) -> int:
    """Pages of the base's file that the ranks of this machine use; copies are the same pages."""
    return (
        weights.whole.frozen * min(work.num_local_ranks, weights.num_shards) // weights.num_shards
    )


def _staged_bytes(weights: Weights) -> int:
    """Rows of one matrix as they are read, before the device has them."""
    rows = max((group.largest_matrix for group in weights.groups), default=0) // weights.num_shards
    return max(STAGED_ROWS_BYTES, 2 * rows)


def _on_cpu(recipe: Recipe, shape: ModelShape, weights: Weights, work: Workload) -> HostMemory:
    """Everything is host memory: what would lie on a device, too."""
    ranks, moments = work.num_local_ranks, plan_device_memory(recipe, shape, weights).moments
    loading = [moment for moment in moments if moment.phase in ("load", "init")]
    training = [moment for moment in moments if moment.phase not in ("load", "init")]
    own = CPU_RANK_BYTES + LATE_BYTES
    parts = {
        "processes": LAUNCHER_BYTES + TORCHRUN_BYTES + SHARED_BYTES + ranks * own,
        "heap": ranks * HEAP_BYTES,
    }
    for category, num_bytes in max(training, key=_allocated).parts.items():
        name = _CPU_PARTS.get(category, "activations")
        parts[name] = parts.get(name, 0) + ranks * num_bytes
    return HostMemory(
        parts=parts,
        file_backed_bytes=_mapped_bytes(weights, work) if recipe.fsdp.offload == "disk" else 0,
        load_bytes=parts["processes"] + ranks * max(map(_allocated, loading), default=0),
    )


def _allocated(moment: Moment) -> int:
    return moment.allocated


def early_process_bytes(host: HostMemory, num_ranks: int) -> int:
    """Returns what the process of a rank on a CPU takes in its first two steps.

    Args:
        host: of `plan_host_memory`, for a CPU.
        num_ranks: of the machine.
    """
    return host.total // num_ranks - (HEAP_BYTES - EARLY_HEAP_BYTES)
