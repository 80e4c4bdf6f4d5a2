"""What wandb's client wrote into a ``.wandb`` file, by the messages of its own SDK.

The file is a log as LevelDB writes it: blocks of 32 KiB, records with a checksum, a length and a
kind before them (whole, first, middle, last). https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

Record: Any = vars(wandb_internal_pb2)["Record"]
BLOCK_BYTES = 32768
FILE_HEADER_BYTES = 7


@dataclass
class SentRun:
    """One run as it would be sent; wandb's own keys (``_step`` apart) are left out."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def values(self, name: str) -> list[tuple[int, float]]:
        """Returns a number by step, in the order it was sent."""
        return [(row["_step"], row[name]) for row in self.history if name in row]


def read_run(folder: Path) -> SentRun:
    """Returns the one run below ``folder``."""
    [path] = folder.rglob("*.wandb")
    found = SentRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _items(record.run.config.update)
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    names = {".".join(item.nested_key) or item.key: item.value_json for item in items}
    own = ("_timestamp", "_runtime", "_wandb")
    return {name: json.loads(text) for name, text in names.items() if name.split(".")[0] not in own}


def _records(content: bytes) -> Iterator[Any]:
    position, body = FILE_HEADER_BYTES, b""
    while position + 7 <= len(content):
        if (left := BLOCK_BYTES - position % BLOCK_BYTES) < 7:
            position += left
            continue
        _crc, length, kind = struct.unpack("<IHB", content[position : position + 7])
        body += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(body)
            body = b""
