"""GPUs: what the driver says about each, about the ways between them, and who uses them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsdpq.fetch.cache import format_bytes
from fsdpq.launch.doctor.finding import FAIL, OK, WARN, Finding
from fsdpq.launch.doctor.packages import installed_version, torch_cuda
from fsdpq.launch.machine.devices import NO_BF16
from fsdpq.launch.machine.gpus import MIB, GpuFacts
from fsdpq.launch.machine.nvidia_smi import ask_nvidia_smi, query_table

PCI_DEVICES = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"
"""Vendor and class of NVIDIA's GPUs on PCI."""

BF16_CAPABILITY = (8, 0)
BUSY_SHARE = 0.1
"""More of the memory than this in use is somebody else's work; a desktop takes less."""

CONSUMER = re.compile(r"GeForce RTX [45]0\d\d|RTX [45]0\d\d\b")
P2P_ADVICE = (
    "set `NCCL_P2P_DISABLE=1` in the environment: peer-to-peer copies of GeForce 40 and 50 hang or "
    "corrupt on some boards (NVIDIA/nccl-tests#117, NVIDIA/nccl#1637)"
)


def find_driver(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """NVIDIA's driver, where there is a card for it."""
    if gpus:
        driver = gpus[0].driver
        if driver is not None:
            yield Finding("GPUs", "driver", OK, driver)
    elif cards := count_cards():
        value = f"PCI shows {cards} NVIDIA card{'s' * (cards > 1)} and `nvidia-smi` shows none"
        remedy = (
            "install NVIDIA's driver (in a container: start it with `--gpus all`); if "
            "CUDA_VISIBLE_DEVICES is set, unset it"
        )
        yield Finding("GPUs", "driver", WARN, value, remedy)


def find_gpus(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """The GPUs that a run may use."""
    if not gpus:
        remedy = "where there is one, `nvidia-smi -L` and CUDA_VISIBLE_DEVICES must show it"
        yield Finding("GPUs", "GPU", WARN, "none: runs train on the CPU, slowly", remedy)
    for gpu in gpus:
        yield _gpu_finding(gpu)
        yield from _lane_finding(gpu)
        if gpu.mig and len(gpus) > 1:
            remedy = "use whole GPUs (`nvidia-smi -mig 0`), or one part with one rank"
            value = "split into parts (MIG), between which NCCL does not communicate"
            yield Finding("GPUs", f"GPU {gpu.index} parts", WARN, value, remedy)
    if len({gpu.name for gpu in gpus}) > 1:
        least = min(gpus, key=lambda gpu: gpu.memory_bytes or 0)
        value = f"GPUs of several kinds: all wait for the slowest, {least.name} has least memory"
        remedy = "leave out the small ones: CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=..."
        yield Finding("GPUs", "kinds", WARN, value, remedy)
    if gpus and installed_version("torch") is not None and not torch_cuda():
        value = "the installed torch is a CPU build: it sees none of these GPUs"
        remedy = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
        yield Finding("GPUs", "CUDA", FAIL, value, remedy)


def _gpu_finding(gpu: GpuFacts) -> Finding:
    name, facts = f"GPU {gpu.index}", [gpu.name]
    if gpu.memory_bytes is not None and gpu.free_bytes is not None:
        facts.append(f"{gpu.free_bytes / 2**30:.1f} of {gpu.memory_bytes / 2**30:.1f} GiB free")
    if gpu.pcie_generation and gpu.pcie_width:
        facts.append(f"PCIe {gpu.pcie_generation}.0 x{gpu.pcie_width}")
    if gpu.power_limit_w is not None:
        below = gpu.default_power_limit_w is not None and (
            gpu.power_limit_w < gpu.default_power_limit_w
        )
        of = f" of {gpu.default_power_limit_w:.0f}" if below else ""
        facts.append(f"{gpu.power_limit_w:.0f}{of} W")
    facts += ["ECC"] * bool(gpu.ecc)
    value = ", ".join(facts)
    capability = gpu.compute_capability
    if NO_BF16.search(gpu.name) or (capability is not None and capability < BF16_CAPABILITY):
        remedy = "use `fsdp.precision: fp16_autocast`, or `model.dtype: fp32`"
        return Finding("GPUs", name, WARN, f"{value}, without bf16", remedy)
    if gpu.memory_bytes and gpu.free_bytes is not None:
        used = gpu.memory_bytes - gpu.free_bytes
        if used > BUSY_SHARE * gpu.memory_bytes:
            remedy = "end what uses it (see `nvidia-smi`), or leave it out: CUDA_VISIBLE_DEVICES"
            return Finding("GPUs", name, WARN, f"{value}: others use it", remedy)
    return Finding("GPUs", name, OK, value)


def _lane_finding(gpu: GpuFacts) -> Iterator[Finding]:
    if gpu.pcie_width and gpu.pcie_max_width and gpu.pcie_width < gpu.pcie_max_width:
        value = f"{gpu.pcie_width} of its {gpu.pcie_max_width} PCIe lanes"
        remedy = (
            "put it into a slot with more lanes, or plan without `fsdp.offload`, which moves the "
            "base over them in every step"
        )
        yield Finding("GPUs", f"GPU {gpu.index} lanes", WARN, value, remedy)


def find_links(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """What lies between two GPUs: NVLink, or PCIe over how much of the machine."""
    if len(gpus) < 2:
        return
    links = read_topology(ask_nvidia_smi("topo", "-m") or "")
    own = [f"GPU{gpu.index}" for gpu in gpus]
    kinds = {links.get((a, b), "") for a in own for b in own if a != b} - {""}
    if kinds and all(kind.startswith("NV") for kind in kinds):
        yield Finding("GPUs", "links", OK, f"NVLink between all ({', '.join(sorted(kinds))})")
    elif kinds:
        words = [LINK_WORDS.get(kind, f"NVLink ({kind})") for kind in sorted(kinds)]
        yield Finding("GPUs", "links", OK, f"between GPUs: {'; '.join(words)}")


LINK_WORDS = {
    "SYS": "over the link between processors (SYS)",
    "NODE": "over several PCIe hosts of a processor (NODE)",
    "PHB": "over the processor's PCIe host (PHB)",
    "PXB": "over several PCIe switches (PXB)",
    "PIX": "over one PCIe switch (PIX)",
}
"""What the words of ``nvidia-smi topo -m`` mean, from its own legend."""


def read_topology(text: str) -> dict[tuple[str, str], str]:
    """Returns what lies between two GPUs, from ``nvidia-smi topo -m``: ``NV18``, ``PHB``."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [[cell.strip() for cell in line.split("\t")] for line in plain.splitlines()]
    header = next((row for row in rows if "GPU0" in row[1:]), list[str]())
    columns = [(place, cell) for place, cell in enumerate(header) if re.fullmatch(r"GPU\d+", cell)]
    return {
        (row[0], column): row[place]
        for row in rows
        if re.fullmatch(r"GPU\d+", row[0])
        for place, column in columns
        if place < len(row) and row[0] != column
    }


def find_processes(gpus: Sequence[GpuFacts]) -> Iterator[Finding]:
    """Programs that compute on these GPUs now."""
    own = {gpu.uuid: gpu.index for gpu in gpus}
    if not own:
        return
    fields = ("gpu_uuid", "pid", "process_name", "used_memory")
    for row in query_table(fields, of="compute-apps") or ():
        if (index := own.get(row.get("gpu_uuid", ""))) is None or "pid" not in row:
            continue
        used = row.get("used_memory", "")
        taken = f", {format_bytes(int(used) * MIB)}" if used.isdecimal() else ""
        value = f"computes on GPU {index}: {row.get('process_name', 'no name')}{taken}"
        remedy = f"wait for it, or end it if it is yours: `kill {row['pid']}`"
        yield Finding("GPUs", f"process {row['pid']}", WARN, value, remedy)


def count_cards() -> int:
    """Returns the NVIDIA GPUs that PCI shows, with or without a driver."""
    return sum(
        _read(device / "vendor") == NVIDIA and _read(device / "class").startswith(DISPLAY)
        for device in (PCI_DEVICES.iterdir() if PCI_DEVICES.is_dir() else ())
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
