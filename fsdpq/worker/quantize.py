"""Writing the quantized base of a recipe, as one rank sees it."""

from __future__ import annotations

from pathlib import Path

from fsdpq.run_files import RunFiles


def quantize(files: RunFiles, out: Path, *, trust_remote_code: bool = False) -> None:
    """Writes the base of a run directory's recipe into ``out``, an empty directory.

    Ranks: all (collective).
    """
    raise NotImplementedError
