"""In which dtype a CPU multiplies matrices faster: measured once, and kept.

bf16 instructions alone do not tell. Of two machines that have them (AVX512-BF16), one multiplied in
bf16 four times as fast as in fp32, the other at 0.6 of it (docs/developing/log.md). So the first
run on a CPU that has them measures both dtypes for about a second, in a process of its own, since
this half has no torch. The rates stay in the cache: a machine trains in one dtype, however busy it
is later.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fsdpq.fetch.cache import cache_root
from fsdpq.launch.machine.devices import cpu_has_bf16
from fsdpq.run_files.writing import write_whole

FILE_NAME = "cpu-rates.json"
TIMEOUT_S = 120


@dataclass(frozen=True)
class CpuRates:
    """How fast one core multiplies matrices, in operations a second.

    Attributes:
        fp32: in fp32.
        bf16: in bf16.
    """

    fp32: float
    bf16: float

    def describe(self) -> str:
        """Returns both rates in words."""
        return f"{self.bf16 / 1e9:.0f} GFLOP/s a core in bf16, {self.fp32 / 1e9:.0f} in fp32"


@dataclass(frozen=True)
class CpuDtype:
    """What ``model.dtype: auto`` is on this CPU.

    Attributes:
        dtype: ``bf16`` or ``fp32``.
        why: in words.
    """

    dtype: str
    why: str


def find_cpu_dtype() -> CpuDtype:
    """Returns fp32 without bf16 instructions, else the faster of the two.

    Where rates cannot be measured, bf16 instructions are taken to be faster.
    """
    return _find_cpu_dtype(cache_root() / FILE_NAME)


@functools.lru_cache(maxsize=4)
def _find_cpu_dtype(path: Path) -> CpuDtype:
    if not cpu_has_bf16():
        return CpuDtype("fp32", "this CPU has no bf16 instructions")
    rates = read_or_measure(path, machine_key(), measure_rates)
    if rates is None:
        return CpuDtype("bf16", "this CPU has bf16 instructions (its rates could not be measured)")
    return CpuDtype("bf16" if rates.bf16 > rates.fp32 else "fp32", f"measured {rates.describe()}")


def kept_cpu_dtype() -> str:
    """Returns what `find_cpu_dtype` says, by the rates that were kept: nothing is measured.

    fp32 where none were: the wider of the two, which a plan must have room for.
    """
    if not cpu_has_bf16():
        return "fp32"
    kept = _read(cache_root() / FILE_NAME)
    if kept.get("key") != machine_key():
        return "fp32"
    return "bf16" if float(kept["bf16"]) > float(kept["fp32"]) else "fp32"


def machine_key(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a hash of the CPU's name and instructions and of the version of torch."""
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = ("model name", "flags", "features", "cpu part")
    told = sorted({line for line in lines if line.lower().startswith(fields)})
    try:
        told.append(version("torch"))
    except PackageNotFoundError:
        told.append("no torch")
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def measure_rates() -> dict[str, float] | None:
    """Measures the rates in a new process; None where that fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fsdpq.worker.matmul_rates"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None


def read_or_measure(
    path: Path, key: str, measure: Callable[[], dict[str, float] | None]
) -> CpuRates | None:
    """Returns the rates of the machine ``key``; None where they cannot be measured.

    Args:
        path: where they are kept; rates of another machine are replaced.
        key: see `machine_key`.
        measure: returns ``{"fp32": ..., "bf16": ...}``.
    """
    kept = _read(path)
    found = kept if kept.get("key") == key else measure()
    if found is None:
        return None
    rates = CpuRates(fp32=float(found["fp32"]), bf16=float(found["bf16"]))
    if found is not kept:
        _write(path, {"key": key, "fp32": rates.fp32, "bf16": rates.bf16})
    return rates


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there, or not whole: measured again
    whole = isinstance(found, dict) and {"key", "fp32", "bf16"} <= found.keys()  # pyright: ignore[reportUnknownMemberType]
    return found if whole else {}  # pyright: ignore[reportUnknownVariableType]


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(content) + "\n").encode())
    except OSError:
        return  # a cache that cannot be written: the next run measures again
