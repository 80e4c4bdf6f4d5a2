"""Directories that appear whole or not at all, and the safetensors files in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fsdpq.errors import ExportError


@contextmanager
def whole_directory(directory: Path, *, what: str) -> Iterator[Path]:
    """Yields a directory to write into, which becomes ``directory`` at the end.

    Ranks: 0 only.

    Args:
        directory: replaced if it is there; untouched if an error ends the block.
        what: is written, for the message.

    Raises:
        ExportError: it cannot be written.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{what} cannot be written to {directory}: {error}",
            hint="make room on the disk or make the directory writable, then run again",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that others can read as far as the umask lets them."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    # safetensors writes files that only their owner can read.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
