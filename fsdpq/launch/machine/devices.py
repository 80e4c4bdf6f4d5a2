"""Which devices there are, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from fsdpq.errors import EnvironmentProblemError
from fsdpq.launch.machine.nvidia_smi import ask_nvidia_smi

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What /proc/cpuinfo calls bf16 matrix instructions on x86 and Arm."""

NO_BF16 = re.compile(
    r"\b(GTX|TITAN|RTX 20[678]0|Quadro (RTX|GV|GP|P|M)|Tesla [KMP]\d|T4|T4G|V100|P100|P40|K80)"
)
"""Names of GPUs older than Ampere (compute capability below 8.0): no bf16 matrix instructions."""


def list_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns one line per GPU that this process may use, as ``nvidia-smi -L`` names them.

    ``CUDA_VISIBLE_DEVICES`` counts as it does for CUDA: the list ends at its first unknown entry.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return []
    listed = (ask_nvidia_smi("-L") or "").splitlines()
    return select_visible([line.strip() for line in listed if line.startswith("GPU ")], visible)


def select_visible(gpus: list[str], visible: str | None) -> list[str]:
    """Returns those of ``gpus`` that ``CUDA_VISIBLE_DEVICES`` names, in its order.

    Args:
        gpus: all of the machine, as ``nvidia-smi -L`` names them.
        visible: the variable's value; None where it is not set. Parts of GPUs (``MIG-...``), which
            are not in ``gpus``, are returned as they are named here.
    """
    if visible is None:
        return gpus
    chosen: list[str] = []
    for entry in visible.split(","):
        gpu = _find_gpu(gpus, entry.strip())
        if gpu is None:
            break
        chosen.append(gpu)
    return chosen


def check_bf16(dtype: str | None, gpus: list[str]) -> None:
    """Refuses to compute in bf16 on GPUs that only emulate it, many times slower.

    Args:
        dtype: in which the run computes, None where that is not known.
        gpus: of the run, as `list_gpus` names them.

    Raises:
        EnvironmentProblemError: one of them is older than Ampere.
    """
    old = [gpu for gpu in gpus if NO_BF16.search(gpu)]
    if dtype == "bf16" and old:
        name = old[0].partition(" (UUID")[0]
        hint = "use `fsdp.precision=fp16_autocast`, which scales the loss, or `model.dtype=fp32`"
        raise EnvironmentProblemError(f"the run computes in bf16, which `{name}` lacks", hint=hint)


def count_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Returns the CPU cores that this process may use: of the machine, its mask, its container.

    Args:
        cpu_max: the container's quota as Linux shows it: microseconds of all cores in a period of
            so many, or ``max``.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if not cpu_max.exists():
        return cores
    quota, period = cpu_max.read_text(encoding="utf-8").split()
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; False where Linux does not say so."""
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


def _find_gpu(gpus: list[str], entry: str) -> str | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-"):
        return entry
    return next((gpu for gpu in gpus if entry and f"UUID: {entry}" in gpu), None)
