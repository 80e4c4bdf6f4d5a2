"""What the GPUs of this machine are, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fsdpq.launch.machine.devices import select_visible
from fsdpq.launch.machine.nvidia_smi import query_table

MIB = 2**20
FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "driver_version")
"""What every driver answers that a supported torch runs on."""

MORE_FIELDS = (
    "compute_cap", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max",
    "ecc.mode.current", "mig.mode.current", "power.limit", "power.default_limit",
    "pci.bus_id",
)  # fmt: skip
"""What newer drivers answer too; asked for apart, since one unknown name refuses all.

The PCIe generation of the moment is left out: an idle card lowers it to save power.
"""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as the driver describes it. What the driver does not say is None.

    Attributes:
        index: the driver's number, which ``CUDA_VISIBLE_DEVICES`` does not change.
        uuid: ``GPU-...``, or ``MIG-...`` of a part of one.
        name: ``NVIDIA GeForce RTX 4090``.
        memory_bytes: of the device.
        free_bytes: of them now.
        driver: its version, ``580.65.06``.
        compute_capability: ``(8, 9)``.
        pcie_generation: the highest that card and board can do.
        pcie_width: lanes in use.
        pcie_max_width: lanes of the card.
        ecc: whether errors of its memory are corrected.
        mig: whether it may be split into parts.
        power_limit_w: now, in watts.
        default_power_limit_w: as the maker sets it, in watts.
        bus_id: of PCI, ``00000000:01:00.0``.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    driver: str | None = None
    compute_capability: tuple[int, int] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    pcie_max_width: int | None = None
    ecc: bool | None = None
    mig: bool | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    bus_id: str | None = None

    @property
    def label(self) -> str:
        """The line of ``nvidia-smi -L``, as `fsdpq.launch.machine.devices.list_gpus` gives it."""
        return f"GPU {self.index}: {self.name} (UUID: {self.uuid})"


def query_gpus(environ: Mapping[str, str] = os.environ) -> list[GpuFacts]:
    """Returns the GPUs that this process may use, in the order in which ranks get them.

    ``CUDA_VISIBLE_DEVICES`` counts as it does for `list_gpus`. Of a part of a GPU (MIG) nothing but
    its name is known. Empty where there is no GPU or no ``nvidia-smi``.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return []
    rows = query_table((*FIELDS, *MORE_FIELDS)) or query_table(FIELDS) or []
    gpus = {facts.label: facts for facts in map(_facts, rows) if facts is not None}
    chosen = select_visible(list(gpus), visible)
    return [gpus.get(label) or _part_of_gpu(index, label) for index, label in enumerate(chosen)]


def _facts(row: Mapping[str, str]) -> GpuFacts | None:
    """Returns a row as facts; None for a GPU that is lost (``[Unknown Error]`` everywhere)."""
    if not {"index", "uuid", "name"} <= row.keys() or not row["index"].isdecimal():
        return None
    return GpuFacts(
        index=int(row["index"]), uuid=row["uuid"], name=row["name"],
        memory_bytes=_mib(row.get("memory.total")), free_bytes=_mib(row.get("memory.free")),
        driver=row.get("driver_version"),
        compute_capability=_capability(row.get("compute_cap")),
        pcie_generation=_whole(row.get("pcie.link.gen.max")),
        pcie_width=_whole(row.get("pcie.link.width.current")),
        pcie_max_width=_whole(row.get("pcie.link.width.max")),
        ecc=_switch(row.get("ecc.mode.current")), mig=_switch(row.get("mig.mode.current")),
        power_limit_w=_number(row.get("power.limit")),
        default_power_limit_w=_number(row.get("power.default_limit")),
        bus_id=row.get("pci.bus_id"),
    )  # fmt: skip


def _part_of_gpu(index: int, entry: str) -> GpuFacts:
    return GpuFacts(index, entry, "part of a GPU (MIG)", mig=True)


def _number(text: str | None) -> float | None:
    found = re.match(r"\d+(\.\d+)?", text or "")
    return float(found[0]) if found else None


def _whole(text: str | None) -> int | None:
    number = _number(text)
    return None if number is None else int(number)


def _mib(text: str | None) -> int | None:
    number = _whole(text)
    return None if number is None else number * MIB


def _capability(text: str | None) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def _switch(text: str | None) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text or "")
