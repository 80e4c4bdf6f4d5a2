"""Which devices there are, without torch, and what ``auto`` means on them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from fsdpq.errors import EnvironmentProblemError
from fsdpq.recipe.root import Recipe

CPU_RANKS = 2
"""Ranks on a machine without a GPU: the fewest that shard anything."""


def list_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns one line per GPU that this process may use, as ``nvidia-smi -L`` names them.

    ``CUDA_VISIBLE_DEVICES`` counts as it does for CUDA: the list ends at its first unknown entry.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return []
    gpus = _ask_nvidia_smi()
    if visible is None:
        return gpus
    chosen: list[str] = []
    for entry in visible.split(","):
        gpu = _find_gpu(gpus, entry.strip())
        if gpu is None:
            break
        chosen.append(gpu)
    return chosen


def resolve_launch(recipe: Recipe, *, num_gpus: int, num_cpus: int | None = None) -> Recipe:
    """Returns ``recipe`` with device, number of ranks and dtype made concrete.

    Raises:
        EnvironmentProblemError: it asks for GPUs that are not there.
    """
    launch = recipe.launch
    device = launch.device if launch.device != "auto" else ("cuda" if num_gpus else "cpu")
    num_cpus = num_cpus if num_cpus is not None else (os.cpu_count() or 1)
    default = num_gpus if device == "cuda" else max(1, min(CPU_RANKS, num_cpus))
    num_ranks = default if launch.nproc_per_node == "auto" else launch.nproc_per_node
    if device == "cuda" and num_gpus == 0:
        message = "`launch.device` is `cuda` and this machine shows no GPU"
        hint = "run on the CPU with `launch.device=cpu`, or check `nvidia-smi`"
        raise EnvironmentProblemError(message, hint=f"{hint} and CUDA_VISIBLE_DEVICES")
    if device == "cuda" and num_ranks > num_gpus:
        gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
        message = f"`launch.nproc_per_node` asks for {num_ranks} ranks and this machine has {gpus}"
        hint = f"use `launch.nproc_per_node={num_gpus}`, or `launch.device=cpu`"
        raise EnvironmentProblemError(message, hint=hint)
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    changed = {"device": device, "nproc_per_node": num_ranks}
    return recipe.model_copy(
        update={
            "launch": launch.model_copy(update=changed),
            "model": recipe.model.model_copy(update={"dtype": dtype}),
        }
    )


def _ask_nvidia_smi() -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607  found on PATH, as users install it
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU ")]


def _find_gpu(gpus: list[str], entry: str) -> str | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-"):
        return entry
    return next((gpu for gpu in gpus if entry and f"UUID: {entry}" in gpu), None)
