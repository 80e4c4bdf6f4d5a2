"""The shape of a model in a directory on this machine. Weights are not read, only headers."""

from __future__ import annotations

from pathlib import Path

from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.config_facts import read_config
from fsdpq.plan.shapes.from_files import SeenFiles, shape_from_files
from fsdpq.tensor_files.base_manifest import is_base
from fsdpq.tensor_files.directory import check_directory, holds_pickles_only, pickles_only


def shape_from_directory(directory: Path) -> ModelShape:
    """Returns the shape of the checkpoint in ``directory``; also of one that is not whole.

    Raises:
        CheckpointError: it cannot be told; says why.
    """
    return shape_from_files(str(directory), read_config(directory), _seen_files(directory))


def _seen_files(directory: Path) -> SeenFiles:
    if holds_pickles_only(directory):
        return SeenFiles({}, lack=pickles_only(directory), is_here=True)
    found, problems = check_directory(directory)
    return SeenFiles(
        {name: entry.shape for name, entry in found.entries.items()},
        sum(header.path.stat().st_size for header in found.headers),
        lack=problems[0] if problems else "",
        is_base=is_base(directory),
        is_here=True,
    )
