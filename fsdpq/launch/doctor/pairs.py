"""Pairs of versions that do not go together, each with where that is written.

`KNOWN_BAD` is the table of what packages do not say themselves. What they do say, in their
metadata, is checked too: an upgrade of one package does not ask what the others need.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from fsdpq.launch.doctor.finding import FAIL, WARN, Finding
from fsdpq.launch.doctor.packages import (
    PACKAGES,
    TORCH,
    installed_version,
    is_older,
    torch_cuda,
)
from fsdpq.launch.machine.gpus import GpuFacts

MIN_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580"}
"""Of Linux, by major version of CUDA; within a major version any driver of it serves.

https://docs.nvidia.com/cuda/cuda-toolkit-release-notes (minor version compatibility)
"""

OLDEST_OF_CUDA_13 = (7, 5)
"""CUDA 13 compiles for Turing and newer (its release notes, deprecated architectures)."""

BLACKWELL = (10, 0)
CUDA_OF_BLACKWELL = "12.8"
"""The first CUDA that compiles for Blackwell: compute capability 10.0 and 12.0."""


@dataclass(frozen=True)
class Installed:
    """What the pairs are made of.

    Attributes:
        version: the version of a package, None where it is missing.
        cuda: that torch is built for, empty for a CPU build.
        gpus: that a run may use.
        bnb_libraries: compute libraries in bitsandbytes' wheel, ``("cuda130", ...)``.
    """

    version: Callable[[str], str | None]
    cuda: str
    gpus: Sequence[GpuFacts]
    bnb_libraries: tuple[str, ...]


def find_bad_pairs(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """Versions that do not go together."""
    installed = Installed(installed_version, torch_cuda(), gpus, bitsandbytes_libraries())
    for check in KNOWN_BAD:
        yield from check(installed)
    yield from unmet_requirements()


def torch_and_driver(installed: Installed) -> Iterator[Finding]:
    """A driver that is older than the CUDA that torch is built for."""
    driver = next((gpu.driver for gpu in installed.gpus if gpu.driver), None)
    if driver is None or not installed.cuda:
        return
    major = int(installed.cuda.partition(".")[0])
    minimum = MIN_DRIVERS.get(major)
    if minimum is not None and is_older(driver, minimum):
        yield Finding(
            "software", "torch and driver", FAIL,
            f"the driver {driver} is too old for CUDA {installed.cuda} of torch",
            f"install a driver from {minimum} on, or a torch for an older CUDA "
            "(https://pytorch.org/get-started/locally)",
        )  # fmt: skip


def torch_and_gpu(installed: Installed) -> Iterator[Finding]:
    """A GPU that torch's CUDA does not compile for: too old for it, or too new."""
    if not installed.cuda:
        return
    for gpu in installed.gpus:
        capability = gpu.compute_capability
        if capability is None:
            continue
        number = f"{capability[0]}.{capability[1]}"
        if not is_older(installed.cuda, "13.0") and capability < OLDEST_OF_CUDA_13:
            need = "a torch for CUDA 12.6"
        elif is_older(installed.cuda, CUDA_OF_BLACKWELL) and capability >= BLACKWELL:
            need = f"a torch for CUDA {CUDA_OF_BLACKWELL} or newer"
        else:
            continue
        yield Finding(
            "software", f"torch and GPU {gpu.index}", FAIL,
            f"CUDA {installed.cuda} has no code for {gpu.name} (compute capability {number})",
            f"install {need}: https://pytorch.org/get-started/locally",
        )  # fmt: skip


def torch_and_bitsandbytes(installed: Installed) -> Iterator[Finding]:
    """A bitsandbytes without a library for the CUDA of torch.

    0.50 takes any library of the same major version (``cextension.get_cuda_bnb_library_path``).
    """
    if not installed.cuda or installed.version("bitsandbytes") is None:
        return
    major = installed.cuda.partition(".")[0]
    if not any(name.startswith(f"cuda{major}") for name in installed.bnb_libraries):
        names = ", ".join(n for n in installed.bnb_libraries if n.startswith("cuda")) or "none"
        yield Finding(
            "software", "torch and bitsandbytes", FAIL,
            f"bitsandbytes has no library for CUDA {installed.cuda} of torch (it has: {names})",
            "pip install -U bitsandbytes, or a torch for one of those",
        )  # fmt: skip


def hqq_and_termcolor(installed: Installed) -> Iterator[Finding]:
    """An hqq whose dependency is missing: then ``import transformers`` fails, for every recipe."""
    if installed.version("hqq") is not None and installed.version("termcolor") is None:
        yield Finding(
            "software", "hqq and termcolor", FAIL,
            "hqq is installed without termcolor: transformers cannot be imported",
            "pip install termcolor",
        )  # fmt: skip


def torch_and_triton(installed: Installed) -> Iterator[Finding]:
    """A CUDA build of torch without Triton: nothing compiles, flex_attention and Liger fail."""
    if installed.cuda and installed.version("triton") is None:
        yield Finding(
            "software", "torch and triton", WARN,
            "triton is missing: `training.compile`, `flex_attention` and Liger's kernels fail",
            "install torch again, which brings its own triton",
        )  # fmt: skip


KNOWN_BAD: tuple[Callable[[Installed], Iterator[Finding]], ...] = (
    torch_and_driver,
    torch_and_gpu,
    torch_and_bitsandbytes,
    hqq_and_termcolor,
    torch_and_triton,
)


def unmet_requirements() -> Iterator[Finding]:
    """What the installed packages ask of each other and do not get.

    NCCL and Triton are among what a CUDA build of torch asks for, in exact versions.
    """
    for package in (TORCH, *PACKAGES):
        if installed_version(package.name) is None:
            continue
        for line in metadata.requires(package.name) or ():
            required = Requirement(line)
            if required.marker is not None and not required.marker.evaluate({"extra": ""}):
                continue
            found = installed_version(required.name)
            if found is not None and not required.specifier.contains(found, prereleases=True):
                wanted = f"{required.name}{required.specifier}"
                yield Finding(
                    "software", f"{package.name} and {required.name}", WARN,
                    f"{package.name} asks for {wanted}, installed is {found}",
                    f"pip install '{wanted}'",
                )  # fmt: skip


def bitsandbytes_libraries() -> tuple[str, ...]:
    """Returns the compute libraries in the wheel of bitsandbytes, ``cuda130``; empty without it."""
    try:
        files = metadata.files("bitsandbytes") or []
    except metadata.PackageNotFoundError:
        return ()
    names = (re.fullmatch(r"libbitsandbytes_(\w+)\.\w+", Path(str(file)).name) for file in files)
    return tuple(sorted(found[1] for found in names if found))
