"""fsdpq's step with any settings, on random bases, and what it takes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.metrics.peaks import GIB, peaks, reset_peaks, synchronize
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.bench.contenders import (
    MAX_NORM,
    ContenderOptions,
    assemble_shape,
    batch_ids,
    recipe_of,
)
from fsdpq.worker.bench.shapes import Batch, Shape, step_flops

Sections = dict[str, dict[str, Any]]
PLAIN = StepMode()


@dataclass(frozen=True)
class Trainer:
    """A model that trains.

    Attributes:
        model: the root of what FSDP shards.
        optimizer: over ``parameters``.
        parameters: the trained ones.
        shape: of the model.
        lora_rank: of its adapters.
        device: where it computes.
        build_s: seconds that it took to build.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    shape: Shape
    lora_rank: int
    device: torch.device
    build_s: float

    def step(self, step: Step, *, mode: StepMode = PLAIN) -> float:
        """Does an optimizer step and returns the loss before it."""
        result = train_step(
            self.model, step, optimizer=self.optimizer, parameters=self.parameters,
            max_grad_norm=MAX_NORM, device=self.device, mode=mode,
        )  # fmt: skip
        return result.loss.item()


def build_trainer(
    shape: Shape,
    tokens: int,
    device: torch.device,
    *,
    lora_rank: int,
    sections: Sections,
    source: Any = None,
) -> Trainer:
    """Returns a model with random weights, or with those of ``source``.

    Args:
        shape: of the model.
        tokens: the longest row.
        device: this rank's; the process group is there.
        lora_rank: on all linears.
        sections: what the recipe has beyond NF4 and LoRA.
        source: of the base.
    """
    started = time.perf_counter()
    recipe = build_recipe(shape, tokens, device.type, lora_rank=lora_rank, sections=sections)
    assembled = assemble_shape(recipe, shape, tokens, device=device, source=source)
    return trainer_of(assembled, recipe, shape, device=device, started=started)


def build_recipe(
    shape: Shape, tokens: int, device_type: str, *, lora_rank: int, sections: Sections
) -> Recipe:
    """Returns a recipe over NF4 with double quantization, in bf16; see `build_trainer`."""
    options = ContenderOptions(shape, None, "bf16", device_type, lora_rank, tokens)
    return recipe_of(options, **sections)


def trainer_of(
    assembled: Assembled, recipe: Recipe, shape: Shape, *, device: torch.device, started: float
) -> Trainer:
    """Returns a model that trains, of one that is loaded.

    Args:
        assembled: the model.
        recipe: its own; the adapter is LoRA.
        shape: of the model.
        device: this rank's.
        started: when it was begun, by `time.perf_counter`.
    """
    optimizer = resolve_builder("optimizer", recipe.optimizer)(
        recipe.optimizer, assembled.named_trainable
    )
    assembled.model.train()
    synchronize(device)
    rank = getattr(recipe.adapter, "rank", 0)
    seconds = time.perf_counter() - started
    return Trainer(assembled.model, optimizer, assembled.trainable, shape, rank, device, seconds)


@functools.cache
def step_of(shape: Shape, batch: Batch, documents: int = 1) -> Step:
    """Returns one micro-batch in which every token but the first of a document carries loss.

    Args:
        shape: of the model.
        batch: its rows.
        documents: of equal length in each row; more than one makes it packed.
    """
    length = batch.tokens // documents
    mask = ([False] + [True] * (length - 1)) * documents
    lengths = (length,) * documents if documents > 1 else ()
    rows = [Row(ids, mask, lengths) for ids in batch_ids(shape, batch).tolist()]
    return build_step(rows, micro_batch_size=batch.rows, rank=0, world_size=1)


def measure(
    trainer: Trainer, batch: Batch, *, rounds: int, warmups: int = 1, documents: int = 1
) -> dict[str, Any]:
    """Returns what a step of ``batch`` takes: the median of ``rounds``, and peaks of all steps."""
    device = trainer.device
    step = step_of(trainer.shape, batch, documents)
    gc.collect()
    reset_peaks(device)
    losses, seconds = [], []
    for index in range(warmups + rounds):
        started = time.perf_counter()
        losses.append(trainer.step(step))
        synchronize(device)
        if index >= warmups:
            seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds)
    counted = functools.partial(step_flops, trainer.shape, batch, lora_rank=trainer.lora_rank)
    found: dict[str, Any] = {
        "tokens_per_s": batch.size / step_s,
        "step_s": step_s,
        "spread": max(seconds) / min(seconds),
        "tflops": counted(recompute=True) / step_s / 1e12,
        "model_tflops": counted(recompute=False) / step_s / 1e12,
        "peak_gib": peaks(device)["peak_bytes"] / GIB,
        "host_gib": peaks(device)["host_bytes"] / GIB,
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
        "build_s": round(trainer.build_s, 1),
    }
    return found | device_memory(device)


def device_memory(device: torch.device) -> dict[str, float]:
    """Returns what the allocator reserved at most, and what device and machine have given away."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.max_memory_reserved(device)
    host = psutil.virtual_memory()
    return {
        "reserved_gib": reserved / GIB,
        "used_gib": (total - free) / GIB,
        "machine_gib": (host.total - host.available) / GIB,
    }


def phases(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Returns the seconds of forward, backward and optimizer of one step, waited for apart."""
    found: dict[str, float] = {}
    last = [time.perf_counter()]

    def on_phase(phase: str) -> None:
        synchronize(trainer.device)
        now = time.perf_counter()
        found[f"{phase}_s"] = now - last[0]
        last[0] = now

    trainer.step(step_of(trainer.shape, batch), mode=StepMode(on_phase=on_phase))
    return found


def set_layer_runs(trainer: Trainer, **changes: Any) -> None:
    """Changes how all decoder layers run, in place: ``num_chunks``, ``host``."""
    for layer in trainer.model.decoder_layers:
        layer.layer_run = dataclasses.replace(layer.layer_run, **changes)
