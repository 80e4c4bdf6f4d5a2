"""A program called ``nvidia-smi`` that answers as the real one, for GPUs of a test's choice."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

GPU = {
    "name": "NVIDIA GeForce RTX 4090", "memory.total": "24564 MiB", "memory.free": "24076 MiB",
    "driver_version": "580.65.06", "compute_cap": "8.9", "pcie.link.gen.max": "4",
    "pcie.link.width.current": "16", "pcie.link.width.max": "16", "ecc.mode.current": "Disabled",
    "mig.mode.current": "[N/A]", "power.limit": "450.00 W", "power.default_limit": "450.00 W",
}  # fmt: skip
"""What an RTX 4090 says; ``index``, ``uuid`` and ``pci.bus_id`` come from its place."""

PROGRAM = """\
#!{python} -IS
import json, sys
told = json.loads(open({path!r}).read())
given = sys.argv[1:]
query = next((a for a in given if a.startswith("--query-")), "")
if query:
    of, _, fields = query.removeprefix("--query-").partition("=")
    units = "nounits" not in " ".join(given)
    lines = []
    for row in told["tables"].get(of, []):
        unknown = [field for field in fields.split(",") if field not in row]
        if unknown:
            print(f'Field "{{unknown[0]}}" is not a valid field to query.')
            sys.exit(2)
        cells = [row[field] for field in fields.split(",")]
        lines.append(", ".join(c if units else c.removesuffix(" MiB").removesuffix(" W")
                               for c in cells))
    print("\\n".join(lines))
elif given == ["-L"]:
    for row in told["tables"]["gpu"]:
        print(f"GPU {{row['index']}}: {{row['name']}} (UUID: {{row['uuid']}})")
elif given in told["answers"]:
    print(told["texts"][told["answers"].index(given)], end="")
else:
    sys.exit(1)
"""


def install_nvidia_smi(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: Sequence[Mapping[str, str | None]],
    *,
    apps: Sequence[Mapping[str, str]] = (),
    texts: Mapping[tuple[str, ...], str] | None = None,
) -> None:
    """Puts the program on PATH, before all others; ``CUDA_VISIBLE_DEVICES`` is not set.

    Args:
        directory: where it lies.
        monkeypatch: undoes it.
        gpus: how each differs from `GPU`; a value of None is a field that the driver does not know.
        apps: rows of ``--query-compute-apps``.
        texts: arguments -> what else it prints: ``topo -m``.
    """
    rows = [
        {"index": str(n), "uuid": f"GPU-{n:04d}", "pci.bus_id": f"00000000:0{n + 1}:00.0"}
        | GPU | dict(given)
        for n, given in enumerate(gpus)
    ]  # fmt: skip
    known = [{field: cell for field, cell in row.items() if cell is not None} for row in rows]
    told = {
        "tables": {"gpu": known, "compute-apps": [dict(row) for row in apps]},
        "answers": [list(arguments) for arguments in texts or {}],
        "texts": list((texts or {}).values()),
    }
    path = directory / "nvidia-smi.json"
    path.write_text(json.dumps(told))
    program = directory / "nvidia-smi"
    program.write_text(PROGRAM.format(python=sys.executable, path=str(path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
