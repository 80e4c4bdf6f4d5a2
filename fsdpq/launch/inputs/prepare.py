"""Prepared data of a run: made once, kept in the cache, mapped by every later run.

One worker process reads, tokenizes and packs, in as many processes as there are cores, before any
rank starts: no rank waits for another's tokenizer under a collective's timeout, and no GPU waits at
all. The entry's name is a hash of everything that decides about a token (`prepare_key`), so nothing
stale is ever used, and two runs at once make it once.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import DamagedDataError, FetchError, FsdpqError, UsageError
from fsdpq.fetch.cache import cache_root, cached_directory
from fsdpq.fetch.cache_entries import PREPARED, make_room
from fsdpq.fetch.data import fetch_data
from fsdpq.fetch.drafts import remove_whole
from fsdpq.fetch.hashes import hash_local_files, hash_of_hashes
from fsdpq.fetch.holds import claim
from fsdpq.fetch.tokenizer import fetch_tokenizer, hash_tokenizer
from fsdpq.launch.inputs.prepare_key import (
    Key,
    key_differences,
    key_digest,
    prepare_key,
    shares_files,
)
from fsdpq.launch.machine.devices import count_cores
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.single_worker import RowProgress, WorkerFiles, run_single_worker
from fsdpq.launch.screen import Screen
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.rows.prepared_files import (
    ITEM_BYTES,
    MANIFEST_NAME,
    PreparedManifest,
    is_prepared,
    read_manifest,
)
from fsdpq.rows.report import DataReport
from fsdpq.rows.source import DataSources

PREPARER = ("-m", "fsdpq.worker", "prepare")
CONVERTER = "fsdpq prepare"
MEMORY_HINT = "use fewer processes: `fsdpq prepare RECIPE --processes 1`; training then uses it"


@dataclass(frozen=True)
class PrepareJob:
    """What is prepared.

    Attributes:
        recipe: the recipe, shrunk for a smoke run.
        sources: the rows.
        tokenizer_dir: the model, or its tokenizer alone.
        trust_remote_code: let the worker run Python code that the model brings.
        num_processes: that tokenize; None is one a core.
        worker: arguments of Python that name the worker; none are the real one.
    """

    recipe: Recipe
    sources: DataSources
    tokenizer_dir: Path
    trust_remote_code: bool = False
    num_processes: int | None = None
    worker: Sequence[str] = ()

    @property
    def key(self) -> Key:
        """All that the prepared data depends on."""
        tokenizer = hash_tokenizer(self.tokenizer_dir, with_code=self.trust_remote_code)
        return prepare_key(self.recipe, self.sources, tokenizer)


@dataclass(frozen=True)
class FoundData:
    """Prepared data in the cache.

    Attributes:
        directory: where it lies.
        manifest: what it is.
    """

    directory: Path
    manifest: PreparedManifest

    def as_json(self) -> dict[str, Any]:
        """Returns ``inputs.prepared`` of the lock."""
        return {
            "directory": str(self.directory),
            "digest": self.manifest.digest,
            "key": dict(self.manifest.key),
            "report": self.manifest.report.as_json(),
        }


def prepare(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    screen: Screen,
    num_processes: int | None = None,
    trust_remote_code: bool = False,
) -> FoundData:
    """Prepares the data of a recipe without training; the model's weights are not fetched.

    Args:
        recipe_path: the recipe's file.
        overrides: from the command line.
        screen: shows what happens.
        num_processes: that tokenize; None is one a core.
        trust_remote_code: let the worker run Python code that the model brings.

    Raises:
        UsageError: the recipe's data is not prepared ahead.
        FsdpqError: one message for whatever went wrong, with its exit code.
    """
    loaded = load_recipe(recipe_path, overrides)
    for notice in loaded.notices:
        screen.report(f"note: {notice}")
    recipe = loaded.recipe
    if not is_prepared_ahead(recipe):
        why = "its rows are made up" if recipe.data.format == "dummy" else "it is streamed"
        hint = "`fsdpq train` needs no preparation of it"
        raise UsageError(f"there is nothing to prepare for this recipe's data: {why}", hint=hint)
    sources = fetch_data(
        recipe.data, base_dir=loaded.base_dir, report=screen.report, marks=loaded.marks
    )
    tokenizer_dir = fetch_tokenizer(
        recipe.model.name_or_path,
        revision=recipe.model.revision,
        base_dir=loaded.base_dir,
        report=screen.report,
        with_code=trust_remote_code,
    )
    job = PrepareJob(recipe, sources, tokenizer_dir, trust_remote_code, num_processes)
    return find_prepared(job, screen=screen)


def is_prepared_ahead(recipe: Recipe) -> bool:
    """Whether the recipe's rows are tokenized before the ranks start."""
    return recipe.data.format != "dummy" and not recipe.data.streaming


def prepare_inputs(
    recipe: Recipe,
    inputs: dict[str, Any],
    *,
    screen: Screen,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Returns ``prepared`` of a run's inputs, nothing for a run whose rows are not prepared ahead.

    Args:
        recipe: resolved.
        inputs: ``model`` and ``data``.
        screen: shows what happens.
        trust_remote_code: let the worker run Python code that the model brings.

    Raises:
        FsdpqError: see `find_prepared`.
    """
    if not is_prepared_ahead(recipe):
        return {}
    job = PrepareJob(
        recipe,
        DataSources.from_json(inputs["data"]),
        Path(inputs["model"]["directory"]),
        trust_remote_code,
    )
    return {"prepared": find_prepared(job, screen=screen).as_json()}


def find_prepared(job: PrepareJob, *, screen: Screen) -> FoundData:
    """Returns the prepared data of a recipe, made now where the cache has none.

    Raises:
        RecipeError: rows that cannot be used, with their places.
        EnvironmentProblemError: the cache cannot be written, or the disk is full.
        FsdpqError: whatever the worker reports.
    """
    key = job.key
    final = _place(job.sources, key)
    found = _open_entry(job, key, final, screen=screen)
    damage = _find_damage(found)
    if damage:
        screen.report(f"`{final}` is damaged ({damage}), making it again")
        _remove(final, damage)
        found = _open_entry(job, key, final, screen=screen)
    return found


def describe(report: DataReport) -> str:
    """Returns what prepared data holds, in one line."""
    text = f"{report.num_train_rows:,} rows of {report.num_tokens:,} tokens"
    if report.fill is not None:
        text += f" in {report.num_sequences:,} sequences, {report.fill:.1%} filled"
    return text + (f"; {report.num_held_out:,} rows held out" if report.num_held_out else "")


def _open_entry(job: PrepareJob, key: Key, final: Path, *, screen: Screen) -> FoundData:
    """Returns the entry of the cache, made where it is not there or cut short."""
    started, is_new = time.monotonic(), not is_prepared(final)

    def build(draft: Path) -> None:
        screen.report(f"preparing the data: {_why_missing(key)}")
        _run_preparer(job, key, draft, screen=screen)

    num_bytes = sum(
        file.path.stat().st_size for source in job.sources.every for file in source.files
    )
    if is_new:
        _make_room(num_bytes, final, screen=screen)
    cached_directory(
        f"{PREPARED}/{final.name}",
        build,
        needed_bytes=num_bytes,
        converter=CONVERTER,
        self_checked=(*ITEM_BYTES, MANIFEST_NAME),
        report=screen.report,
    )
    found = FoundData(final, read_manifest(final))
    took = f" in {time.monotonic() - started:.1f} s" if is_new else ""
    verb = "prepared" if is_new else "the data is prepared already:"
    screen.report(f"{verb} {describe(found.manifest.report)}{took}")
    return found


def _run_preparer(job: PrepareJob, key: Key, draft: Path, *, screen: Screen) -> None:
    """Lets the worker write prepared data into ``draft``."""
    num_processes = job.num_processes or count_cores()
    work = Path(tempfile.mkdtemp(prefix="fsdpq-prepare-"))
    files = WorkerFiles(work / "out", work / "log", work / "error.json")
    task = {
        "data": job.recipe.data.model_dump(mode="json"),
        "seed": job.recipe.training.seed,
        "sources": job.sources.as_json(),
        "tokenizer": str(job.tokenizer_dir),
        "key": key,
    }
    (work / "job.json").write_text(json.dumps(task), encoding="utf-8")
    arguments = [
        *(job.worker or PREPARER), str(work / "job.json"), str(draft),
        f"--error={files.error}", f"--processes={num_processes}",
        *([TRUST_FLAG] if job.trust_remote_code else []),
    ]  # fmt: skip
    progress = RowProgress(screen.report, "tokenized")
    try:
        run_single_worker(arguments, files, on_line=progress.take, memory_hint=MEMORY_HINT)
    except FsdpqError as error:
        if not error.details:  # an explained one; else its log and traceback are of use
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _find_damage(found: FoundData) -> str:
    """Returns how the content of an entry differs from what was written, empty if it does not.

    A file is read again only when it was written since it was last read.
    """
    files = found.manifest.files
    paths = {name: found.directory / name for name in files}
    memo = cache_root() / "hashes" / f"{PREPARED}-{found.directory.name}.json"
    sha256 = hash_local_files(paths, memo=memo, report=lambda _: None)
    wanted = hash_of_hashes({name: file.sha256 for name, file in files.items()})
    return "" if sha256 == wanted else "its content is not what was written"


def _remove(final: Path, damage: str) -> None:
    with claim(final) as free:
        if not free:
            hint = "end the run that uses it, and start again: it is made anew"
            raise DamagedDataError(f"the prepared data {final} is damaged: {damage}", hint=hint)
        remove_whole(final)


def _make_room(num_bytes: int, final: Path, *, screen: Screen) -> None:
    """Removes what was used longest ago where the cache is full.

    Prepared data is needed, as a model is: it is written where the disk has room, whatever the
    limit says about what is kept.
    """
    try:
        make_room(num_bytes, target=final, report=screen.report, what="prepared data")
    except FetchError as error:
        screen.report(f"note: {error.message}; it is written all the same")


def _why_missing(key: Key) -> str:
    """Says why no entry of the cache will do: how the nearest one of these files differs."""
    nearest: list[str] | None = None
    for path in sorted((cache_root() / PREPARED).glob("[!.]*")):
        try:
            found = dict(read_manifest(path).key)
            differences = key_differences(found, key) if shares_files(found, key) else []
        except (FsdpqError, KeyError, TypeError, AttributeError):
            continue  # damaged, or of another version: it says nothing
        if differences and (nearest is None or len(differences) < len(nearest)):
            nearest = differences
    return "; ".join(nearest) if nearest else "the cache has none of these rows"


def _place(sources: DataSources, key: Key) -> Path:
    """Returns where the entry is, or goes: rows keep theirs when their files are moved."""
    folder, digest = cache_root() / PREPARED, key_digest(key)
    there = sorted(folder.glob(f"[!.]*-{digest}"))
    return there[0] if there else folder / f"{_slug(sources)}-{digest}"


def _slug(sources: DataSources) -> str:
    first = sources.train[0]
    path = first.files[0].path if first.files else Path("rows")
    name = path.parent.name if path.is_relative_to(cache_root()) else path.name.partition(".")[0]
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-").lower() or "rows"
    more = len(sources.train) - 1
    return f"{name[:60]}-and-{more}-more" if more else name[:60]
