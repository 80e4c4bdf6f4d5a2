"""The flow of ``fsdpq merge``: a finished run's model with the change in its weights."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import FsdpqError, UsageError
from fsdpq.fetch.cache import format_bytes
from fsdpq.launch.inputs.base_cache import held_inputs
from fsdpq.launch.quantize import check_out
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.single_worker import PROGRESS_S, WorkerFiles, run_single_worker
from fsdpq.launch.runs.trained_run import choose_device, open_run
from fsdpq.launch.screen import Screen
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import MERGE_RECEIPT, RunFiles

MERGER = ("-m", "fsdpq.worker", "merge")

MEMORY_HINT = "compare on fewer tokens (`--compare-tokens 256`), or not at all (0)"

COMPARE_TOKENS = 1024
"""Tokens that the models are compared on."""


@dataclass(frozen=True)
class MergeChoices:
    """What to write.

    Attributes:
        onto: ``dequantized`` weights of the base, those trained over, or ``original`` ones.
        requantize: ``nf4`` or ``hqq``, None writes the merged weights themselves.
        dtype: ``bf16``, ``fp16`` or ``fp32``; None is that of the base.
        compare_tokens: tokens that the models are compared on; 0 compares none.
        trust_remote_code: let the worker run Python code that the model brings.
    """

    onto: str = "dequantized"
    requantize: str | None = None
    dtype: str | None = None
    compare_tokens: int = COMPARE_TOKENS
    trust_remote_code: bool = False


def merge(
    run_dir: Path,
    out: Path,
    choices: MergeChoices,
    *,
    screen: Screen,
    worker: Sequence[str] = MERGER,
) -> dict[str, Any]:
    """Writes the merged model of a finished run to ``out`` and returns its receipt.

    It is there whole or not at all.

    Args:
        run_dir: of the run.
        out: a directory that does not exist, or is empty.
        choices: what to write.
        screen: shows how far it is.
        worker: arguments of Python that name the worker.

    Raises:
        UsageError: there is no finished run, it left nothing to merge, or ``out`` holds something.
        FsdpqError: whatever the worker reports.
    """
    files = _open_run(run_dir)
    check_out(out, "merged")
    return _run_merger(files, out, choices, screen=screen, worker=worker)


def merge_trained(
    files: RunFiles, recipe: Recipe, *, screen: Screen, trust_remote_code: bool
) -> None:
    """Does what ``export.merge`` of a run that has just ended says.

    Raises:
        FsdpqError: the merge failed; what was trained is whole.
    """
    export = recipe.export
    choices = MergeChoices(
        onto=export.merge_onto,
        requantize=export.merge_requantize,
        dtype=export.merge_dtype,
        trust_remote_code=trust_remote_code,
    )
    screen.report("merging what was trained into the base")
    try:
        receipt = _run_merger(files, files.merged, choices, screen=screen, worker=MERGER)
    except FsdpqError as error:
        done = f"the training itself is done; to merge again: `fsdpq merge {files.root} --out DIR`"
        error.hint = f"{error.hint}; {done}" if error.hint else done
        raise
    for sentence in receipt["verdict"]:
        screen.report(sentence)
    screen.report(f"the merged model is in `{files.merged}`")


def _run_merger(
    files: RunFiles, out: Path, choices: MergeChoices, *, screen: Screen, worker: Sequence[str]
) -> dict[str, Any]:
    logs = _log_files(files)
    arguments = [
        *worker, str(files.root), f"--error={logs.error}", f"--out={out.absolute()}",
        f"--onto={choices.onto}",
        f"--device={choose_device(files, 'auto')}", f"--compare-tokens={choices.compare_tokens}",
        *([f"--requantize={choices.requantize}"] if choices.requantize else []),
        *([f"--dtype={choices.dtype}"] if choices.dtype else []),
        *([TRUST_FLAG] if choices.trust_remote_code else []),
    ]  # fmt: skip
    progress = _Progress(screen.report)
    inputs = json.loads(files.lock.read_text(encoding="utf-8"))["inputs"]
    with held_inputs(inputs):
        run_single_worker(arguments, logs, on_line=progress.take, memory_hint=MEMORY_HINT)
    logs.log.unlink(missing_ok=True)
    return json.loads((out / MERGE_RECEIPT).read_text(encoding="utf-8"))


def _log_files(files: RunFiles) -> WorkerFiles:
    """Returns names of its own: several merges of one run may go on at once."""
    if os.access(files.root, os.W_OK):
        files.logs.mkdir(exist_ok=True)
    writable = os.access(files.logs, os.W_OK)
    folder = files.logs if writable else Path(tempfile.mkdtemp(prefix="fsdpq-merge-"))
    output, log, error = (folder / f"merge-{os.getpid()}.{e}" for e in ("out", "log", "error.json"))
    return WorkerFiles(output, log, error)


def _open_run(run_dir: Path) -> RunFiles:
    files = open_run(run_dir)
    export_format = load_resolved(files.resolved).export.format
    if export_format == "transformers":
        message = "there is nothing to merge: the run left a whole model"
        raise UsageError(message, hint=f"use `{files.exported(export_format)}` as it is")
    return files


class _Progress:
    """Says now and then how far the worker is.

    Args:
        report: told one short line.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._last, self._last_what = time.monotonic(), ""

    def take(self, line: str) -> None:
        """Takes a line of JSON: ``what``, and ``done`` and ``total`` bytes (0 without)."""
        row: dict[str, Any] = json.loads(line)
        what, now = str(row["what"]), time.monotonic()
        if not row["total"]:
            if what != self._last_what:
                self._last_what = what
                self._report(what)
        elif now - self._last >= PROGRESS_S and row["done"] < row["total"]:
            self._last = now
            done, total = (format_bytes(row[name]) for name in ("done", "total"))
            self._report(f"{what}: {done} of {total}")
