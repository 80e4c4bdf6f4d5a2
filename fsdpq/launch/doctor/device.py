"""What a program with torch found out about the devices (`fsdpq.worker.probe`), in words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsdpq.fetch.cache import format_bytes
from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.doctor.gpus import CONSUMER, P2P_ADVICE
from fsdpq.launch.doctor.packages import installed_version
from fsdpq.launch.machine.gpus import GpuFacts
from fsdpq.launch.ranks.single_worker import worker_alone_environment

TIMEOUT_S = 120.0
WORKER = ("-m", "fsdpq.worker.probe")
LANE_BANDWIDTH = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.56e9}
"""Bytes/s of one PCIe lane by generation, one way."""

POOR_SHARE = 0.5
"""Copies from pinned memory reach 80% to 90% of the lanes."""

MODULE_REMEDIES = {
    "flash_attn": (
        "flash-attn", "pip install --force-reinstall --no-deps --no-cache-dir flash-attn",
    ),
    "triton": ("triton", "install torch again, which brings its own triton"),
}  # fmt: skip
TORCH_REMEDY = "pip install --force-reinstall -c constraints.txt torch"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Probed:
    """What the program printed.

    Attributes:
        facts: what each try found, or its ``error``, by name.
        hung: the try that it ended in, empty where it came to its end.
        end: how it ended there, ``took more than 120 s``.
    """

    facts: Mapping[str, Row]
    hung: str = ""
    end: str = ""


def find_devices(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """Runs the program and says what it found."""
    if installed_version("torch") is None:
        return  # `find_torch` says so
    yield from explain_probed(run_probe("cuda" if gpus else "cpu"), gpus)


def run_probe(
    device: str, *, worker: Sequence[str] = WORKER, timeout_s: float = TIMEOUT_S
) -> Probed:
    """Runs the program to its end, or ends it.

    Args:
        device: ``cuda`` or ``cpu``.
        worker: arguments of Python that name the program.
        timeout_s: that it gets.
    """
    try:
        done = subprocess.run(
            [sys.executable, *worker, f"--device={device}"], env=worker_alone_environment(),
            stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        text, end = done.stdout, f"it ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        text, end = late.stdout or b"", f"it took more than {timeout_s:.0f} s"
    return read_probed(text.decode("utf-8", errors="replace"), end)


def read_probed(text: str, end: str) -> Probed:
    """Returns what the program printed; other lines, of libraries, are passed over."""
    started: list[str] = []
    facts: dict[str, Row] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
            name = row["probe"]
        except (ValueError, TypeError, KeyError):
            continue
        if row.get("state") == "start":
            started.append(name)
        else:
            facts[name] = row
    hung = next((name for name in started if name not in facts), "")
    return Probed(facts, hung or ("" if started else "torch"), end)


def explain_probed(probed: Probed, gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """Yields the findings about what was probed."""
    for kind, explain in EXPLAINERS.items():
        rows = {n: row for n, row in probed.facts.items() if n.partition(" ")[0] == kind}
        if rows:
            yield from explain(rows, gpus)
    if probed.hung:
        kind, _, rest = probed.hung.partition(" ")
        what = {"torch": "importing torch and starting CUDA", "products": f"computing on {rest}",
                "pinned": "pinning host memory", "host": f"copying between the host and {rest}",
                "peer": f"copying from {' to '.join(rest.split())}",
                "import": f"importing {rest}"}.get(kind, probed.hung)  # fmt: skip
        remedies = {"peer": P2P_ADVICE, "torch": TORCH_REMEDY}
        remedy = remedies.get(kind, "look at the driver's messages (`dmesg | grep -i nvrm`)")
        if kind == "import":
            remedy = MODULE_REMEDIES[rest][1]
        status = WARN if kind == "import" else FAIL
        yield Finding("device", "tries", status, f"{what} did not end well: {probed.end}", remedy)


def _explain_torch(rows: Mapping[str, Row], gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    row = rows["torch"]
    if "error" in row:
        value = f"cannot be imported: {row['error']}"
        yield Finding("device", "torch", FAIL, value, TORCH_REMEDY)
    elif "why_no_cuda" in row:
        remedy = "install a driver that fits torch's CUDA, or restart the machine after an update"
        yield Finding("device", "torch", FAIL, f"CUDA: {row['why_no_cuda']}", remedy)
    elif row["cuda"] is not None and row["gpus"] < len(gpus):
        value = f"sees {row['gpus']} of {len(gpus)} GPUs"
        remedy = "look at `nvidia-smi` for errors, and restart the machine"
        yield Finding("device", "torch", FAIL, value, remedy)
    else:
        parts = [f"imported in {row['seconds']:.1f} s"]
        parts += [
            f"{word} {row[key]}"
            for key, word in (("cuda", "CUDA"), ("cudnn", "cuDNN"), ("nccl", "NCCL"))
            if row.get(key)
        ]
        yield Finding("device", "torch", OK, ", ".join(parts))


def _explain_products(rows: Mapping[str, Row], _gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    for name, row in rows.items():
        device = name.partition(" ")[2]
        if "error" in row:
            value = f"bf16 products on {device}: {row['error']}"
            remedy = "install a torch that is built for this GPU: https://pytorch.org"
            yield Finding("device", f"products {device}", FAIL, value, remedy)
        elif row["different"]:
            value = f"{row['different']} of {row['entries']} entries of a bf16 product are wrong"
            remedy = "do not train on it: lower its clocks or replace it, and run this again"
            yield Finding("device", f"products {device}", FAIL, value, remedy)
    if all(row.get("different") == 0 for row in rows.values()):
        devices = f"{len(rows)} GPU{'s' * (len(rows) > 1)}" if "products cpu" not in rows else "CPU"
        yield Finding("device", "bf16 products", OK, f"exact ({devices})")


def _explain_pinned(rows: Mapping[str, Row], _gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    row = rows["pinned"]
    failure = row.get("error") or row["failure"]
    pinned = row.get("pinned_bytes", 0)
    if failure:
        value = f"fails after {format_bytes(pinned)}: {failure}"
        remedy = (
            "under WSL raise `memory` in .wslconfig; in a container lift `ulimit -l`; runs with "
            "`fsdp.offload` go on without pinning, slower"
        )
        yield Finding("device", "pinned memory", WARN, value, remedy)
    else:
        yield Finding("device", "pinned memory", OK, f"{format_bytes(pinned)} at least")


def _explain_host(rows: Mapping[str, Row], gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    for name, row in rows.items():
        device = name.partition(" ")[2]
        title = f"host and {device}"
        if "error" in row:
            remedy = "look at the driver's messages (`dmesg | grep -i nvrm`)"
            yield Finding("device", title, FAIL, row["error"], remedy)
            continue
        value = f"{_rate(row['to_device'])} to it, {_rate(row['from_device'])} back"
        if row["different"]:
            value = f"{row['different']:,} bytes arrive wrong"
            remedy = "do not train on it: check memory and seating of the card"
            yield Finding("device", title, FAIL, value, remedy)
            continue
        number = int(device.partition(":")[2] or 0)
        possible = _lane_bandwidth(gpus[number]) if number < len(gpus) else None
        if possible and row["pinned"] and row["to_device"] < POOR_SHARE * possible:
            value += f": its PCIe lanes could do {_rate(possible)}"
            remedy = "check the slot and PCIe settings of the BIOS; `fsdp.offload` will be slow"
            yield Finding("device", title, WARN, value, remedy)
        else:
            yield Finding("device", title, OK, value)


def _explain_peers(rows: Mapping[str, Row], gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    wrong = [name for name, row in rows.items() if row.get("different")]
    failed = [name for name, row in rows.items() if "error" in row]
    consumer = any(CONSUMER.search(gpu.name) for gpu in gpus)
    remedy = P2P_ADVICE if consumer else "set `NCCL_P2P_DISABLE=1` in the environment"
    if wrong or failed:
        name = (wrong or failed)[0]
        source, target = name.split()[1:]
        what = f"{rows[name]['different']:,} bytes arrive wrong" if wrong else rows[name]["error"]
        value = (
            f"{len(wrong or failed)} of {len(rows)} pairs, the first {source} to {target}: {what}"
        )
        yield Finding("device", "peer copies", FAIL, value, remedy)
        return
    slowest = min(row["bytes_per_s"] for row in rows.values())
    direct = sum(row["access"] for row in rows.values())
    way = "directly" if direct == len(rows) else f"{direct} of {len(rows)} pairs directly"
    value = f"{len(rows)} pairs right, {way}, {_rate(slowest)} at least"
    yield Finding("device", "peer copies", OK, value)


def _explain_imports(rows: Mapping[str, Row], _gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    for name, row in rows.items():
        if "error" in row:
            package, remedy = MODULE_REMEDIES[name.partition(" ")[2]]
            value = f"cannot be imported, built for another torch? {row['error']}"
            yield Finding("device", package, WARN, value, remedy)


EXPLAINERS: dict[str, Callable[[Mapping[str, Row], Sequence[GpuFacts]], Iterator[Finding]]] = {
    "torch": _explain_torch,
    "products": _explain_products,
    "pinned": _explain_pinned,
    "host": _explain_host,
    "peer": _explain_peers,
    "import": _explain_imports,
}


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(int(bytes_per_s))}/s"


def _lane_bandwidth(gpu: GpuFacts) -> float | None:
    if gpu.pcie_generation is None or gpu.pcie_width is None:
        return None
    lane = LANE_BANDWIDTH.get(gpu.pcie_generation)
    return None if lane is None else lane * gpu.pcie_width
