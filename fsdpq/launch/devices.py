"""Which devices there are, without torch, and what ``auto`` means on them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fsdpq.errors import EnvironmentProblemError
from fsdpq.recipe.root import Recipe

CPU_RANKS = 2
"""Ranks on a machine without a GPU: the fewest that shard anything."""


BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What /proc/cpuinfo calls bf16 matrix instructions on x86 and Arm."""


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


def resolve_launch(
    recipe: Recipe, *, num_gpus: int, num_cpus: int | None = None, cpu_bf16: bool | None = None
) -> Recipe:
    """Returns ``recipe`` with device, number of ranks and dtype made concrete.

    Args:
        recipe: as it was loaded.
        num_gpus: GPUs that this process may use.
        num_cpus: CPU cores, by default those of this machine.
        cpu_bf16: whether the CPU has bf16 instructions, by default this machine's.

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
        cpu_bf16 = cpu_has_bf16() if cpu_bf16 is None else cpu_bf16
        dtype = "bf16" if device == "cuda" or cpu_bf16 else "fp32"
    changed = {"device": device, "nproc_per_node": num_ranks}
    return recipe.model_copy(
        update={
            "launch": launch.model_copy(update=changed),
            "model": recipe.model.model_copy(update={"dtype": dtype}),
        }
    )


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; False where Linux does not say so.

    A rule rather than a measurement, so that one machine always trains in one dtype.
    """
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


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
