"""Downloads a model from the Hugging Face hub: the one caller of ``huggingface_hub``.

Files go to the hub's own cache (``HF_HOME``), shared with transformers and resumable. Only
safetensors, JSON, tokenizer and template files are asked for: no pickles, no Python. A dry run
first pins the commit, sees what is missing, and compares sizes with the free disk space.
https://huggingface.co/docs/huggingface_hub/guides/download
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from fsdpq.errors import FetchError
from fsdpq.fetch.cache import Report, disk_full, format_bytes
from fsdpq.fetch.local import ALLOW_PATTERNS, CODE_PATTERNS, PICKLE_HINT

REPOSITORY_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``org/name``."""

_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


def download_snapshot(
    name: str, *, revision: str | None, report: Report, with_code: bool = False
) -> Path:
    """Returns the directory of ``name`` at ``revision``; its last part is the commit.

    Args:
        name: repository, ``org/name``.
        revision: commit, branch or tag; None is the main branch.
        report: told what is downloaded.
        with_code: bring its Python files too.

    Raises:
        FetchError: no network, no such repository or revision, a gated one, a full disk.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    library: Any = huggingface_hub
    patterns = [*ALLOW_PATTERNS, *(CODE_PATTERNS if with_code else ())]
    arguments: dict[str, Any] = {"allow_patterns": patterns}
    try:
        plan = _dry_run(name, revision=revision, arguments=arguments)
        if plan:
            revision = plan[0].commit_hash
            _check_plan(name, plan, report)
        return Path(library.snapshot_download(name, revision=revision, **arguments))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise explain_hub_failure(name, revision=revision, error=error) from error
    except Exception as error:
        # Connection errors come from the HTTP library below (httpx, httpx2), whose classes are
        # no OSError; which library it is changes with huggingface_hub's version.
        if type(error).__module__.split(".")[0].startswith(("httpx", "httpcore")):
            raise explain_hub_failure(name, revision=revision, error=error) from error
        raise


def known_hash(path: Path) -> str | None:
    """Returns the sha256 that the hub's cache gives a large file by its blob's name, else None."""
    blob = path.resolve().name
    return blob if _CONTENT_HASH.fullmatch(blob) else None


def explain_hub_failure(name: str, *, revision: str | None, error: Exception) -> FetchError:
    """Returns the error for a failed download from the hub: one cause, one thing to do."""
    import errno

    from huggingface_hub import constants, errors

    at = f" at revision `{revision}`" if revision else ""
    page = f"https://huggingface.co/{name}"
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
            f"the hub has no repository `{name}`, or it is private",
            hint=f"check {page}; for a private one log in with `hf auth login`; "
            "a local directory is given as `./DIR` or by its absolute path",
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
            "is kept; or copy the model here and give its directory",
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


def _check_plan(name: str, plan: list[Any], report: Report) -> None:
    from huggingface_hub import constants

    if not any(str(file.filename).endswith(".safetensors") for file in plan):
        raise FetchError(f"`{name}` has no safetensors weights", hint=PICKLE_HINT)
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
