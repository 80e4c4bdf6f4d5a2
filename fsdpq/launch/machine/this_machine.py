"""This machine as a plan sees it: its GPUs with their memory and bus, and its host memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from fsdpq.launch.machine.gpus import GpuFacts, query_gpus
from fsdpq.plan.hardware.gpu_cards import PCIE
from fsdpq.plan.hardware.gpus import find_gpu
from fsdpq.plan.hardware.machine import Gpu, Machine

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Of a container, in versions 2 and 1 of cgroups. No limit is a word, or a huge number."""


def describe_this_machine(environ: Mapping[str, str] = os.environ) -> Machine:
    """Returns the GPUs that this process may use, and the host memory.

    Parts of a GPU (MIG) have a memory that the driver does not tell: then nothing is known of GPUs.
    """
    facts = query_gpus(environ)
    found = tuple(_gpu(each, each.memory_bytes) for each in facts if each.memory_bytes is not None)
    gpus = found if len(found) == len(facts) else None
    return Machine(gpus=gpus, ram_bytes=read_ram_bytes(), is_this=True)


def read_ram_bytes(*limits: Path) -> int:
    """Returns the host memory that this process may use: of the machine, or of its container.

    Args:
        limits: files that say what a container may use; none are `CGROUP_LIMITS`.
    """
    least = psutil.virtual_memory().total
    for limit in limits or CGROUP_LIMITS:
        try:
            text = limit.read_text(encoding="utf-8").strip()
        except OSError:
            continue  # no container, or the other version
        least = min(least, int(text)) if text.isdecimal() else least
    return least


def _gpu(facts: GpuFacts, memory_bytes: int) -> Gpu:
    """Returns what is known of such a card, with the memory and the bus of this one."""
    gpu = find_gpu(facts.name) or Gpu(facts.name.removeprefix("NVIDIA "), memory_bytes)
    bus = PCIE.get(f"{facts.pcie_generation}.0 x{facts.pcie_width}", gpu.link_bandwidth)
    return dataclasses.replace(gpu, memory_bytes=memory_bytes, link_bandwidth=bus)
