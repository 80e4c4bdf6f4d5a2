"""Environment variables that change how training runs, where they are likely to be a mistake."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fsdpq.launch.doctor.finding import FAIL, WARN, Finding
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.machine.gpus import GpuFacts

SHADOWED = ("libnccl.so*", "libcublas.so*", "libcudart.so*", "libcudnn.so*")
"""Libraries that torch brings itself and a directory of LD_LIBRARY_PATH may put others before."""

INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def find_environment(
    gpus: Sequence[GpuFacts] = (), environ: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Variables of the environment; silent where nothing is odd."""
    yield from _visible_devices(gpus, environ)
    yield from _interfaces(environ)
    if not gpus:
        return
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        value = "CUDA_LAUNCH_BLOCKING waits for every kernel: training takes several times as long"
        yield _odd("CUDA_LAUNCH_BLOCKING", WARN, value, "unset it")
    if environ.get("NCCL_P2P_DISABLE", "0") != "0" and len(gpus) > 1:
        value = "NCCL_P2P_DISABLE: everything between GPUs goes over host memory"
        remedy = "unset it, unless the peer-to-peer check fails without it"
        yield _odd("NCCL_P2P_DISABLE", WARN, value, remedy)
    if "BNB_CUDA_VERSION" in environ:
        value = f"BNB_CUDA_VERSION={environ['BNB_CUDA_VERSION']}: bitsandbytes' own choice is off"
        yield _odd("BNB_CUDA_VERSION", WARN, value, "unset it")
    yield from _allocator(environ)
    yield from _shadowed(environ)


def _visible_devices(gpus: Sequence[GpuFacts], environ: Mapping[str, str]) -> Iterator[Finding]:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return
    everything = {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    num_gpus = len(list_gpus(everything))
    wanted = len([entry for entry in visible.split(",") if entry.strip()])
    if num_gpus and not visible.strip():
        value = f"CUDA_VISIBLE_DEVICES is empty: none of the {num_gpus} GPUs is used"
        yield _odd("CUDA_VISIBLE_DEVICES", WARN, value, "unset it")
    elif num_gpus and len(gpus) < wanted:
        value = f"CUDA_VISIBLE_DEVICES={visible}: {len(gpus)} of the {wanted} that it names count"
        remedy = f"name some of 0 to {num_gpus - 1}; the list ends at its first unknown entry"
        yield _odd("CUDA_VISIBLE_DEVICES", WARN, value, remedy)
    kinds = {gpu.name for gpu in gpus}
    if len(kinds) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        value = "CUDA numbers GPUs of several kinds by speed, `nvidia-smi` by their place"
        yield _odd("CUDA_DEVICE_ORDER", WARN, value, "set CUDA_DEVICE_ORDER=PCI_BUS_ID")


def _interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    known = {name for _, name in socket.if_nameindex()}
    for variable in INTERFACE_VARIABLES:
        wanted = environ.get(variable, "")
        if not wanted or wanted[0] in "^=":  # what is left out, or a list of exact names
            continue
        missing = [n for n in wanted.split(",") if not any(k.startswith(n) for k in known)]
        if missing:
            value = f"{variable}={wanted}: there is no interface `{missing[0]}`"
            remedy = f"unset it, or name one of {', '.join(sorted(known))}"
            yield _odd(variable, FAIL, value, remedy)


def _allocator(environ: Mapping[str, str]) -> Iterator[Finding]:
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        given = environ.get(variable, "")
        if "max_split_size_mb" in given or "backend:cudaMallocAsync" in given:
            value = f"{variable}={given}: plans of memory are for torch's own allocator"
            yield _odd(variable, WARN, value, "unset it, or set it to `expandable_segments:True`")


def _shadowed(environ: Mapping[str, str]) -> Iterator[Finding]:
    for part in environ.get("LD_LIBRARY_PATH", "").split(":"):
        names = [p.name for pattern in SHADOWED for p in Path(part or "/nowhere").glob(pattern)]
        if names:
            value = f"LD_LIBRARY_PATH puts `{part}/{min(names)}` before the one that torch brings"
            yield _odd("LD_LIBRARY_PATH", WARN, value, f"leave `{part}` out of it")
            return


def _odd(name: str, status: str, value: str, remedy: str) -> Finding:
    return Finding("environment", name, status, value, remedy)
