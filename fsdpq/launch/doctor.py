"""The findings of ``fsdpq doctor``: can this machine train, and what would help it.

Torch-free: versions come from the installed packages' metadata. One function yields the findings
about one subject; `SUBJECTS` is the table of them, and a new one is a function and a line there.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from fsdpq.fetch.cache import cache_root, format_bytes
from fsdpq.launch.machine.devices import NO_BF16, cpu_has_bf16, list_gpus
from fsdpq.launch.runs.run_dir import MIN_FREE_BYTES, RUNS

OK, WARN, FAIL = "ok", "warn", "fail"

MIN_PYTHON = (3, 10)
LOW_MEMORY_BYTES = 4 * 10**9
"""What the quickstart needs on a CPU, with two ranks."""

LOW_DISK_BYTES = 5 * 10**9
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, ``torch``.
        name: the thing itself, unique within the subject.
        status: ``ok``, ``warn`` (training works, something does not) or ``fail`` (it cannot work).
        value: what was found.
        remedy: one action that the user can take; empty where there is none. With ``ok`` it is
            what a package that is not needed would be installed with.
    """

    subject: str
    name: str
    status: str
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """A package that fsdpq imports.

    Attributes:
        name: as pip calls it.
        minimum: smallest version that works; pyproject.toml says the same.
        extra: what it is for, where fsdpq works without it; empty where it is needed.
        install: what to install; empty is the package itself.
    """

    name: str
    minimum: str
    extra: str = ""
    install: str = ""

    @property
    def command(self) -> str:
        """The command that installs it."""
        wanted = self.install or f"'{self.name}>={self.minimum}'"
        return f"pip install {wanted}"


PACKAGES = (
    Package("transformers", "5.23"),
    Package("peft", "0.21"),
    Package("bitsandbytes", "0.50"),
    Package("hqq", "0.2.8", "`quantization.kind: hqq`", "'fsdpq[hqq]'"),
    Package(
        "flash-attn", "2.8", "`model.attn_implementation: flash_attention_2`", "'fsdpq[flash]'"
    ),
    Package("liger-kernel", "0.8", "`model.use_liger_kernel: true`", "'fsdpq[liger]'"),
    Package("wandb", "0.19", "`wandb` in `metrics.sinks`", "'fsdpq[wandb]'"),
    Package("tensorboard", "2.18", "`tensorboard` in `metrics.sinks`", "'fsdpq[tensorboard]'"),
)
TORCH = Package("torch", "2.13")


def examine() -> list[Finding]:
    """Returns the findings of every subject, in the order of `SUBJECTS`."""
    return [finding for look in SUBJECTS for finding in look()]


def find_python() -> Iterator[Finding]:
    """The interpreter and the system."""
    version = tuple(int(part) for part in platform.python_version_tuple()[:2])
    value = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if version < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        yield Finding("software", "python", FAIL, value, f"install Python {needed} or newer")
    elif platform.system() != "Linux":
        yield Finding("software", "python", WARN, value, "only Linux is tested: try `--self-test`")
    else:
        yield Finding("software", "python", OK, value)


def find_torch() -> Iterator[Finding]:
    """The version of torch, and what its build is for."""
    version = installed_version("torch")
    if version is None:
        yield Finding("software", "torch", FAIL, "missing", TORCH.command)
        return
    cuda = torch_cuda()
    value = f"{version}, {f'CUDA {cuda}' if cuda else 'CPU build'}"
    if is_older(version, TORCH.minimum):
        value += f": fsdpq needs {TORCH.minimum}, which shards frozen bytes"
        yield Finding("software", "torch", FAIL, value, TORCH.command)
    else:
        yield Finding("software", "torch", OK, value)


def find_packages() -> Iterator[Finding]:
    """The other packages, and those that some recipes need."""
    for package in PACKAGES:
        version = installed_version(package.name)
        if version is None and package.extra:
            value = f"missing, for {package.extra} only"
            yield Finding("software", package.name, OK, value, package.command)
        elif version is None:
            yield Finding("software", package.name, FAIL, "missing", package.command)
        elif is_older(version, package.minimum):
            status = WARN if package.extra else FAIL
            value = f"{version}: fsdpq needs {package.minimum}"
            yield Finding("software", package.name, status, value, package.command)
        else:
            yield Finding("software", package.name, OK, version)


def find_gpus() -> Iterator[Finding]:
    """The GPUs that a run may use."""
    gpus = list_gpus()
    if not gpus:
        remedy = "where there is one, `nvidia-smi -L` and CUDA_VISIBLE_DEVICES must show it"
        yield Finding("hardware", "GPU", WARN, "none: runs train on the CPU, slowly", remedy)
    for gpu in gpus:
        number, _, name = gpu.partition(" (UUID")[0].partition(": ")
        if NO_BF16.search(gpu):
            remedy = "use `fsdp.precision: fp16_autocast`, or `model.dtype: fp32`"
            yield Finding("hardware", number, WARN, f"{name or gpu}, without bf16", remedy)
        else:
            yield Finding("hardware", number, OK, name or gpu)
    if gpus and installed_version("torch") is not None and not torch_cuda():
        value = "the installed torch is a CPU build: it sees none of these GPUs"
        remedy = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        yield Finding("hardware", "CUDA", FAIL, value, remedy)


def find_cpu() -> Iterator[Finding]:
    """The CPU: cores, and whether it multiplies bf16 matrices in hardware."""
    dtype = "bf16 instructions" if cpu_has_bf16() else "no bf16 instructions: runs on it use fp32"
    count = usable_cpus()
    yield Finding("hardware", "CPU", OK, f"{count} core{'s' * (count > 1)}, {dtype}")


def find_memory() -> Iterator[Finding]:
    """Host memory, as far as this process may use it."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limit = memory_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    value = f"{format_bytes(free)} free of {format_bytes(total)}"
    if free < LOW_MEMORY_BYTES:
        remedy = (
            f"the quickstart takes {format_bytes(LOW_MEMORY_BYTES)} on a CPU: end other programs"
        )
        yield Finding("hardware", "memory", WARN, value, remedy)
    else:
        yield Finding("hardware", "memory", OK, value)


def find_disks() -> Iterator[Finding]:
    """Room for downloads and for runs."""
    yield disk_finding("cache", cache_root(), "set FSDPQ_CACHE to a directory on another disk")
    yield disk_finding("runs", RUNS.absolute(), "give `fsdpq train` a `--run-dir` on another disk")


def disk_finding(name: str, directory: Path, remedy: str) -> Finding:
    """Returns how much room there is for ``directory``, which need not exist yet."""
    place = nearest_directory(directory)
    free = shutil.disk_usage(place).free
    value = f"{format_bytes(free)} free for {directory}"
    if not can_write(place):
        return Finding("disk", name, FAIL, f"{place} cannot be written", remedy)
    if free < MIN_FREE_BYTES:
        return Finding("disk", name, FAIL, value, f"free some, or {remedy}")
    if free < LOW_DISK_BYTES:
        return Finding("disk", name, WARN, value, f"models are larger: free some, or {remedy}")
    return Finding("disk", name, OK, value)


SUBJECTS: tuple[Callable[[], Iterator[Finding]], ...] = (
    find_python,
    find_torch,
    find_packages,
    find_gpus,
    find_cpu,
    find_memory,
    find_disks,
)


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> str:
    """Returns the CUDA version that torch is built for, empty for a CPU build; reads a file."""
    try:
        path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def is_older(version: str, minimum: str) -> bool:
    """Whether ``version`` comes before ``minimum``; only the leading numbers count."""
    numbers = [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]
    wanted = [int(n) for n in minimum.split(".")]
    return numbers[: len(wanted)] < wanted


def usable_cpus() -> int:
    """Returns the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit() -> int | None:
    """Returns what a container may use, in bytes; None without a limit."""
    try:
        text = CGROUP_LIMIT.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def nearest_directory(path: Path) -> Path:
    """Returns the deepest directory on the way to ``path`` that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def can_write(directory: Path) -> bool:
    """Whether files can be made in ``directory``; tries it."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
