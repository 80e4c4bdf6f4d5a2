"""Reads tensors of a safetensors checkpoint by rows; compares names and shapes with the model's.

Files are memory-mapped: reading rows touches those rows only, and mapped pages belong to the page
cache, not to the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fsdpq.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class CheckpointFiles:
    """The tensors of a local checkpoint directory.

    Args:
        directory: holds ``*.safetensors`` and, for several files, the index.

    Raises:
        CheckpointError: no safetensors, a listed file missing, a file truncated or unreadable.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._slices: dict[str, Any] = {}
        self._files: list[Any] = []
        for path in self._paths():
            self._open(path)

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX_NAME
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [self.directory / name for name in names]
        elif (self.directory / SINGLE_NAME).exists():
            paths = [self.directory / SINGLE_NAME]
        else:
            paths = sorted(self.directory.glob("*.safetensors"))
        missing = [path.name for path in paths if not path.exists()]
        if missing or not paths:
            raise CheckpointError(
                f"{self.directory} lacks {', '.join(missing) or 'any *.safetensors file'}",
                hint="download the model again, or convert it with "
                "`model.save_pretrained(DIR)` of transformers",
            )
        return paths

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or not whole ({path.stat().st_size} bytes): {error}",
                hint="delete it and download the model again",
            ) from error
        self._files.append(file)
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            self._slices[name] = file.get_slice(name)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._slices[name].get_shape())

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` of one tensor, in the file's dtype, on the host."""
        if not self.shape(name):
            return self._slices[name][...]
        return self._slices[name][start:stop]


def check_tensors(
    directory: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored: set[str],
) -> None:
    """Compares the names and shapes of a checkpoint with what the model needs.

    Args:
        directory: the checkpoint, for the message.
        found: shape of every tensor in it.
        expected: shape of every tensor that the model needs.
        ignored: names that may be there and are not needed (tied copies).

    Raises:
        CheckpointError: all missing, unexpected and mis-shaped tensors at once.
    """
    wrong = [f"missing `{name}`" for name in sorted(expected.keys() - found.keys())]
    wrong += [
        f"unexpected `{name}`"
        for name in sorted(found.keys() - expected.keys() - ignored)
        if not name.endswith(".rotary_emb.inv_freq")
    ]
    wrong += [
        f"`{name}` has shape {list(found[name])}, the model needs {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if wrong:
        shown = "\n  ".join(wrong[:20] + ([f"and {len(wrong) - 20} more"] * (len(wrong) > 20)))
        raise CheckpointError(
            f"the tensors of {directory} do not fit its config.json:\n  {shown}",
            hint="the download is incomplete, or weights and config.json are of two models: "
            "download the model again",
        )


def to_device(rows: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns ``rows`` on ``device``; floating-point values are cast to ``dtype``."""
    return rows.to(device=device, dtype=dtype if rows.is_floating_point() else rows.dtype)
