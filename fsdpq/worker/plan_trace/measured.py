"""A recipe's step for real, rank 0 of any number of ranks, on a device that is there.

Weights are made on the device and collectives do nothing, so shards, gathered weights and buffers
are as large as in the run; values, and so losses, mean nothing. Two steps: the first one makes the
optimizer's states.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from fsdpq.metrics.peaks import peaks, reset_peaks, status_bytes, synchronize
from fsdpq.plan.result import Moment, Phase, RankMemory
from fsdpq.plan.traced import Traced
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.plan_trace.run import full_step
from fsdpq.worker.plan_trace.unreal_gpu import unreal_group
from fsdpq.worker.random_base import EmptySource, assemble_random

NUM_STEPS = 2


class _Peaks:
    """The most of each phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.by_phase: dict[Phase, int] = {}
        self.host_bytes = 0
        reset_peaks(device)

    def end(self, phase: Phase) -> None:
        """Ends a phase and begins the next one."""
        synchronize(self._device)
        found = peaks(self._device)
        self.by_phase[phase] = max(found["peak_bytes"], self.by_phase.get(phase, 0))
        self.host_bytes = max(self.host_bytes, found["host_bytes"])
        reset_peaks(self._device)


def measure_step(recipe: Recipe, config_dir: Path, *, trust_remote_code: bool = False) -> Traced:
    """Returns what rank 0 of a resolved recipe takes in a step, on this process's device.

    On a CPU that is resident memory of the process.

    Args:
        recipe: resolved.
        config_dir: holds the model's ``config.json``.
        trust_remote_code: run Python code that the model brings.
    """
    started = time.perf_counter()
    workload = workload_of(recipe)
    device = torch.device("cpu")
    if recipe.launch.device == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    measured = _Peaks(device)
    with unreal_group(workload):
        notes = _run(recipe, config_dir, device, measured, trust_remote_code=trust_remote_code)
    return _result(measured, device, notes, time.perf_counter() - started)


def _run(
    recipe: Recipe,
    config_dir: Path,
    device: torch.device,
    measured: _Peaks,
    *,
    trust_remote_code: bool,
) -> tuple[str, ...]:
    """Runs the steps; returns notes."""
    workload = workload_of(recipe)
    several = workload.num_ranks > 1
    assembled = assemble_random(
        recipe, config_dir, device=device, source=EmptySource() if several else None,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    measured.end("load")
    build_optimizer = resolve_builder("optimizer", recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, assembled.named_trainable)
    assembled.model.train()
    router = assembled.model.router_loss
    mode = StepMode(
        no_sync=recipe.fsdp.no_sync,
        on_phase=lambda phase: measured.end(_PHASES[phase]),
        router_aux_loss_coef=router.coefficient if router else 0.0,
    )
    step = full_step(workload)
    for _ in range(NUM_STEPS):
        train_step(
            assembled.model, step, optimizer=optimizer, parameters=assembled.trainable,
            max_grad_norm=recipe.training.max_grad_norm, device=device, mode=mode,
        )  # fmt: skip
    return ("weights are zeros, and what is gathered is garbage",) if several else ()


_PHASES: dict[str, Phase] = {
    "forward": "forward", "backward": "backward", "optimizer": "optimizer",
}  # fmt: skip


def _result(
    measured: _Peaks, device: torch.device, notes: tuple[str, ...], seconds: float
) -> Traced:
    moments = tuple(
        Moment(phase, phase, {"measured": num_bytes})
        for phase, num_bytes in measured.by_phase.items()
    )
    reserved = given = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, given = torch.cuda.max_memory_reserved(device), total - free
    host = {"resident": measured.host_bytes, "anonymous": status_bytes("RssAnon")}
    return Traced("measure", RankMemory(moments), host, seconds, reserved, given, notes)
