"""A plan as plain JSON data: ``fsdpq plan --json`` and ``plan.json`` of a run.

Bytes are whole numbers, times are seconds, rates are a second. ``format`` counts changes after
which a reader of an older one would misread it; new keys are none.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.result import DiskUse, HostMemory, Moment, Plan, RankMemory, StepTime

FORMAT = 1


def plan_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON data."""
    return {
        "format": FORMAT,
        "name": plan.name,
        "model": plan.model,
        "machine": _machine(plan.machine),
        "workload": None if plan.workload is None else dataclasses.asdict(plan.workload),
        "fits": plan.fits,
        "shortages": list(plan.shortages),
        "device": {"type": plan.device_type, **_device(plan.device)},
        "host": _host(plan.host),
        "disk": _disk(plan.disk),
        "time": _time(plan.time),
        "edits": [dataclasses.asdict(edit) for edit in plan.edits],
        "fits_on": list(plan.fits_on),
        "limits": [dataclasses.asdict(limit) for limit in plan.limits],
        "variants": [dataclasses.asdict(variant) for variant in plan.variants],
        "notes": list(plan.notes),
    }


def _machine(machine: Machine) -> dict[str, Any]:
    gpus = machine.gpus
    return dataclasses.asdict(machine) | {
        "gpus": None if gpus is None else [dataclasses.asdict(gpu) for gpu in gpus]
    }


def _moment(moment: Moment) -> dict[str, Any]:
    return {
        "phase": moment.phase,
        "name": moment.name,
        "bytes": moment.total,
        "allocated_bytes": moment.allocated,
        "parts": {name: size for name, size in moment.parts.items() if size},
    }


def _device(device: RankMemory) -> dict[str, Any]:
    return {
        "peak_bytes": device.peak.total,
        "peak": device.peak.name,
        "moments": [_moment(moment) for moment in device.moments],
    }


def _host(host: HostMemory) -> dict[str, Any]:
    return {
        "peak_bytes": host.peak,
        "training_bytes": host.total,
        "load_bytes": host.load_bytes,
        "file_backed_bytes": host.file_backed_bytes,
        "parts": {name: size for name, size in host.parts.items() if size},
    }


def _disk(disk: DiskUse) -> dict[str, Any]:
    return {"total_bytes": disk.total, **dataclasses.asdict(disk)}


def _time(time: StepTime) -> dict[str, Any]:
    plain = dataclasses.asdict(time)
    plain["advice"] = [
        {"settings": list(settings), "reason": reason} for settings, reason in time.advice
    ]
    return plain
