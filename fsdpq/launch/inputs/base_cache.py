"""The quantized base of a run: made once, kept in the cache, loaded by every later run.

Quantizing reads the whole unquantized checkpoint; the base is a quarter of it, and any rank's rows
are one range of bytes in it. Whatever keeps the cache from holding a base (a full disk, a limit, no
right to write) costs a notice: each rank then quantizes its rows while it loads, as it would
without a cache.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fsdpq.errors import CheckpointError, DamagedBaseError, ExitCode, FetchError, FsdpqError
from fsdpq.fetch.cache import cache_root, cached_directory, format_bytes
from fsdpq.fetch.cache_entries import BASES, make_room
from fsdpq.fetch.drafts import remove_whole
from fsdpq.fetch.holds import hold
from fsdpq.launch.quantize import QuantizeJob, run_quantizer
from fsdpq.launch.screen import Screen
from fsdpq.plan.base_file import base_bytes, keeps_base
from fsdpq.plan.shapes import shape_from_directory
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.stored_quantization import read_stored_quantization
from fsdpq.run_files.rows import RankError
from fsdpq.tensor_files.base_manifest import (
    WEIGHTS_NAME,
    Key,
    is_base,
    key_differences,
    key_digest,
    read_manifest,
)


def find_base(job: QuantizeJob, *, screen: Screen) -> dict[str, Any] | None:
    """Returns the quantized base that the ranks load, None where they quantize while loading.

    A model that is a quantized base itself is taken as it is. Else the base is in the cache, or it
    is made now, where that pays: see `is_wanted`.

    Returns:
        ``inputs.base`` of the lock: ``directory``, ``key``, and ``digest``, a hash of its content.

    Raises:
        FetchError: the model is a quantized base of another sort than the recipe asks for; or the
            base is needed (``fsdp.offload: disk``) and cannot be had.
        FsdpqError: the ranks that quantize failed.
    """
    directory = Path(job.model["directory"])
    if is_base(directory):
        return use_given_base(directory, job)
    is_needed = job.recipe.fsdp.offload == "disk"
    num_bytes = planned_bytes(job.recipe, directory)
    if not is_needed and not is_wanted(job.recipe, directory, num_bytes):
        return None
    try:
        return _base_in_cache(job, num_bytes, screen=screen)
    except FsdpqError as error:
        if is_needed or error.exit_code != ExitCode.ENVIRONMENT:
            raise
        screen.report(f"note: no quantized base is kept: {error.message}")
        return None


def is_wanted(recipe: Recipe, directory: Path, num_bytes: int) -> bool:
    """Whether a base is worth keeping: it is quantized here, large, and the recipe lets it.

    Args:
        recipe: resolved.
        directory: of the model.
        num_bytes: what the base will have.
    """
    is_stored = read_stored_quantization(directory) is not None
    return keeps_base(recipe, num_bytes, is_stored=is_stored)


def planned_bytes(recipe: Recipe, directory: Path) -> int:
    """Returns the bytes that the base of a model will have.

    0 where that cannot be told, or where it cannot be quantized so: the ranks say what is wrong.

    Args:
        recipe: resolved.
        directory: of the model.
    """
    try:
        return base_bytes(recipe, shape_from_directory(directory))
    except CheckpointError:
        return 0


def use_given_base(directory: Path, job: QuantizeJob) -> dict[str, Any]:
    """Returns the base that the recipe names as its model.

    Raises:
        FetchError: it is not what the recipe's ``quantization`` and ``model.dtype`` say.
    """
    found = read_manifest(directory).key
    # Where it was made, and with which versions, does not matter: its bits are what they are.
    same = {name: found[name] for name in ("model", "device", "versions")}
    differences = key_differences(found, job.key | same)
    if differences:
        raise FetchError(
            f"`model.name_or_path: {job.recipe.model.name_or_path}` is a quantized base of "
            f"another sort: {'; '.join(differences)}",
            hint="change `quantization` and `model.dtype` to what it holds, or name the "
            "unquantized model",
        )
    return _describe_base(directory, found)


@contextmanager
def held_inputs(inputs: Mapping[str, Any]) -> Generator[None, None, None]:
    """Keeps the model, the base and the data of a run in the cache until the block ends."""
    names = ("model", "base", "prepared")
    entries: list[dict[str, Any]] = [inputs[name] for name in names if name in inputs]
    with ExitStack() as stack:
        for entry in entries:
            if _is_cached(entry):
                stack.enter_context(hold(Path(entry["directory"])))
        yield


def remove_damaged_base(
    inputs: Mapping[str, Any], error: FsdpqError, records: Sequence[RankError]
) -> None:
    """Takes a base that a rank found damaged out of the cache; says in ``error`` what to do.

    Args:
        inputs: of the run that failed, on this machine.
        error: what the user will be told; its hint changes.
        records: the errors of this machine's ranks.
    """
    base = inputs.get("base")
    damages = [r for r in records if r.kind == DamagedBaseError.__name__]
    if base is None:
        return
    is_damaged = isinstance(error, DamagedBaseError) and base["directory"] in error.message
    if not is_damaged and not any(base["directory"] in record.message for record in damages):
        return
    if not _is_cached(base):
        error.hint = f"delete `{base['directory']}` and make it again with `fsdpq quantize`"
        return
    with contextlib.suppress(OSError):  # else the rank's own hint says what to delete
        remove_whole(Path(base["directory"]))
        error.hint = "start again: the damaged base was taken out of the cache, and is made anew"


def _is_cached(entry: Mapping[str, Any]) -> bool:
    return Path(entry["directory"]).is_relative_to(cache_root())


def _base_in_cache(job: QuantizeJob, num_bytes: int, *, screen: Screen) -> dict[str, Any]:
    name = _slug(job.recipe.model.name_or_path)
    key = job.key
    final = cache_root() / BASES / f"{name}-{key_digest(key)}"

    def build(draft: Path) -> None:
        run_quantizer(job, draft, screen=screen)

    if not final.is_dir():
        reason = _why_missing(name, key)
        screen.report(f"quantizing {name} once, {format_bytes(num_bytes)}: {reason}")
        make_room(num_bytes, target=final, report=screen.report)
    entry = cached_directory(
        f"{BASES}/{final.name}",
        build,
        needed_bytes=num_bytes,
        converter=describe_quantizer(job.recipe),
        self_checked=(WEIGHTS_NAME,),
        report=screen.report,
    )
    screen.report(f"the quantized base is in {entry.directory}")
    return _describe_base(entry.directory, key)


def _describe_base(directory: Path, key: Key) -> dict[str, Any]:
    digest = read_manifest(directory).checksums_sha256
    return {"directory": str(directory), "key": key, "digest": digest}


def describe_quantizer(recipe: Recipe) -> str:
    """Returns in words how a resolved recipe stores its base: ``bnb nf4 block_size=64, bf16``."""
    options = recipe.quantization.model_dump(exclude={"kind", "cache", "modules_to_not_convert"})
    words = " ".join(f"{name}={value}" for name, value in options.items())
    return f"{recipe.quantization.kind} {words}".strip() + f", {recipe.model.dtype}"


def _why_missing(name: str, key: Key) -> str:
    """Why no base of the cache will do: it has none of the model, or the newest is another."""
    own = re.compile(re.escape(name) + r"-[0-9a-f]{16}")
    found = [path for path in (cache_root() / BASES).glob("*") if own.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            differences = key_differences(read_manifest(path).key, key)
        except FsdpqError:
            continue
        return f"the one in the cache was {'; '.join(differences)}"
    return "the cache has none of it"


def _slug(name_or_path: str) -> str:
    last = name_or_path.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip(".-").lower() or "model"
