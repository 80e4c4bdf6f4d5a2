"""Training of 70B on one device: capped, with the base in host memory, and whole on the device."""

from __future__ import annotations

import torch

from fsdpq.dist import start_process_group
from fsdpq.fsdp.activations import build_host_activations
from fsdpq.metrics.peaks import cap_memory, release
from fsdpq.worker.bench.shapes import Batch
from scripts.gpu.parts import Bench
from scripts.gpu.training import Trainer, build_trainer, measure, phases, set_layer_runs

LORA_RANK = 16
SETTINGS: tuple[tuple[int, int, int, bool, int], ...] = (
    (1, 2048, 1, False, 2),
    (2, 2048, 1, False, 2),
    (2, 2048, 1, True, 1),
    (8, 2048, 8, True, 1),
    (1, 8192, 1, True, 1),
)
"""Rows, tokens, layer_chunks, activation_offload; and how many steps are timed."""

CAPS_GIB = (16.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0)
"""Lower and lower, until a step does not fit."""


def offloaded(bench: Bench) -> None:
    """Measures 70B with its base in host memory on a device capped to 24 GiB, then to less."""
    device = start_process_group(bench.device.type)
    cap_memory(24.0, device)
    trainer = bench.rows.build(
        "offload cpu", build_trainer, bench.shape("70b"), bench.tokens(8192), device,
        lora_rank=LORA_RANK, sections={"fsdp": {"offload": "cpu"}},
    )  # fmt: skip
    if trainer is None:
        return
    host, notice = build_host_activations(device)
    if notice:
        bench.rows.write("notice", {"text": notice})
    for rows, tokens, num_chunks, keeps_on_host, rounds in SETTINGS:
        set_layer_runs(trainer, num_chunks=num_chunks, host=host if keeps_on_host else None)
        batch = Batch(rows, bench.tokens(tokens))
        words = f", {num_chunks} chunks" * (num_chunks > 1)
        words += ", activations on the host" * keeps_on_host
        name = f"24 GiB, {batch}{words}"
        if not bench.rows.attempt(name, measure, trainer, batch, rounds=rounds):
            return
        release(device)
    set_layer_runs(trainer, num_chunks=1, host=None)
    bench.rows.attempt("24 GiB, phases", phases, trainer, Batch(1, bench.tokens(2048)))
    set_layer_runs(trainer, num_chunks=1, host=host)
    _lower_caps(bench, trainer, device)


def _lower_caps(bench: Bench, trainer: Trainer, device: torch.device) -> None:
    batch = Batch(1, bench.tokens(2048))
    for gib in CAPS_GIB[:2] if device.type == "cpu" else CAPS_GIB:
        cap_memory(gib, device)
        name = f"{gib:g} GiB, {batch}, activations on the host"
        if not bench.rows.attempt(name, measure, trainer, batch, rounds=1):
            return


def on_device(bench: Bench) -> None:
    """Measures 70B with its base on the device."""
    device, tokens = start_process_group(bench.device.type), bench.tokens(2048)
    trainer = bench.rows.build(
        "on the device", build_trainer, bench.shape("70b"), tokens, device,
        lora_rank=LORA_RANK, sections={},
    )  # fmt: skip
    if trainer is None:
        return
    for rows in (1, 2):
        name = f"on the device, {rows}x{tokens}"
        bench.rows.attempt(name, measure, trainer, Batch(rows, tokens), rounds=2)
    bench.rows.attempt("on the device, phases", phases, trainer, Batch(1, tokens))
