"""What ``fsdp.offload: disk`` adds to a run: reading ahead, a watch over the file, arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import psutil

from fsdpq import dist
from fsdpq.fsdp.group_read_ahead import apply_read_ahead
from fsdpq.fsdp.wrap import reshards_after_forward
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.mapped_base import MappedBase
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.fsdp import FsdpOptions

GB = 1e9

M_MMAP_THRESHOLD = -3
"""Of glibc's ``mallopt``."""

RETURNED_BYTES = 1 << 20
"""Buffers from this size on go back to the system when they are freed."""


def return_freed_memory(recipe: Recipe) -> None:
    """Makes the C library return freed buffers to the system, where memory is what is short.

    glibc keeps freed buffers of up to 32 MB, and those of gathered layers leave holes in its heap
    that the next layer does not fit into: on a CPU the heap grows towards the size of the base,
    which the file was to replace. On a GPU layers are gathered in its own memory.
    """
    if recipe.launch.device == "cpu" and recipe.fsdp.offload == "disk":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)


def read_ahead(model: CausalLM, mapped: MappedBase, options: FsdpOptions) -> None:
    """Makes the groups of a loaded model announce those that run after them, in place."""
    first, *rest = model.embedding_groups
    layers = list(model.decoder_layers)
    apply_read_ahead(
        [first, *([layer] for layer in layers), *rest],
        layers=layers,
        descriptor=mapped.descriptor,
        ranges=mapped.ranges,
        reshards=reshards_after_forward(options),
    )


def base_watch(mapped: MappedBase | None, events: MetricSink) -> Callable[[], None]:
    """Returns what is to be called now and then while a model trains over a mapped base.

    It tells the user what has become of the file and, once, what of it is memory after all.

    Raises:
        DamagedBaseError: by the function: the file was changed underneath.
    """
    is_first = True

    def watch() -> None:
        nonlocal is_first
        if mapped is None:
            return
        notices = mapped.check_unchanged()
        if is_first and (copied := mapped.count_copied_bytes()):
            notices.append(
                f"{copied / 1e6:.1f} MB of the base's rows are copies in memory, not pages of its "
                "file: the file ends before the rows that pad them; `fsdpq quantize` writes one "
                "that does not"
            )
        is_first = False
        for notice in notices:
            events.write({"event": "notice", "message": notice})

    return watch


def reading_notices(recipe: Recipe, mapped: MappedBase | None) -> Iterator[str]:
    """Yields what the user should know about the time that reading takes.

    Ranks: all (collective).
    """
    if mapped is None:
        return
    rate = sum(dist.gather_numbers(mapped.disk_bytes_per_s))
    rows = recipe.training.micro_batch_size * dist.world_size()
    notice = describe_reading(
        mapped.file_bytes,
        free_bytes=psutil.virtual_memory().available,
        bytes_per_s=rate,
        num_micro_batches=-(-(recipe.training.global_batch_size or rows) // rows),
        num_passes=2 if reshards_after_forward(recipe.fsdp) else 1,
    )
    if notice:
        yield notice


def describe_reading(
    file_bytes: int,
    *,
    free_bytes: int,
    bytes_per_s: float,
    num_micro_batches: int,
    num_passes: int,
) -> str:
    """Returns what reading a base that does not fit into memory costs a step; else an empty text.

    Args:
        file_bytes: of the base.
        free_bytes: memory that the system can use for pages of the file.
        bytes_per_s: of the disk, all ranks together; 0 where it is not known.
        num_micro_batches: of a step on one rank.
        num_passes: passes over the layers in a micro-batch that read them.
    """
    missing = file_bytes - free_bytes
    if missing <= 0:
        return ""
    per_step = missing * num_passes * num_micro_batches
    times = num_passes * num_micro_batches
    text = f"the base ({file_bytes / GB:.1f} GB) is larger than the memory that is free "
    text += f"({free_bytes / GB:.1f} GB): about {missing / GB:.1f} GB of it are read from the disk "
    text += f"{times} times a step, {per_step / GB:.1f} GB; "
    if not bytes_per_s:
        return text + "how long that takes is not known, as its pages were in memory at the start"
    text += f"at the {bytes_per_s / GB:.2f} GB/s of the check at the start that is "
    text += f"{per_step / bytes_per_s:.0f} s a step, less what computing hides; "
    return (
        text + "a larger `training.micro_batch_size` with `training.layer_chunks` reads less often"
    )
