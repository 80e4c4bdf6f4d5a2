"""Prepares the data of a run: the worker that the launcher starts before the ranks."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fsdpq.data.preparing.prepare import Preparation, prepare_data
from fsdpq.errors import EnvironmentProblemError
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.source import DataSources
from fsdpq.worker.tokenizer import check_context, load_tokenizer

REPORT_S = 0.5


def prepare(
    job: Path, directory: Path, *, num_processes: int, trust_remote_code: bool = False
) -> None:
    """Writes the prepared data that ``job`` describes into ``directory``.

    Prints how far it is, as lines of JSON: ``done_rows``, ``total_rows``.

    Args:
        job: JSON with ``data`` (the recipe's section), ``seed``, ``sources``, ``tokenizer`` (its
            directory) and ``key``.
        directory: exists and is empty.
        num_processes: that tokenize.
        trust_remote_code: run Python code that the model brings.

    Raises:
        RecipeError: rows that cannot be used, with their places.
        EnvironmentProblemError: the disk is full.
        LaunchError: a process that tokenizes died.
    """
    task = json.loads(job.read_text(encoding="utf-8"))
    model_dir, options = Path(task["tokenizer"]), DataOptions.model_validate(task["data"])
    check_context(options.seq_len, model_dir, trust_remote_code=trust_remote_code)
    preparation = Preparation(
        sources=DataSources.from_json(task["sources"]),
        options=options,
        tokenizer=load_tokenizer(model_dir, trust_remote_code=trust_remote_code),
        seed=task["seed"],
        num_processes=num_processes,
        on_progress=progress_printer(),
    )
    try:
        prepare_data(preparation, directory, key=task["key"])
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(directory).free
        raise EnvironmentProblemError(
            f"the disk of `{directory.parent}` is full: {free / 1e6:.1f} MB free",
            hint="free some space, or set FSDPQ_CACHE to a directory on a disk with more room",
        ) from error


def progress_printer() -> Callable[[int, int], None]:
    """Returns what prints how far it is, not too often."""
    last = 0.0

    def show(done_rows: int, total_rows: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            row = {"done_rows": done_rows, "total_rows": total_rows}
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()

    return show
