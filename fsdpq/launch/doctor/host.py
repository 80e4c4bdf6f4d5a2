"""The host: processor, memory and what limits it, Windows underneath."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from fsdpq.fetch.cache import format_bytes
from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.machine.devices import count_cores, cpu_has_bf16
from fsdpq.launch.machine.gpus import GpuFacts
from fsdpq.launch.machine.this_machine import read_ram_bytes

LOW_MEMORY_BYTES = 4 * 10**9
"""What the quickstart needs on a CPU, with two ranks."""

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
KERNEL_VERSION = Path("/proc/version")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  the system's own, only looked at
LOW_SHARED_BYTES = 10**9
"""NCCL exchanges over it where GPUs cannot copy to each other; Docker gives 64 MB."""

LOW_OPEN_FILES = 1024


def find_cpu(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """The CPU: cores, and whether it multiplies bf16 matrices in hardware."""
    dtype = "bf16 instructions" if cpu_has_bf16() else "no bf16 instructions: runs on it use fp32"
    count = count_cores()
    yield Finding("host", "CPU", OK, f"{count} core{'s' * (count > 1)}, {dtype}")


def find_memory(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """Host memory, as far as this process may use it."""
    memory = psutil.virtual_memory()
    total = read_ram_bytes()
    free = min(int(memory.available), total)
    where = " (the container's limit)" if total < memory.total else ""
    swap = int(psutil.swap_memory().total)
    swap_text = f", {format_bytes(swap)} swap" if swap else ", no swap"
    value = f"{format_bytes(free)} free of {format_bytes(total)}{where}{swap_text}"
    if free < LOW_MEMORY_BYTES:
        remedy = (
            f"the quickstart takes {format_bytes(LOW_MEMORY_BYTES)} on a CPU: end other programs"
        )
        yield Finding("host", "memory", WARN, value, remedy)
    else:
        yield Finding("host", "memory", OK, value)


def find_wsl(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """The Windows Subsystem for Linux, which gives less of everything than the machine has."""
    try:
        version = KERNEL_VERSION.read_text(encoding="utf-8").lower()
    except OSError:
        return
    if "microsoft" in version:
        value = (
            "the Windows Subsystem for Linux: half of the memory by default, little of it can be "
            "pinned, GPUs do not copy to each other, files under /mnt are slow"
        )
        remedy = (
            "raise `memory` in %UserProfile%\\.wslconfig, keep models and runs in the Linux file "
            "system; where pinning fails, runs go on without it"
        )
        yield Finding("host", "WSL", WARN, value, remedy)


def find_limits(gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """Limits of the system that are lower than training needs; silent where there are none."""
    yield from _address_limits()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < LOW_OPEN_FILES:
        remedy = "raise it: `ulimit -n 4096`, for good in /etc/security/limits.conf"
        yield Finding("host", "open files", WARN, f"at most {files} a process", remedy)
    if read_word(OVERCOMMIT) == "2":
        value = "vm.overcommit_memory is 2: address space that CUDA reserves counts as memory"
        remedy = "allow it: `sysctl vm.overcommit_memory=0`"
        yield Finding("host", "overcommit", WARN, value, remedy)
    if len(gpus) > 1 and SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        if size < LOW_SHARED_BYTES:
            value = f"{format_bytes(size)}: NCCL may run out of it"
            remedy = "start the container with `--shm-size=8g` or `--ipc=host`"
            yield Finding("host", "shared memory", WARN, value, remedy)
    if len(gpus) > 1 and Path("/sys/class/infiniband").is_dir():
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if locked != resource.RLIM_INFINITY:
            value = f"{format_bytes(locked)} may be locked: InfiniBand registers more"
            remedy = "raise it: `ulimit -l unlimited`; for a container `--ulimit memlock=-1`"
            yield Finding("host", "locked memory", WARN, value, remedy)


def _address_limits() -> Iterator[Finding]:
    for name, option, kind in (("RLIMIT_AS", "-v", resource.RLIMIT_AS),
                               ("RLIMIT_DATA", "-d", resource.RLIMIT_DATA)):  # fmt: skip
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            status = FAIL if limit < LOW_MEMORY_BYTES else WARN
            value = f"a process may have {format_bytes(limit)} of address space"
            yield Finding("host", name, status, value, f"lift it: `ulimit {option} unlimited`")


def read_word(path: Path) -> str:
    """Returns what a file of the kernel says, without space around it; empty where it is not."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
