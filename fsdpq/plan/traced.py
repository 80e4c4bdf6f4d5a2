"""What a trace or a measurement of rank 0 found, in the terms of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from fsdpq.plan.result import Category, Moment, Phase, RankMemory


@dataclass(frozen=True)
class Traced:
    """Memory of rank 0, not by arithmetic.

    Attributes:
        how: ``trace``: the worker's step under fake tensors; ``measure``: it ran for real.
        device: the most of each phase; a measurement tells no categories apart and has all of it
            under ``measured``. Without context and fragmentation.
        host: category -> bytes in host memory, when the device's or the host's were at the most.
        seconds: that it took.
        reserved_bytes: what torch's allocator took from the device; measured only.
        device_bytes: what the device gave away in all; measured only.
        notes: where it differs from the run, one sentence each.
    """

    how: Literal["trace", "measure"]
    device: RankMemory
    host: Mapping[str, int]
    seconds: float
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        moments: list[dict[str, Any]] = [
            {"phase": m.phase, "name": m.name, "parts": dict(m.parts)} for m in self.device.moments
        ]
        return {
            "how": self.how,
            "moments": moments,
            "host": dict(self.host),
            "seconds": self.seconds,
            "reserved_bytes": self.reserved_bytes,
            "device_bytes": self.device_bytes,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Traced:
        """Returns what `as_json` was made of."""
        moments = tuple(
            Moment(
                cast("Phase", moment["phase"]),
                moment["name"],
                cast("dict[Category, int]", moment["parts"]),
            )
            for moment in row["moments"]
        )
        return cls(
            how=row["how"],
            device=RankMemory(moments),
            host=row["host"],
            seconds=row["seconds"],
            reserved_bytes=row["reserved_bytes"],
            device_bytes=row["device_bytes"],
            notes=tuple(row["notes"]),
        )
