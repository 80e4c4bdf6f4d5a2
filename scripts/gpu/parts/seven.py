"""Training of 7B on one device: fsdpq's settings, and stock libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fsdpq.dist import start_process_group
from fsdpq.fsdp import offload
from fsdpq.metrics.peaks import GIB, peaks, release, reset_peaks, synchronize
from fsdpq.worker.bench.contenders import (
    PREPARED,
    UNPREPARED,
    ContenderOptions,
    build_contender,
)
from fsdpq.worker.bench.shapes import Batch, Shape, step_flops
from scripts.gpu.parts import Bench
from scripts.gpu.parts.copies import seconds_of
from scripts.gpu.training import Sections, build_trainer, device_memory, measure, phases

LORA_RANK = 64
VARIANTS: dict[str, Sections] = {
    "fsdpq": {},
    "no checkpointing": {"fsdp": {"activation_checkpointing": "none"}},
    "selective checkpointing": {"fsdp": {"activation_checkpointing": "selective"}},
    "activation_offload": {"fsdp": {"activation_offload": True}},
    "offload cpu": {"fsdp": {"offload": "cpu"}},
    "offload cpu, not pinned": {"fsdp": {"offload": "cpu"}},
    "offload cpu, trained stay": {"fsdp": {"offload": "cpu", "offload_trained": False}},
    "bf16 base": {"quantization": {"kind": "none"}},
    "dora": {"adapter": {"kind": "dora", "rank": LORA_RANK, "alpha": 2.0 * LORA_RANK}},
    "compile": {"training": {"compile": True}},
    "hqq 4 bit": {"quantization": {"kind": "hqq", "nbits": 4}},
}
SEVERAL_ROWS = ("fsdpq", "compile")
"""Variants that are measured with four rows too."""


def variants(bench: Bench, names: tuple[str, ...] = tuple(VARIANTS)) -> None:
    """Measures fsdpq with every setting of `VARIANTS`."""
    device = start_process_group(bench.device.type)
    shape, tokens = bench.shape("7b"), bench.tokens(2048)
    for name in names:
        bench.rows.attempt(name, _variant, bench, shape, tokens, device, name)
        release(device)


@contextmanager
def not_pinned() -> Iterator[None]:
    """Makes fsdpq believe that this system cannot pin host memory, as pages of a file cannot be."""
    ask, offload.why_not_pinned = offload.why_not_pinned, lambda: "not asked for"
    try:
        yield
    finally:
        offload.why_not_pinned = ask


def _variant(
    bench: Bench, shape: Shape, tokens: int, device: torch.device, name: str
) -> dict[str, Any]:
    trainer = build_trainer(
        shape, tokens, device, lora_rank=LORA_RANK, sections=VARIANTS[name]
    )  # fmt: skip
    rounds = 2 if bench.tiny else 5
    found = measure(trainer, Batch(1, tokens), rounds=rounds, warmups=2)
    found |= phases(trainer, Batch(1, tokens))
    if name in SEVERAL_ROWS:
        many = Batch(4, tokens)
        bench.rows.write(f"{name}, 4 rows", measure(trainer, many, rounds=rounds, warmups=1))
    return found


def contenders(bench: Bench) -> None:
    """Measures stock libraries, prepared as documented and unprepared."""
    for name in (PREPARED, UNPREPARED):
        _contender(bench, name, "7b", LORA_RANK, many=4)


def contender_70b(bench: Bench) -> None:
    """Measures stock libraries, prepared as documented, with 70B on the device."""
    _contender(bench, PREPARED, "70b", 16, many=2)


def _contender(bench: Bench, name: str, shape_name: str, lora_rank: int, *, many: int) -> None:
    shape, tokens = bench.shape(shape_name), bench.tokens(2048)
    options = ContenderOptions(shape, None, "bf16", bench.device.type, lora_rank, tokens)
    run = bench.rows.build(f"{shape_name}, {name}", build_contender, name, options)
    for batch in (Batch(1, tokens), Batch(many, tokens)) if run else ():
        words = f"{shape_name}, {name}, {batch}"
        bench.rows.attempt(words, _contender_step, bench, run, options, batch)
    del run
    release(bench.device)


def _contender_step(
    bench: Bench, run: Any, options: ContenderOptions, batch: Batch
) -> dict[str, Any]:
    device = bench.device
    gc.collect()
    reset_peaks(device)
    losses: list[float] = []
    run(batch)
    step_s = seconds_of(lambda: losses.append(run(batch)), device, 2 if bench.tiny else 3)
    synchronize(device)
    flops = step_flops(options.shape, batch, lora_rank=options.lora_rank, recompute=True)
    return {
        "tokens_per_s": batch.size / step_s, "step_s": step_s, "tflops": flops / step_s / 1e12,
        "peak_gib": peaks(device)["peak_bytes"] / GIB,
        "host_gib": peaks(device)["host_bytes"] / GIB,
        "losses": [round(losses[0], 4), round(losses[-1], 4)], **device_memory(device),
    }  # fmt: skip
