"""Writing the quantized base of a recipe, as one rank sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdpq import dist
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.base_writer import write_base
from fsdpq.protocols import Adapter, MetricSink
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.base_manifest import BaseManifest, Key
from fsdpq.worker.assemble import build_model, read_inputs, resolve_dtype, without_gpu_kernels
from fsdpq.worker.base import key_of_run, open_checkpoint_source
from fsdpq.worker.outputs import open_rows
from fsdpq.worker.train import enter, load_reporter


class _AllFrozen(Adapter):
    """Trains nothing: a base holds every layer of the checkpoint, once."""


@dataclass(frozen=True)
class Job:
    """What a rank quantizes, and where it says how far it is."""

    recipe: Recipe
    model_dir: Path
    device: torch.device
    events: MetricSink


def start_job(files: RunFiles) -> Job:
    """Joins the other ranks and enters the phase ``quantize`` of a run directory.

    Ranks: all (collective).
    """
    recipe = load_resolved(files.resolved)
    device = dist.start_process_group(recipe.launch.device)
    events = open_rows(files.events)
    enter(events, "quantize")
    return Job(recipe, read_inputs(files).model_dir, device, events)


def build_frozen_model(
    recipe: Recipe, model_dir: Path, *, dtype: torch.dtype, trust_remote_code: bool
) -> CausalLM:
    """Returns the recipe's model on meta, every layer of it quantized and none trained.

    It computes nothing, so it needs no kernels: a base can be quantized where none are installed.
    """
    return build_model(
        without_gpu_kernels(recipe),
        model_dir,
        _AllFrozen(),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def quantize(files: RunFiles, out: Path, *, trust_remote_code: bool = False) -> None:
    """Writes the base of a run directory's recipe into ``out``, an empty directory.

    Ranks: all (collective).
    """
    job = start_job(files)
    manifest = write_recipe_base(
        job.recipe,
        job.model_dir,
        out,
        key=key_of_run(files, job.recipe),
        device=job.device,
        report=load_reporter(job.events),
        trust_remote_code=trust_remote_code,
    )
    job.events.write(
        {
            "event": "base",
            "directory": str(out),
            "num_bytes": manifest.num_bytes,
            "num_parameters": manifest.num_parameters,
            "num_quantized": manifest.num_quantized,
        }
    )
    dist.wait_for_all()


def write_recipe_base(
    recipe: Recipe,
    model_dir: Path,
    out: Path,
    *,
    key: Key,
    device: torch.device,
    report: Callable[[int, int], Any],
    trust_remote_code: bool = False,
) -> BaseManifest:
    """Writes the base of a recipe's model into ``out`` and returns its manifest.

    Ranks: all (collective).
    """
    dtype = resolve_dtype(recipe, device)
    model = build_frozen_model(recipe, model_dir, dtype=dtype, trust_remote_code=trust_remote_code)
    source = open_checkpoint_source(
        model, recipe.quantization, model_dir, dtype=dtype, device=device
    )
    return write_base(model, source, out, key=key, dtype=dtype, device=device, report=report)
