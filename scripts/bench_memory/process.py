"""What one process does: loads the model, trains some steps, writes what it measured."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench_memory.allocations import Allocations
from bench_memory.resident import Resident
from bench_memory.setups import DORA, LORA, NF4, Setup
from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import rank, start_process_group, wait_for_all, world_size
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.tensor_files.base_manifest import read_manifest
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.assemble import assemble_model
from fsdpq.worker.base import QuantizedBase

Phase = Callable[[str], Any]
TakeStep = Callable[[int, Phase], None]


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
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        mask = [False] + [True] * (length - 1)
        documents = (length // setup.num_documents,) * setup.num_documents
        rows.append(Row(ids, mask, documents if setup.num_documents > 1 else ()))
    return build_step(rows, micro_batch_size=setup.num_rows, rank=rank(), world_size=world_size())


def build_recipe(setup: Setup, directory: Path, device: torch.device) -> Recipe:
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
        "launch": {"device": device.type, "nproc_per_node": world_size()},
    }
    for section, changes in setup.sections.items():
        replaced = {} if "kind" in changes else document.get(section, {})
        document[section] = replaced | changes
    return Recipe.model_validate(document)


def load_fsdpq(setup: Setup, root: Path, model: str, phase: Phase) -> Trainee:
    """Loads through the worker's own code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = build_recipe(setup, root / model, device)
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


def load_stock(setup: Setup, root: Path, model: str, phase: Phase) -> Trainee:
    """Loads with transformers, PEFT and bitsandbytes, recomputing every layer."""
    import transformers
    from peft import LoraConfig, get_peft_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        root / model, quantization_config=options, dtype=torch.bfloat16, device_map=device.type
    )
    phase("load")
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    hf.enable_input_require_grads()
    use_dora = setup.sections["adapter"]["kind"] == DORA["kind"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=use_dora)
    peft = get_peft_model(hf, config).train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    phase("init")

    def take(length: int, phase: Phase) -> None:
        [batch] = make_step(setup, length).micro_batches
        ids = batch.input_ids.to(device)
        loss = peft(input_ids=ids, labels=ids).loss
        phase("forward")
        loss.backward()
        phase("backward")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        phase("optimizer")

    frozen = sum(p.nbytes for p in peft.parameters() if not p.requires_grad)
    return Trainee(take, frozen, sum(p.nbytes for p in trained))


LOADERS = {"fsdpq": load_fsdpq, "transformers": load_stock}


def measure_step(trainee: Trainee, length: int, device: torch.device) -> dict[str, Any]:
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


def run_process(setup: Setup, root: Path, out: Path) -> None:
    """Warms up on a tiny model, measures, writes JSON to ``out``."""
    warnings.simplefilter("ignore")  # of bitsandbytes, hqq and the profiler
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = start_process_group("cuda" if torch.cuda.is_available() else "cpu")
    load = LOADERS[setup.library]
    load(setup, root, "tiny", lambda _name: None).step(64, lambda _name: None)
    wait_for_all()
    resident = Resident(device)
    resident.end_phase("libraries")
    trainee = load(setup, root, "model", resident.end_phase)
    longest = min(setup.lengths, key=lambda length: abs(length * setup.num_rows - 2048))
    trainee.step(longest, resident.end_phase)
    found = {
        "frozen_bytes": trainee.frozen_bytes,
        "trained_bytes": trainee.trained_bytes,
        "phases": resident.as_dict(),
        "steps": {length: measure_step(trainee, length, device) for length in setup.lengths},
    }
    out.write_text(json.dumps(found))
    wait_for_all()


def write_models(root: Path, shapes: dict[str, dict[str, Any]]) -> None:
    """Writes made-up checkpoints in bf16, and their bases in NF4 for training from disk."""
    import transformers

    from fsdpq.tensor_files.base_manifest import base_key
    from fsdpq.worker.quantize import write_recipe_base

    device = start_process_group("cuda" if torch.cuda.is_available() else "cpu")
    for name, shape in shapes.items():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**shape)
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        hf.save_pretrained(root / name)
        del hf
        recipe = build_recipe(Setup("base"), root / name, device)
        key = base_key(
            model={"sha256": name, "revision": None, "source": name},
            quantization=recipe.quantization.model_dump(mode="json"),
            dtype=recipe.model.dtype,
            device=device.type,
        )
        base = root / f"{name}-base"
        base.mkdir()
        write_recipe_base(
            recipe, root / name, base, key=key, device=device, report=lambda _done, _total: None
        )
