"""What ``auto`` and the defaults that depend on the machine mean here."""

from __future__ import annotations

import os
from typing import Any, Literal

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.machine.cpu_rates import find_cpu_dtype
from fsdpq.recipe.precision import base_dtype
from fsdpq.recipe.root import Recipe

CPU_RANKS = 2
"""Ranks on a machine without a GPU: the fewest that shard anything."""

GLOBAL_BATCH_SIZE = 16
"""Rows per step where the recipe gives neither rows nor accumulation."""


def resolve_launch(
    recipe: Recipe, *, num_gpus: int, num_cpus: int | None = None, cpu_dtype: str | None = None
) -> Recipe:
    """Returns ``recipe`` with device, number of ranks, dtype and batch size made concrete.

    Args:
        recipe: as it was loaded.
        num_gpus: GPUs that this process may use.
        num_cpus: CPU cores, by default those of this machine.
        cpu_dtype: what ``auto`` is on a CPU, by default the faster dtype of this machine's.

    Raises:
        EnvironmentProblemError: it asks for GPUs that are not there.
    """
    launch = recipe.launch
    device = launch.device if launch.device != "auto" else ("cuda" if num_gpus else "cpu")
    num_cpus = num_cpus if num_cpus is not None else (os.cpu_count() or 1)
    default = num_gpus if device == "cuda" else max(1, min(CPU_RANKS, num_cpus))
    num_ranks = default if launch.nproc_per_node == "auto" else launch.nproc_per_node
    if device == "cuda":
        _check_gpus(num_ranks, num_gpus)
    dtype: Any = resolve_dtype(recipe, device, cpu_dtype)
    return recipe.model_copy(
        update={
            "launch": launch.model_copy(update={"device": device, "nproc_per_node": num_ranks}),
            "model": recipe.model.model_copy(update={"dtype": dtype}),
            "training": _resolve_batch(recipe, num_ranks),
            "export": recipe.export.model_copy(update={"format": _export_format(recipe)}),
        }
    )


def resolve_dtype(recipe: Recipe, device: str, cpu_dtype: str | None = None) -> str:
    """Returns ``model.dtype`` as it will be on ``device``: ``bf16``, ``fp16`` or ``fp32``."""
    told = base_dtype(recipe)
    if told is not None:
        return told
    return "bf16" if device == "cuda" else cpu_dtype or find_cpu_dtype().dtype


def explain_dtype(recipe: Recipe, resolved: Recipe) -> str | None:
    """Returns why ``model.dtype`` is what it is where this CPU decided; None elsewhere.

    Args:
        recipe: as it was loaded.
        resolved: what `resolve_launch` made of it.
    """
    if base_dtype(recipe) is not None or resolved.launch.device == "cuda":
        return None
    return f"model.dtype is {resolved.model.dtype}: {find_cpu_dtype().why}"


def _resolve_batch(recipe: Recipe, num_ranks: int) -> Any:
    training = recipe.training
    rows = training.global_batch_size or GLOBAL_BATCH_SIZE
    if training.gradient_accumulation_steps is not None:
        rows = training.micro_batch_size * training.gradient_accumulation_steps * num_ranks
        rows *= recipe.launch.max_nodes
    epochs = training.epochs
    if training.steps is None and epochs is None:
        epochs = 1.0
    changed = {"global_batch_size": rows, "gradient_accumulation_steps": None, "epochs": epochs}
    return training.model_copy(update=changed)


def _export_format(recipe: Recipe) -> Literal["peft", "transformers", "delta"]:
    if recipe.export.format != "auto":
        return recipe.export.format
    return "peft" if recipe.adapter.kind in ("lora", "dora") else "transformers"


def _check_gpus(num_ranks: int, num_gpus: int) -> None:
    if num_gpus == 0:
        message = "`launch.device` is `cuda` and this machine shows no GPU"
        hint = "run on the CPU with `launch.device=cpu`, or check `nvidia-smi`"
        raise EnvironmentProblemError(message, hint=f"{hint} and CUDA_VISIBLE_DEVICES")
    if num_ranks > num_gpus:
        gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
        message = f"`launch.nproc_per_node` asks for {num_ranks} ranks and this machine has {gpus}"
        hint = f"use `launch.nproc_per_node={num_gpus}`, or `launch.device=cpu`"
        raise EnvironmentProblemError(message, hint=hint)
