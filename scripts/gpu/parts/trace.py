"""Where a step's time goes: kernels, copies from the host, and both at the same time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fsdpq.dist import start_process_group
from fsdpq.metrics.peaks import release, synchronize
from fsdpq.worker.bench.shapes import Batch, with_layers
from scripts.gpu.parts import Bench
from scripts.gpu.training import Sections, Trainer, build_trainer, step_of

LAYERS_70B = 20
"""Of 80: the others are alike."""

CASES: tuple[tuple[str, int, Sections, bool], ...] = (
    ("7b", 1, {}, False),
    ("7b", 4, {}, False),
    ("70b", 2, {}, False),
    ("70b", 2, {"fsdp": {"offload": "cpu"}}, False),
    ("70b", 2, {"fsdp": {"offload": "cpu"}}, True),
)
"""Shape, rows of 2048 tokens, sections, and whether forward asks for the next layer early."""

Span = tuple[float, float]
"""Start and end, microseconds."""


def run(bench: Bench) -> None:
    """Traces a step of each case."""
    device = start_process_group(bench.device.type)
    for name, rows, sections, early in CASES:
        words = f"{name}, {rows}x2048"
        words += ", base on the host" * bool(sections) + ", next layer early" * early
        bench.rows.attempt(words, _trace, bench, device, name, rows, sections, early)
        release(device)


def _trace(
    bench: Bench, device: torch.device, name: str, rows: int, sections: Sections, early: bool
) -> dict[str, Any]:
    shape, batch = bench.shape(name), Batch(rows, bench.tokens(2048))
    if name == "70b" and not bench.tiny:
        shape = with_layers(shape, LAYERS_70B)
    trainer = build_trainer(shape, batch.tokens, device, lora_rank=16, sections=sections)
    if early:
        _ask_early(trainer)
    step = step_of(shape, batch)
    for _ in range(2):
        trainer.step(step)
    synchronize(device)
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True) as profiler:
        started = time.perf_counter()
        trainer.step(step)
        synchronize(device)
        seconds = time.perf_counter() - started
    events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
    return {"traced_step_s": seconds} | summary(
        [(e.name, (e.time_range.start, e.time_range.end)) for e in events]
    )


def _ask_early(trainer: Trainer) -> None:
    """Makes FSDP2 start to gather a layer before the one in front of it is computed."""
    layers = list(trainer.model.decoder_layers)
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])


def summary(events: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """Returns seconds of kernels, of copies from the host, and of both at the same time."""
    events = list(events)
    copies = union(span for name, span in events if "HtoD" in name)
    kernels = union(span for name, span in events if not name.startswith("Mem"))
    both = length(copies) + length(kernels) - length(union([*copies, *kernels]))
    return {
        "num_kernels": sum(not name.startswith("Mem") for name, _ in events),
        "kernels_s": length(kernels) / 1e6,
        "from_host_s": length(copies) / 1e6,
        "both_s": both / 1e6,
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """Returns the spans in order, overlapping ones joined."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(spans: Iterable[Span]) -> float:
    """Returns the time that spans take, which do not overlap."""
    return sum(end - start for start, end in spans)
