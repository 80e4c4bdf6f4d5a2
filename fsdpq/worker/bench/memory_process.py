"""What one process of ``fsdpq bench memory`` does: loads a model, trains some steps, measures."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import rank, start_process_group, wait_for_all, world_size
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.tensor_files.base_manifest import base_key, read_manifest
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.assemble import assemble_model
from fsdpq.worker.base import QuantizedBase
from fsdpq.worker.bench.allocations import Allocations
from fsdpq.worker.bench.memory_setups import DORA, LORA, NF4, Setup
from fsdpq.worker.bench.resident import Resident
from fsdpq.worker.quantize import write_recipe_base

Phase = Callable[[str], Any]
TakeStep = Callable[[int, Phase], None]

PHASE_TOKENS = 2048
"""Of the step that is measured by phase, as near as the lengths come to it."""


@dataclass(frozen=True)
class Trainee:
    """A loaded model.

    Attributes:
        step: does one training step at a length and tells of the phases' ends.
        frozen_bytes: of this rank.
        trained_bytes: of this rank, without gradients and the optimizer's states.
    """

    step: TakeStep
    frozen_bytes: int
    trained_bytes: int


def make_step(setup: Setup, length: int) -> Step:
    """Returns this rank's part of a step of made-up rows, all of them trained."""
    generator = torch.Generator().manual_seed(length)
    rows: list[Row] = []
    for _ in range(setup.num_rows * world_size()):
        ids = torch.randint(3, 500, (length,), generator=generator).numpy().astype(np.int32)
        mask = np.ones(length, np.uint8)
        starts = [length * n // setup.num_documents for n in range(setup.num_documents + 1)]
        mask[starts[:-1]] = 0
        documents = tuple(stop - start for start, stop in itertools.pairwise(starts))
        rows.append(Row(ids, mask, documents if setup.num_documents > 1 else ()))
    return build_step(rows, micro_batch_size=setup.num_rows, rank=rank(), world_size=world_size())


def build_recipe(setup: Setup, directory: Path, device: str) -> Recipe:
    """Returns the recipe of a setup."""
    batch = setup.num_rows * world_size()
    packing = {"packing": "best_fit"} if setup.num_documents > 1 else {}
    document: dict[str, Any] = {
        "version": 1,
        "name": "bench",
        "model": {"name_or_path": str(directory), "dtype": "bf16"},
        "quantization": NF4,
        "adapter": LORA,
        "data": {"path": "rows.jsonl"} | packing,
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "lr_scheduler": {"kind": "constant"},
        "training": {"steps": 1, "global_batch_size": batch, "micro_batch_size": setup.num_rows},
        "launch": {"device": device, "nproc_per_node": world_size()},
    }
    for section, changes in setup.sections.items():
        replaced = {} if "kind" in changes else document.get(section, {})
        document[section] = replaced | changes
    return Recipe.model_validate(document)


def write_base(root: Path, name: str, device: torch.device) -> None:
    """Writes the quantized base of ``root/name`` beside it, for training from disk."""
    recipe = build_recipe(Setup("base"), root / name, device.type)
    content = (root / name / "config.json").read_bytes()
    key = base_key(
        model={"sha256": hashlib.sha256(content).hexdigest(), "revision": None, "source": name},
        quantization=recipe.quantization.model_dump(mode="json"),
        dtype=recipe.model.dtype,
        device=device.type,
    )
    base = root / f"{name}-base"
    base.mkdir()
    write_recipe_base(
        recipe, root / name, base, key=key, device=device, report=lambda _done, _total: None
    )


def write_bases(*, root: str, device: str) -> None:
    """Writes the bases of both models; in a process of its own."""
    where = start_process_group(device)
    for name in ("tiny", "model"):
        write_base(Path(root), name, where)


def load_fsdpq(setup: Setup, root: Path, model: str, device: torch.device, phase: Phase) -> Trainee:
    """Loads through the worker's own code."""
    recipe = build_recipe(setup, root / model, device.type)
    base = root / f"{model}-base"
    from_disk = recipe.fsdp.offload == "disk"
    assembled = assemble_model(
        recipe,
        root / model,
        device=device,
        report_load=lambda _done, _total: None,
        base=QuantizedBase(base, read_manifest(base).key) if from_disk else None,
        on_phase=phase,
    )
    build_optimizer = resolve_builder("optimizer", recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, assembled.named_trainable)
    assembled.model.train()

    def take(length: int, phase: Phase) -> None:
        train_step(
            assembled.model,
            make_step(setup, length),
            optimizer=optimizer,
            parameters=assembled.trainable,
            max_grad_norm=1.0,
            device=device,
            mode=StepMode(on_phase=phase),
        )

    return Trainee(take, assembled.own_bytes(trainable=False), assembled.own_bytes(trainable=True))


def load_stock(setup: Setup, root: Path, model: str, device: torch.device, phase: Phase) -> Trainee:
    """Loads with transformers, PEFT and bitsandbytes, recomputing every layer."""
    from fsdpq.worker.bench.reference import CHECKPOINTING, add_lora, load_4bit

    hf = load_4bit(root / model, dtype=torch.bfloat16, device=device)
    phase("load")
    hf.gradient_checkpointing_enable(CHECKPOINTING)
    hf.enable_input_require_grads()
    adapter = setup.sections["adapter"]
    peft_model = add_lora(hf, rank=adapter["rank"], use_dora=adapter["kind"] == DORA["kind"])
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    phase("init")

    def take(length: int, phase: Phase) -> None:
        [batch] = make_step(setup, length).micro_batches
        ids = batch.input_ids.to(device)
        loss = peft_model(input_ids=ids, labels=ids).loss
        phase("forward")
        loss.backward()
        phase("backward")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        phase("optimizer")

    frozen = sum(p.nbytes for p in peft_model.parameters() if not p.requires_grad)
    return Trainee(take, frozen, sum(p.nbytes for p in trained))


def measure_allocations(trainee: Trainee, length: int, device: torch.device) -> dict[str, Any]:
    """Returns what a step allocates on top of weights and the optimizer's states."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        resident = Resident(device)
        trainee.step(length, resident.end_phase)
        phases = {name: use.peak - held for name, use in resident.phases.items()}
        return {"peak": max(phases.values()), "largest": None, "phases": phases}
    with Allocations() as allocations:
        trainee.step(length, allocations.end_phase)
    return {
        "peak": allocations.peak_bytes,
        "largest": allocations.largest_bytes,
        "phases": allocations.phase_peaks(),
    }


def measure_setup(*, setup: Mapping[str, Any], root: str, device: str) -> dict[str, Any]:
    """Warms up on a tiny model and measures, in a process of its own."""
    warnings.simplefilter("ignore")  # of bitsandbytes, hqq and the profiler
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    chosen, where, folder = Setup(**setup), start_process_group(device), Path(root)
    load = load_stock if chosen.stock else load_fsdpq
    load(chosen, folder, "tiny", where, lambda _name: None).step(64, lambda _name: None)
    gc.collect()
    wait_for_all()
    resident = Resident(where)
    resident.end_phase("libraries")
    trainee = load(chosen, folder, "model", where, resident.end_phase)
    nearest = min(chosen.lengths, key=lambda n: abs(n * chosen.num_rows - PHASE_TOKENS))
    trainee.step(nearest, resident.end_phase)
    found = {
        "frozen_bytes": trainee.frozen_bytes,
        "trained_bytes": trainee.trained_bytes,
        "phases": resident.as_dict(),
        "steps": {length: measure_allocations(trainee, length, where) for length in chosen.lengths},
    }
    wait_for_all()
    return json.loads(json.dumps(found))  # keys become texts, as the reader gets them
