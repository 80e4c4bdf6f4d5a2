"""Host memory of one machine: its processes, what is offloaded to it, and on a CPU everything.

What CUDA may copy beside the computation lies in pinned memory, which torch's allocator hands out
in blocks of a power of two and never gives back (torch 2.13,
``aten/src/ATen/core/CachingHostAllocator.h``): a tensor of 117 MB takes 134 MB. Rows of prepared
data, and with ``fsdp.offload: disk`` the base, are pages of files, which the system drops when
memory is short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fsdpq.plan.result import HostMemory
from fsdpq.plan.shape import ModelShape, TensorShape
from fsdpq.plan.weights import Weights
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.precision import base_dtype
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.optimizer import AdamW8bitOptions, MuonOptions, SgdOptions

MIB = 2**20

LAUNCHER_BYTES = 35 * MIB
"""``fsdpq train``, without what it shares. Measured on Linux x86-64, as the three that follow, with
torch 2.13 (CPU) and Python 3.12; `docs/developing/plan.md` says how."""

TORCHRUN_BYTES = 146 * MIB
"""torchrun's own process, without what it shares."""

CPU_RANK_BYTES = 338 * MIB
"""A rank on a CPU that has imported torch and transformers and has done a step of a tiny model."""

SHARED_BYTES = 125 * MIB
"""Pages of the libraries' files that the processes of a machine share."""

CUDA_RANK_BYTES = 1790 * MIB
"""A rank on a GPU: libraries, CUDA's context, pages of the libraries' files. Measured as resident
memory over pinned and other tensors, one rank of 70B on an H200 (``docs/benchmarks/gpu.md``)."""

STAGED_ROWS_BYTES = 16 * MIB
"""Rows of an unquantized tensor that are read at once (``model/loading/source.py``)."""

MIN_OFFLOADED_BYTES = 64 << 10
"""Smaller activations stay on the device (``fsdp/activations.py``)."""

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def plan_host_memory(recipe: Recipe, shape: ModelShape, weights: Weights) -> HostMemory:
    """Returns the host memory of the machine with the most of a run.

    Args:
        recipe: resolved.
        shape: of its model.
        weights: what its FSDP groups store.
    """
    work = workload_of(recipe)
    if recipe.launch.device == "cpu":
        return _on_cpu(recipe, weights, work)
    parts = {"processes": LAUNCHER_BYTES + TORCHRUN_BYTES + work.num_local_ranks * CUDA_RANK_BYTES}
    unpinned = 0
    if recipe.fsdp.offload != "none":
        for name, own in _offloaded(recipe, shape, weights).items():
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


def pinned_bytes(num_bytes: int) -> int:
    """Returns what a tensor takes in pinned memory."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0


def optimizer_bytes(recipe: Recipe, trained_bytes: int, num_trained: int) -> int:
    """Returns the bytes of an optimizer's states.

    Args:
        recipe: names the optimizer.
        trained_bytes: of the weights, in the dtype in which they are held.
        num_trained: how many they are.
    """
    match recipe.optimizer:
        case AdamW8bitOptions():  # two means of a byte, and a fp32 number for 256 of each
            return 2 * num_trained + 2 * 4 * -(-num_trained // 256)
        case SgdOptions(momentum=momentum):
            return trained_bytes if momentum else 0
        case MuonOptions():  # matrices; vectors have AdamW's two, and are few
            return trained_bytes
        case _:
            return 2 * trained_bytes


def offloaded_inputs(recipe: Recipe, shape: ModelShape, work: Workload) -> Iterator[int]:
    """Yields the bytes of every layer input that lies in host memory at the end of a forward.

    One for each chunk of a layer that is computed again, but for the last layer, which backward
    begins with.
    """
    every = {"full": 1, "selective": 2, "none": 0}[recipe.fsdp.activation_checkpointing]
    element = ELEMENT_BYTES[base_dtype(recipe, "bf16") or "bf16"]
    row_bytes = work.seq_len * shape.hidden_size * element
    rows, extra = divmod(work.rows, work.layer_chunks)
    num_layers = -(-shape.num_layers // every) if every else 0
    for chunk in range(work.layer_chunks):
        chunk_bytes = (rows + (chunk < extra)) * row_bytes
        if chunk_bytes >= MIN_OFFLOADED_BYTES:
            yield from (chunk_bytes for _ in range(num_layers - 1))


def _offloaded(recipe: Recipe, shape: ModelShape, weights: Weights) -> dict[str, int]:
    """What one rank holds in host memory because of ``fsdp.offload``, by what it is for."""
    own, pins = weights.shard, recipe.fsdp.offload == "cpu"
    held: Callable[[int], int] = pinned_bytes if pins else int
    found: dict[str, int] = {}
    if pins:
        found["base"] = sum(map(held, _tensor_bytes(shape, weights, trained=False)))
    if recipe.fsdp.offload_trained:
        trained = sum(map(held, _tensor_bytes(shape, weights, trained=True)))
        found["trained"] = found["gradients"] = trained
        found["optimizer"] = optimizer_bytes(recipe, own.trained, own.num_trained)
    return found


def _loaded_bytes(recipe: Recipe, weights: Weights) -> int:
    """What one rank has in host memory once it is loaded; the first step pins it."""
    own = weights.shard
    base = own.frozen if recipe.fsdp.offload == "cpu" else 0
    return base + (own.trained if recipe.fsdp.offload_trained else 0)


def _tensor_bytes(shape: ModelShape, weights: Weights, *, trained: bool) -> Iterator[int]:
    """Yields the bytes of this rank's rows of every tensor, frozen or trained.

    A group's codes and scales are dealt to its matrices by their sizes, what is not quantized to
    its other tensors.
    """
    for group, held in zip(shape.groups, weights.groups, strict=False):
        if trained:
            yield from (held.shard.trained for _ in range(held.count))
            continue
        matrices = [tensor for tensor in group.tensors if tensor.kind in ("linear", "experts")]
        others = [tensor for tensor in group.tensors if tensor not in matrices]
        for _ in range(held.count):
            yield from _dealt(held.shard.codes, matrices)
            yield from _dealt(held.shard.scales, matrices)
            yield from _dealt(held.shard.plain, others if held.shard.codes else group.tensors)


def _dealt(num_bytes: int, tensors: Sequence[TensorShape]) -> Iterator[int]:
    total = sum(tensor.num_weights for tensor in tensors)
    return (num_bytes * tensor.num_weights // total for tensor in tensors if total)


def _mapped_bytes(weights: Weights, work: Workload) -> int:
    """Pages of the base's file that the ranks of this machine use; copies are the same pages."""
    return (
        weights.whole.frozen * min(work.num_local_ranks, weights.num_shards) // weights.num_shards
    )


def _staged_bytes(weights: Weights) -> int:
    """Rows of one matrix as they are read, before the device has them."""
    rows = max((group.largest_matrix for group in weights.groups), default=0) // weights.num_shards
    return max(STAGED_ROWS_BYTES, 2 * rows)


def _on_cpu(recipe: Recipe, weights: Weights, work: Workload) -> HostMemory:
    """Everything is host memory: what would lie on a device, too."""
    own, ranks = weights.shard, work.num_local_ranks
    processes = LAUNCHER_BYTES + TORCHRUN_BYTES + SHARED_BYTES + ranks * CPU_RANK_BYTES
    mapped = recipe.fsdp.offload == "disk"
    parts = {
        "processes": processes,
        "base": 0 if mapped else ranks * own.frozen,
        "trained": ranks * own.trained,
        "gradients": ranks * own.trained,
        "optimizer": ranks * optimizer_bytes(recipe, own.trained, own.num_trained),
    }
    return HostMemory(
        parts={name: num_bytes for name, num_bytes in parts.items() if num_bytes},
        file_backed_bytes=_mapped_bytes(weights, work) if mapped else 0,
        load_bytes=processes + parts["base"] + ranks * (own.trained + _staged_bytes(weights)),
    )
