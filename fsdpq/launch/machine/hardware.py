"""What a machine is, as far as it may change numbers: processors, memory, environment."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from fsdpq.launch.machine.devices import count_cores
from fsdpq.launch.machine.nvidia_smi import query_table

NUMERIC_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_DYNAMIC", "MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_COMPILE_DISABLE",
    "BNB_CUDA_VERSION", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE",
    "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS",
)  # fmt: skip
"""Environment variables by which the same program computes other sums. None can hold a secret."""

MAX_VALUE_LENGTH = 200


def describe_hardware(gpus: Sequence[str]) -> dict[str, Any]:
    """Returns processors and memory as plain JSON data.

    Args:
        gpus: as `fsdpq.launch.machine.devices.list_gpus` names them.
    """
    return {
        "gpus": list(gpus),
        "gpu_driver": _gpu_driver() if gpus else None,
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_cores": count_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def numeric_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns those of `NUMERIC_VARIABLES` that are set in ``environ``."""
    names = (name for name in NUMERIC_VARIABLES if name in environ)
    return {name: environ[name][:MAX_VALUE_LENGTH] for name in names}


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns what the processor calls itself; its architecture where Linux does not say."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpu_driver() -> str | None:
    rows = query_table(("driver_version",))
    return rows[0].get("driver_version") if rows else None
