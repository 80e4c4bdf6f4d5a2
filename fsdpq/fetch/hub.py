"""Downloads models and datasets from the Hugging Face hub: the one caller of ``huggingface_hub``.

Files go to the hub's own cache (``HF_HOME``), shared with transformers and resumable. Only
safetensors, JSON, tokenizer and template files of a model, and files of rows of a dataset, are
asked for: no pickles, no Python. A dry run first pins the commit, sees what is missing, and
compares sizes with the free disk space.
https://huggingface.co/docs/huggingface_hub/guides/download
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import FetchError
from fsdpq.fetch.cache import Report, disk_full, format_bytes
from fsdpq.fetch.local import ALLOW_PATTERNS, CODE_PATTERNS
from fsdpq.tensor_files.directory import PICKLE_HINT

REPOSITORY_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``org/name``."""

DATA_ENDINGS = (".parquet", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".arrow")
COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")

_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RepositorySort:
    """What is asked for, and must be there, in a sort of repository.

    Attributes:
        repo_type: as ``huggingface_hub`` calls it.
        allow_patterns: files that are asked for.
        needed_endings: one file at least ends so.
        lack: what is said where none does.
        lack_hint: and what to do then.
        page: prefix of its page on the hub.
        local_hint: how a recipe names one that is on this machine.
    """

    repo_type: str
    allow_patterns: tuple[str, ...]
    needed_endings: tuple[str, ...]
    lack: str
    lack_hint: str
    page: str
    local_hint: str


MODEL = RepositorySort(
    repo_type="model",
    allow_patterns=ALLOW_PATTERNS,
    needed_endings=(".safetensors",),
    lack="has no safetensors weights",
    lack_hint=PICKLE_HINT,
    page="https://huggingface.co/",
    local_hint="a local directory is given as `./DIR` or by its absolute path",
)
_DATA_FILES = tuple(ending + packed for ending in DATA_ENDINGS for packed in COMPRESSIONS)
DATASET = RepositorySort(
    repo_type="dataset",
    allow_patterns=("README.md", *(f"*{ending}" for ending in _DATA_FILES)),
    needed_endings=_DATA_FILES,
    lack="has no files of rows (parquet, JSON, CSV or text), and dataset scripts are not run",
    lack_hint="try `data.revision: refs/convert/parquet`, where the hub keeps most datasets as "
    "parquet",
    page="https://huggingface.co/datasets/",
    local_hint="a local file is given as `data.path`",
)


def download_snapshot(
    name: str,
    *,
    revision: str | None,
    report: Report,
    sort: RepositorySort = MODEL,
    with_code: bool = False,
) -> Path:
    """Returns the directory of ``name`` at ``revision``; its last part is the commit.

    Args:
        name: repository, ``org/name``.
        revision: commit, branch or tag; None is the main branch.
        report: told what is downloaded.
        sort: a model or a dataset.
        with_code: bring a model's Python files too.

    Raises:
        FetchError: no network, no such repository or revision, a gated one, a full disk.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    library: Any = huggingface_hub
    patterns = [*sort.allow_patterns, *(CODE_PATTERNS if with_code else ())]
    arguments: dict[str, Any] = {"allow_patterns": patterns, "repo_type": sort.repo_type}
    try:
        plan = _dry_run(name, revision=revision, arguments=arguments)
        if plan:
            revision = plan[0].commit_hash
            _check_plan(name, plan, report, sort)
        return Path(library.snapshot_download(name, revision=revision, **arguments))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise explain_hub_failure(name, revision=revision, error=error, sort=sort) from error
    except Exception as error:
        # Connection errors come from the HTTP library below (httpx, httpx2), whose classes are
        # no OSError; which library it is changes with huggingface_hub's version.
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore")):
            raise explain_hub_failure(name, revision=revision, error=error, sort=sort) from error
        raise


def known_hash(path: Path) -> str | None:
    """Returns the sha256 that the hub's cache gives a large file by its blob's name, else None."""
    blob = path.resolve().name
    return blob if _CONTENT_HASH.fullmatch(blob) else None


def explain_hub_failure(
    name: str, *, revision: str | None, error: Exception, sort: RepositorySort = MODEL
) -> FetchError:
    """Returns the error for a failed download from the hub: one cause, one thing to do."""
    import errno

    from huggingface_hub import constants, errors

    at = f" at revision `{revision}`" if revision else ""
    page = f"{sort.page}{name}"
    if isinstance(error, FetchError):
        return error
    if isinstance(error, errors.GatedRepoError):
        found = FetchError(
            f"`{name}` is gated: its authors want you to accept terms first",
            hint=f"accept them at {page}, then log in with `hf auth login`",
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        found = FetchError(
            f"`{name}` has no revision `{revision}`", hint=f"see {page}/commits/main"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = FetchError(
            f"the hub has no {sort.repo_type} repository `{name}`, or it is private",
            hint=f"check {page}; for a private one log in with `hf auth login`; {sort.local_hint}",
        )
    elif isinstance(error, errors.HFValidationError):
        found = FetchError(f"`{name}` is no name of a repository", hint="it is `org/name`")
    elif getattr(error, "errno", None) == errno.ENOSPC:
        found = disk_full(Path(constants.HF_HUB_CACHE), 0)
        found.hint = "free some space, or set HF_HOME to a directory on a larger disk"
    else:
        found = FetchError(
            f"cannot download `{name}`{at}: the hub cannot be reached or answered with an error",
            hint="check the network (HF_HUB_OFFLINE must not be set) and run again: what is there "
            f"is kept; or copy the {sort.repo_type} here: {sort.local_hint}",
        )
    found.details = f"{type(error).__name__}: {error}"
    return found


def _dry_run(name: str, *, revision: str | None, arguments: dict[str, Any]) -> list[Any]:
    """Returns what would be downloaded; nothing where the hub cannot be asked.

    The real call then finds the model in the hub's cache, or says what is wrong.
    """
    import huggingface_hub
    from huggingface_hub.errors import DryRunError

    library: Any = huggingface_hub
    try:
        return list(library.snapshot_download(name, revision=revision, dry_run=True, **arguments))
    except DryRunError:
        return []


def _check_plan(name: str, plan: list[Any], report: Report, sort: RepositorySort) -> None:
    from huggingface_hub import constants

    if not any(str(file.filename).endswith(sort.needed_endings) for file in plan):
        raise FetchError(f"`{name}` {sort.lack}", hint=sort.lack_hint)
    needed = sum(file.file_size or 0 for file in plan if file.will_download)
    if needed == 0:
        return
    root = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FetchError(
            f"`{root}` has {format_bytes(free)} free, `{name}` needs {format_bytes(needed)}",
            hint="set HF_HOME to a directory on a disk with more room",
        )
    report(f"downloading {name} ({format_bytes(needed)}) from the Hugging Face hub")
