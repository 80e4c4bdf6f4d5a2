"""Python and the installed packages, from their metadata: nothing of them is imported."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.machine.gpus import GpuFacts

MIN_PYTHON = (3, 10)


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
    Package("transformers", "5.23" if sys.version_info >= (3, 11) else "5.20"),
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


def find_python(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
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


def find_torch(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
    """The version of torch, and what its build is for."""
    version = installed_version("torch")
    if version is None:
        yield Finding("software", "torch", FAIL, "missing", TORCH.command)
        return
    cuda = torch_cuda()
    value = ", ".join([version, f"CUDA {cuda}" if cuda else "CPU build", *_brought_by_torch(cuda)])
    if is_older(version, TORCH.minimum):
        value += f": fsdpq needs {TORCH.minimum}, which shards frozen bytes"
        yield Finding("software", "torch", FAIL, value, TORCH.command)
    else:
        yield Finding("software", "torch", OK, value)


def _brought_by_torch(cuda: str) -> Iterator[str]:
    """Yields versions of what a CUDA build of torch asks for."""
    major = cuda.partition(".")[0]
    packages = (f"nvidia-nccl-cu{major}", "NCCL"), ("triton", "Triton")
    for package, name in packages if cuda else ():
        version = installed_version(package)
        if version is not None:
            yield f"{name} {version}"


def find_packages(_gpus: Sequence[GpuFacts] = ()) -> Iterator[Finding]:
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
