"""What a machine says of itself before it takes part in a run, and what must be the same on all."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import fsdpq
from fsdpq.launch.machine.hardware import describe_hardware
from fsdpq.launch.ready import Settled
from fsdpq.launch.runs.lock_file import as_mapping, hash_code, package_versions
from fsdpq.launch.runs.saved_run import source_hashes
from fsdpq.recipe.precision import base_dtype

PROTOCOL = 1
"""Version of what launchers say to each other."""

DECISIVE = ("torch", "transformers", "bitsandbytes", "hqq", "peft", "safetensors")
"""Packages whose versions must be the same on all machines."""

_SHOWN = 12
_FREE = ("launch.rdzv_endpoint", "launch.node_timeout_s", "launch.join_timeout_s")
"""One address has several names, and how long a machine waits is its own matter."""


@dataclass(frozen=True)
class NodeFacts:
    """A machine that wants to take part.

    Attributes:
        host: its name.
        address: by which it reaches the first machine.
        process: id of its launcher.
        node_rank: the place that it was told to take, None for any.
        ranks: processes that it would start.
        device: ``cuda`` or ``cpu``.
        recipe: resolved on it.
        free_dtype: whether its ``model.dtype`` is its own choice.
        versions: of Python, fsdpq and the packages that compute.
        hardware: see `fsdpq.launch.machine.hardware`.
        protocol: version of what it says.
    """

    host: str
    address: str
    process: int
    node_rank: int | None
    ranks: int
    device: str
    recipe: dict[str, Any]
    free_dtype: bool
    versions: dict[str, str | None]
    hardware: dict[str, Any]
    protocol: int = PROTOCOL

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.host} ({self.address})"

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NodeFacts:
        """Returns what `as_json` gave; what a newer version adds is left out.

        Raises:
            TypeError: something is missing.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def facts_of(settled: Settled, *, address: str, process: int, node_rank: int | None) -> NodeFacts:
    """Returns what this machine says of itself.

    Args:
        settled: the recipe.
        address: by which it reaches the first machine.
        process: id of this launcher.
        node_rank: the place that the user gave it.
    """
    recipe = settled.recipe
    packages = package_versions()
    versions = {"fsdpq": fsdpq.__version__, "fsdpq's code": hash_code()[:12]}
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        process=process,
        node_rank=node_rank,
        ranks=int(recipe.launch.nproc_per_node),
        device=recipe.launch.device,
        recipe=recipe.model_dump(mode="json"),
        free_dtype=base_dtype(settled.loaded.recipe) is None,
        versions=versions
        | {"python": ".".join(platform.python_version_tuple()[:2])}
        | {name: packages.get(name) for name in DECISIVE},
        hardware=describe_hardware(settled.gpus),
    )


def why_not(first: NodeFacts, other: NodeFacts) -> str:
    """Returns why ``other`` cannot take part beside ``first``, empty where it can.

    Every value that differs is named with both machines.
    """
    if first.protocol != other.protocol:
        differ = [("fsdpq", other.versions.get("fsdpq"), first.versions.get("fsdpq"))]
    else:
        differ = [*_other_versions(first, other), *_other_machine(first, other)]
        differ += _other_recipe(first, other)
    if not differ:
        return ""
    told = [
        f"{what} is {_shown(theirs)} on {other.name} and {_shown(ours)} on {first.name}"
        for what, theirs, ours in differ[:_SHOWN]
    ]
    if len(differ) > _SHOWN:
        told.append(f"and {len(differ) - _SHOWN} more")
    return "; ".join(told)


def describe_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what identifies the inputs of a lock, wherever they lie.

    A base is the same wherever the ranks quantize it, so only two that were made are compared.
    """
    found = {name: as_mapping(inputs.get(name)) for name in ("model", "data", "prepared", "base")}
    return {
        "the model": found["model"].get("sha256"),
        "the rows": found["prepared"].get("digest") or source_hashes(found["data"]),
        "the quantized base": found["base"].get("digest"),
    }


def other_inputs(
    first: NodeFacts, ours: Mapping[str, Any], other: NodeFacts, theirs: Mapping[str, Any]
) -> str:
    """Returns which inputs differ between two machines, with both hashes; empty where none do.

    Args:
        first: the first machine.
        ours: its `describe_inputs`.
        other: another machine.
        theirs: its `describe_inputs`.
    """
    told: list[str] = []
    for what, value in ours.items():
        found = theirs.get(what)
        if found == value or (what == "the quantized base" and None in (found, value)):
            continue
        told.append(
            f"{what} on {other.name} ({_shown(found)}) is another than on {first.name} "
            f"({_shown(value)})"
        )
    return "; ".join(told)


_Difference = tuple[str, Any, Any]


def _other_versions(first: NodeFacts, other: NodeFacts) -> Iterator[_Difference]:
    for name in first.versions:
        theirs = other.versions.get(name)
        if theirs != first.versions[name]:
            yield name, theirs, first.versions[name]


def _other_machine(first: NodeFacts, other: NodeFacts) -> Iterator[_Difference]:
    if other.ranks != first.ranks:
        yield "`launch.nproc_per_node`", other.ranks, first.ranks
    if other.device != first.device:
        yield "`launch.device`", other.device, first.device


def _other_recipe(first: NodeFacts, other: NodeFacts) -> Iterator[_Difference]:
    ours, theirs = _flat(first.recipe), _flat(other.recipe)
    told = {*_FREE, "launch.nproc_per_node", "launch.device"}
    told |= {"model.dtype"} if first.free_dtype and other.free_dtype else set()
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if key not in told and ours.get(key) != theirs.get(key):
            yield f"`{key}`", theirs.get(key), ours.get(key)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, entry in cast("dict[str, Any]", value).items():
        found |= _flat(entry, f"{path}.{name}" if path else str(name))
    return found


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
