"""What differs between two locks, in the order of how much it matters: for ``fsdpq reproduce``.

A lock is turned into facts, one a line of the report. Facts are compared by their value and shown
by their text: two paths of the same content are the same file. What only one of the two locks
records (one is of another version of fsdpq) says nothing, and is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fsdpq.launch.machine.hardware import NUMERIC_VARIABLES
from fsdpq.launch.runs.lock_file import as_list, as_mapping

Lock = Mapping[str, Any]

NOT_THERE = "none"

NUMERIC_PACKAGES = frozenset(
    {
        "torch", "transformers", "bitsandbytes", "hqq", "numpy", "tokenizers", "triton", "jinja2",
        "datasets", "liger-kernel", "flash-attn",
    }
)  # fmt: skip
"""Packages that compute, or that decide about a token; the others carry data."""


Level = Literal["inputs", "numbers", "note"]
"""How much a difference matters: other data or another base, which is another run; sums that may be
rounded or ordered otherwise; worth knowing."""

LEVELS: tuple[Level, ...] = ("inputs", "numbers", "note")


@dataclass(frozen=True)
class Fact:
    """One thing that a lock says.

    Attributes:
        value: what is compared, plain data.
        text: what is shown.
        level: how much it matters where it differs.
    """

    value: Any
    text: str
    level: Level


@dataclass(frozen=True)
class Drift:
    """One thing that is not as it was.

    Attributes:
        what: its name.
        then: as the lock says it.
        now: as it is here.
        level: how much it matters.
    """

    what: str
    then: str
    now: str
    level: Level


@dataclass(frozen=True)
class DriftReport:
    """What differs between a lock and this machine.

    Attributes:
        rows: what differs, what matters most first.
        num_same: things that are as they were.
        num_unknown: things that only one of the two locks records.
    """

    rows: tuple[Drift, ...]
    num_same: int
    num_unknown: int = 0

    def at(self, level: Level) -> list[Drift]:
        """Returns the rows of one level."""
        return [row for row in self.rows if row.level == level]

    @property
    def matters(self) -> bool:
        """Whether anything differs that may change the losses."""
        return any(row.level != "note" for row in self.rows)

    def with_rows(self, rows: list[Drift]) -> DriftReport:
        """Returns the report with more rows."""
        return DriftReport(_sorted([*self.rows, *rows]), self.num_same, self.num_unknown)


def compare_locks(then: Lock, now: Lock) -> DriftReport:
    """Returns what differs between two locks; what only one of them records is counted."""
    old, new = dict(list_facts(then)), dict(list_facts(now))
    both = [name for name in old if name in new]
    rows = [
        Drift(name, old[name].text, new[name].text, old[name].level)
        for name in both
        if old[name].value != new[name].value
    ]
    num_unknown = len(old) + len(new) - 2 * len(both)
    return DriftReport(_sorted(rows), len(both) - len(rows), num_unknown)


def compare_inputs(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Drift]:
    """Returns what differs between ``inputs`` of two locks."""
    return list(compare_locks({"inputs": then}, {"inputs": now}).rows)


def _sorted(rows: list[Drift]) -> tuple[Drift, ...]:
    return tuple(sorted(rows, key=lambda row: LEVELS.index(row.level)))


def list_facts(lock: Lock) -> Iterator[tuple[str, Fact]]:
    """Yields name and fact of everything in a lock that is compared."""
    yield from _input_facts(as_mapping(lock.get("inputs")))
    yield from _version_facts(lock)
    for name, value in (("world size", lock.get("world_size")), ("seed", lock.get("seed"))):
        if value is not None:
            yield name, _plain(value, "numbers")
    if "environment" in lock:
        environment = as_mapping(lock["environment"])
        for name in NUMERIC_VARIABLES:
            yield f"${name}", _plain(environment.get(name), "numbers")
    yield from _hardware_facts(as_mapping(lock.get("hardware")))
    if "git" in lock:
        checkout = as_mapping(lock["git"])
        yield "git commit", _plain(checkout.get("commit"), "note", length=12)
        if "diff_sha256" in checkout or not checkout:
            changes = checkout.get("diff_sha256")
            yield "git changes", _plain(changes, "note", length=12)


def _version_facts(lock: Lock) -> Iterator[tuple[str, Fact]]:
    if "fsdpq" in lock:
        yield "fsdpq", _plain(lock["fsdpq"], "numbers")
    if "fsdpq_sha256" in lock:
        yield "fsdpq's code", _plain(lock["fsdpq_sha256"], "numbers", length=12)
    for name in ("python", "platform"):
        if name in lock:
            yield name, _plain(lock[name], "note")
    for name, version in as_mapping(lock.get("packages")).items():
        computes = name in NUMERIC_PACKAGES or name.startswith("nvidia-")
        yield name, _plain(version, "numbers" if computes else "note")


def _hardware_facts(hardware: Lock) -> Iterator[tuple[str, Fact]]:
    if "gpus" in hardware:
        names = [_gpu_name(str(gpu)) for gpu in as_list(hardware["gpus"])]
        yield "GPUs", Fact(names, ", ".join(names) or NOT_THERE, "numbers")
    if "cpu" in hardware:
        yield "CPU", _plain(hardware["cpu"], "numbers")
    for name, key in (("GPU driver", "gpu_driver"), ("CPU cores", "num_cores")):
        if key in hardware:
            yield name, _plain(hardware[key], "note")
    if isinstance(num_bytes := hardware.get("memory_bytes"), int):
        gib = round(num_bytes / 1024**3)  # the kernel keeps a little more or less for itself
        yield "memory", Fact(gib, f"{gib} GiB", "note")


def _input_facts(inputs: Lock) -> Iterator[tuple[str, Fact]]:
    model = as_mapping(inputs.get("model"))
    if "sha256" in model:
        at = f"{model.get('source')}" + (f"@{model['revision']}" if model.get("revision") else "")
        yield "model", _content(model["sha256"], at)
    data = as_mapping(inputs.get("data"))
    sources = [*as_list(data.get("train")), data.get("eval")]
    for source in map(as_mapping, sources):
        if source:
            yield from _source_facts(source)
    if data:
        text = data.get("chat_template")
        digest = None if text is None else hashlib.sha256(str(text).encode()).hexdigest()
        yield "chat template file", _plain(digest, "inputs", length=12)
    if digest := as_mapping(inputs.get("prepared")).get("digest"):
        yield "prepared rows", _content(digest, "")
    if digest := as_mapping(inputs.get("base")).get("digest"):
        yield "quantized base", _content(digest, "")


def _source_facts(source: Lock) -> Iterator[tuple[str, Fact]]:
    key = str(source.get("key", "data"))
    files = [as_mapping(file) for file in as_list(source.get("files"))]
    yield f"{key}: files", _plain(len(files), "inputs")
    for number, file in enumerate(files, start=1):
        name = key if len(files) == 1 else f"{key}: file {number}"
        yield name, _content(file.get("sha256"), str(file.get("path", "")))
    yield f"{key}: format", _plain(source.get("format"), "inputs")


def _content(sha256: Any, where: str) -> Fact:
    text = f"sha256 {str(sha256)[:12]}" + (f", {where}" if where else "")
    return Fact(str(sha256), text, "inputs")


def _plain(value: Any, level: Level, *, length: int | None = None) -> Fact:
    text = NOT_THERE if value is None else value if isinstance(value, str) else json.dumps(value)
    return Fact(value, text[:length], level)


def _gpu_name(line: str) -> str:
    """Returns the GPU's name of a line of ``nvidia-smi -L``, which also numbers it."""
    return line.partition(" (UUID")[0].partition(": ")[2] or Path(line).name
