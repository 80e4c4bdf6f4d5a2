"""What ``fsdp.offload: disk`` adds to a run: reading ahead, a watch over the file, arithmetic."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from fsdpq import dist
from fsdpq.fsdp.group_read_ahead import apply_read_ahead
from fsdpq.fsdp.wrap import reshards_after_forward
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.mapped_base import MappedBase
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.fsdp import FsdpOptions

GB = 1e9


def read_ahead(
    model: CausalLM, mapped: MappedBase, options: FsdpOptions, device: torch.device
) -> None:
    """Makes the groups of a loaded model announce those that run after them, in place."""
    first, *rest = model.embedding_groups
    layers = list(model.decoder_layers)
    apply_read_ahead(
        [first, *([layer] for layer in layers), *rest],
        layers=layers,
        descriptor=mapped.descriptor,
        ranges=mapped.ranges,
        reshards=reshards_after_forward(options),
        on_visit=heap_trimmer(device),
    )


def heap_trimmer(device: torch.device) -> Callable[[], Any]:
    """Returns what gives freed memory back to the system, to be called between groups.

    On a CPU gathered layers are ordinary memory. glibc keeps freed buffers of up to 32 MB, and they
    leave holes in its heap that the next layer does not fit into: the heap grows towards the size
    of the base, which the file was to replace. On a GPU layers are gathered in its own memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    return (lambda: None) if trim is None else (lambda: trim(0))


def base_watch(
    mapped: MappedBase | None, events: MetricSink, device: torch.device
) -> Callable[[], None]:
    """Returns what is to be called now and then while a model trains over a mapped base.

    It gives the memory of the last layers back, and tells the user what has become of the file and,
    once, what of it is memory after all.

    Raises:
        DamagedBaseError: by the function: the file was changed underneath.
    """
    is_first, trim = True, heap_trimmer(device)

    def watch() -> None:
        nonlocal is_first
        if mapped is None:
            return
        trim()
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
        num_passes: passes over the layers in a micro-batch that read them: 2 where the backward
            pass gathers them again, from the last to the first, and 1 where it does not.
    """
    if file_bytes <= free_bytes:
        return ""
    # There and back, what was used last is needed first and still there; round and round, the
    # system has always just dropped what comes next.
    missing = file_bytes - free_bytes if num_passes == 2 else file_bytes
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
