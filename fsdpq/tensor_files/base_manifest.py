"""The manifest of a quantized base: what it was made from, and how to tell that it is whole.

A base is a directory: ``base.safetensors`` (the weights, rows of every matrix in order, so that any
rank's rows are one range of bytes), ``checksums.bin`` (crc32 of every 1 MiB of it, 4 bytes each,
little endian) and ``base.json``, the manifest, written last. A directory without ``base.json`` is
what a killed writer left, and never used.

Both halves read it: the launcher to choose a base, the ranks to check what they load.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fsdpq.errors import CheckpointError, DamagedBaseError
from fsdpq.run_files.writing import sync, write_whole

FORMAT = 1
"""Version of the files' layout and of what the writer puts into them; part of the key."""

MANIFEST_NAME = "base.json"
WEIGHTS_NAME = "base.safetensors"
CHECKSUMS_NAME = "checksums.bin"

CHUNK_BYTES = 1 << 20
"""Bytes of the weights that share one checksum."""

MAX_MANIFEST_BYTES = 1 << 20

LIBRARIES = {"bnb": "bitsandbytes", "hqq": "hqq"}
"""``quantization.kind`` -> the package whose version decides about the bits."""

NOT_IN_KEY = ("cache",)
"""Options of ``quantization`` that say nothing about the bits."""

Key = dict[str, Any]
"""What a base was made from: see `base_key`."""


@dataclass(frozen=True)
class BaseManifest:
    """What ``base.json`` says.

    Attributes:
        key: what the base was made from; see `base_key`.
        num_bytes: size of the weights' file.
        chunk_bytes: bytes that share one checksum.
        header_bytes: where the tensors begin: safetensors' header and what precedes it.
        header_sha256: of those first bytes.
        checksums_sha256: of the checksums' file.
        num_parameters: weights of the model, tied ones once.
        num_quantized: those that are stored quantized.
    """

    key: Key
    num_bytes: int
    chunk_bytes: int
    header_bytes: int
    header_sha256: str
    checksums_sha256: str
    num_parameters: int
    num_quantized: int

    @property
    def num_chunks(self) -> int:
        """Number of checksums."""
        return -(-self.num_bytes // self.chunk_bytes)


def base_key(
    *, model: Mapping[str, Any], quantization: Mapping[str, Any], dtype: str, device: str
) -> Key:
    """Returns what decides about the bits of a base, as plain JSON data.

    Args:
        model: ``sha256``, ``revision`` and ``source`` of the model, as the lock's ``inputs.model``
            has them; other entries are left out.
        quantization: the resolved recipe's section, as ``model_dump(mode="json")`` gives it.
        dtype: the resolved ``model.dtype``: ``bf16``, ``fp16`` or ``fp32``.
        device: the resolved ``launch.device``: quantizing on ``cpu`` and ``cuda`` may differ.
    """
    packages = ["torch", "transformers"]
    if (kind := quantization["kind"]) in LIBRARIES:
        packages.append(LIBRARIES[kind])
    return {
        "format": FORMAT,
        "model": {name: model.get(name) for name in ("sha256", "revision", "source")},
        "quantization": {n: v for n, v in sorted(quantization.items()) if n not in NOT_IN_KEY},
        "dtype": dtype,
        "device": device,
        "versions": {name: metadata.version(name) for name in sorted(packages)},
    }


def key_digest(key: Key) -> str:
    """Returns 16 hex digits for a directory's name: equal for keys without `key_differences`."""
    content = {**key, "model": key["model"]["sha256"]}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key_differences(found: Key, wanted: Key) -> list[str]:
    """Returns in words how the base ``found`` differs from what is ``wanted``; empty for equal.

    Where the model came from does not matter as long as its files are the same.
    """
    if found.get("format") != wanted["format"]:
        return [f"made in format {found.get('format')}, this version writes {wanted['format']}"]
    differences: list[str] = []
    if found["model"]["sha256"] != wanted["model"]["sha256"]:
        differences.append(f"made from {_model(found)}, not from {_model(wanted)}")
    differences += _quantization_differences(found["quantization"], wanted["quantization"])
    for name, verb in (("dtype", "kept in"), ("device", "quantized on")):
        if found[name] != wanted[name]:
            differences.append(f"{verb} {name} {found[name]}, not {wanted[name]}")
    versions: dict[str, str] = found["versions"]
    for name, version in wanted["versions"].items():
        if versions.get(name) != version:
            differences.append(f"made with {name} {versions.get(name)}, not {version}")
    return differences


def _quantization_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    if found.get("kind") != wanted["kind"]:
        return [f"quantized by {found.get('kind')}, the recipe says {wanted['kind']}"]
    return [
        f"quantized with {name} {_shown(found.get(name))}, the recipe says "
        f"{_shown(wanted.get(name))}"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]


def _model(key: Key) -> str:
    model = key["model"]
    revision = f" at {model['revision']}" if model.get("revision") else ""
    return f"{model.get('source')}{revision} (sha256 {str(model['sha256'])[:12]})"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def is_base(directory: Path) -> bool:
    """Whether ``directory`` has a manifest: its writer came to the end."""
    return (directory / MANIFEST_NAME).is_file()


def write_manifest(directory: Path, manifest: BaseManifest) -> None:
    """Writes ``base.json``, which makes the directory a base: after everything else is on disk."""
    content = _content(manifest)
    document = {**content, "sha256": _digest(content)}
    write_whole(directory / MANIFEST_NAME, (json.dumps(document, indent=2) + "\n").encode())
    sync(directory)


def read_manifest(directory: Path) -> BaseManifest:
    """Returns the manifest of a base.

    Raises:
        CheckpointError: there is none, or one of a newer version of fsdpq.
        DamagedBaseError: it cannot be read, or is not what was written.
    """
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        message = f"{directory} is no quantized base: it has no {MANIFEST_NAME}"
        raise CheckpointError(message, hint=remedy(directory)) from error
    except OSError as error:
        raise damaged(directory, f"{MANIFEST_NAME} cannot be read: {error.strerror}") from error
    try:
        document = json.loads(raw)
        found = document.pop("format")
        content = {"format": found, **document}
        sha256 = content.pop("sha256")
        if found == FORMAT and sha256 == _digest(content):
            return _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(directory, f"{MANIFEST_NAME} cannot be understood") from error
    if found != FORMAT and sha256 == _digest(content):
        message = f"{directory} is a quantized base of format {found}, this version reads {FORMAT}"
        raise CheckpointError(message, hint=remedy(directory))
    raise damaged(directory, f"{MANIFEST_NAME} is not what was written")


def check_files(directory: Path, manifest: BaseManifest) -> bytes:
    """Checks sizes, header and checksums of a base, not its weights; returns the checksums.

    Raises:
        DamagedBaseError: a file is missing, truncated or not what was written.
    """
    weights = directory / WEIGHTS_NAME
    try:
        num_bytes = weights.stat().st_size
        if num_bytes != manifest.num_bytes:
            size = f"{num_bytes} bytes instead of {manifest.num_bytes}"
            raise damaged(directory, f"{WEIGHTS_NAME} has {size}")
        with weights.open("rb") as file:
            header = file.read(manifest.header_bytes)
        checksums = (directory / CHECKSUMS_NAME).read_bytes()
    except OSError as error:
        name = Path(str(error.filename)).name
        raise damaged(directory, f"{name} cannot be read: {error.strerror}") from error
    if hashlib.sha256(header).hexdigest() != manifest.header_sha256:
        at = f"between bytes 0 and {manifest.header_bytes}"
        raise damaged(directory, f"the header of {WEIGHTS_NAME} is not what was written, {at}")
    if hashlib.sha256(checksums).hexdigest() != manifest.checksums_sha256:
        raise damaged(directory, f"{CHECKSUMS_NAME} is not what was written")
    return checksums


def damaged(directory: Path, what: str) -> DamagedBaseError:
    """Returns the error for a base that is not what was written."""
    return DamagedBaseError(f"the base {directory} is damaged: {what}", hint=remedy(directory))


def remedy(directory: Path) -> str:
    """Returns what the user can do about a base that cannot be used."""
    return f"delete {directory}: the next run makes it again"


def _content(manifest: BaseManifest) -> dict[str, Any]:
    return {"format": FORMAT, **dataclasses.asdict(manifest)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(content: Mapping[str, Any]) -> BaseManifest:
    fields = dataclasses.fields(BaseManifest)
    manifest = BaseManifest(**{field.name: content[field.name] for field in fields})
    if manifest.chunk_bytes <= 0 or not 0 < manifest.header_bytes <= manifest.num_bytes:
        raise ValueError("sizes do not fit together")
    return manifest
