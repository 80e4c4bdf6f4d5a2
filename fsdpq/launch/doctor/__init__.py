"""The findings of ``fsdpq doctor``: can this machine train, and what would help it.

The room itself is torch-free: versions come from the installed packages' metadata, GPUs from the
driver. A module looks at one group of things; each of its functions yields the findings about one
subject, and `SUBJECTS` is the table of them: a new one is a function and a line there. What only
torch can tell is asked of two short programs of their own (`device` and `ranks`), whose failure is
a finding too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fsdpq.launch.doctor.device import find_devices
from fsdpq.launch.doctor.disks import find_disk_speed, find_disks
from fsdpq.launch.doctor.environment import find_environment
from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.doctor.gpus import find_driver, find_gpus, find_links, find_processes
from fsdpq.launch.doctor.host import find_cpu, find_limits, find_memory, find_wsl
from fsdpq.launch.doctor.network import find_network
from fsdpq.launch.doctor.packages import find_packages, find_python, find_torch
from fsdpq.launch.doctor.pairs import find_bad_pairs
from fsdpq.launch.doctor.ranks import find_ranks
from fsdpq.launch.machine.gpus import GpuFacts, query_gpus

__all__ = ["FAIL", "OK", "PROBES", "SUBJECTS", "WARN", "Finding", "examine"]

Look = Callable[[Sequence[GpuFacts]], Iterator[Finding]]
"""Given the GPUs that a run may use."""

SUBJECTS: tuple[Look, ...] = (
    find_python,
    find_torch,
    find_packages,
    find_bad_pairs,
    find_driver,
    find_gpus,
    find_links,
    find_processes,
    find_cpu,
    find_memory,
    find_wsl,
    find_limits,
    find_environment,
    find_network,
    find_disks,
)
"""Looks that take no time."""

PROBES: tuple[Look, ...] = (find_disk_speed, find_devices, find_ranks)
"""Tries that take seconds: the disk, the devices, ranks that talk to each other."""


def examine(*, quick: bool = False) -> list[Finding]:
    """Returns the findings of every subject, in the order of `SUBJECTS` and `PROBES`.

    Args:
        quick: leave `PROBES` out.
    """
    looks, gpus = SUBJECTS if quick else (*SUBJECTS, *PROBES), query_gpus()
    return [finding for look in looks for finding in look(gpus)]
