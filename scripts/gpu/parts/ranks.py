"""Memory of rank 0 of several, on one device: a process group whose collectives do nothing.

Shards and gathered buffers are as large as in a real run; what is gathered is garbage, so losses
and times mean nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fsdpq.metrics.peaks import GIB, cap_memory, peaks, release, reset_peaks
from fsdpq.worker.random_base import EmptySource
from scripts.bench_train.shapes import Batch
from scripts.gpu.parts import Bench
from scripts.gpu.training import Sections, build_trainer, device_memory, step_of

CASES: tuple[tuple[str, int, int, Sections], ...] = (
    ("70b", 8, 2, {}),
    ("70b", 8, 4, {"training": {"layer_chunks": 4, "micro_batch_size": 4}}),
    ("70b", 4, 1, {}),
    ("70b", 2, 1, {}),
    ("70b", 2, 2, {"fsdp": {"activation_offload": True}}),
    ("70b", 2, 2, {"fsdp": {"offload": "cpu"}}),
    ("70b", 8, 2, {"fsdp": {"offload": "cpu"}}),
    ("405b", 8, 1, {"fsdp": {"offload": "cpu", "activation_offload": True}}),
)
"""Shape, ranks, rows of 2048 tokens, sections of the recipe."""


def run(bench: Bench) -> None:
    """Measures rank 0 of each number of ranks, capped to 24 GiB."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if bench.device.type == "cuda":
        torch.cuda.set_device(bench.device)
    for shape, num_ranks, rows, sections in CASES:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
        cap_memory(24.0, bench.device)
        words = ", ".join(f"{k}={v}" for each in sections.values() for k, v in each.items())
        name = f"{shape}, rank 0 of {num_ranks}, {rows}x2048{', ' * bool(words)}{words}"
        bench.rows.attempt(name, _peak, bench, shape, rows, sections)
        release(bench.device)
        dist.destroy_process_group()


def _peak(bench: Bench, shape_name: str, rows: int, sections: Sections) -> dict[str, Any]:
    device, batch = bench.device, Batch(rows, bench.tokens(2048))
    shape = bench.shape(shape_name)
    trainer = build_trainer(
        shape, batch.tokens, device, lora_rank=16, sections=sections, source=EmptySource()
    )
    loaded = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    reset_peaks(device)
    for _ in range(2):
        trainer.step(step_of(shape, batch))
    return {
        "loaded_gib": loaded, "peak_gib": peaks(device)["peak_bytes"] / GIB,
        "host_gib": peaks(device)["host_bytes"] / GIB, **device_memory(device),
    }  # fmt: skip
