"""The flow of ``fsdpq generate``: one answer of a trained run, in one worker process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import UsageError
from fsdpq.launch.machine.devices import list_gpus
from fsdpq.launch.ranks.processes import TRUST_FLAG
from fsdpq.launch.ranks.single_worker import WorkerFiles, run_single_worker
from fsdpq.recipe.load import load_resolved
from fsdpq.run_files import RunFiles

GENERATOR = ("-m", "fsdpq.worker", "generate")


@dataclass(frozen=True)
class Question:
    """What to ask a run.

    Attributes:
        prompt: the user's message.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        base: answer as the model did before training.
    """

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.0
    base: bool = False


def generate(
    run_dir: Path,
    question: Question,
    *,
    trust_remote_code: bool = False,
    worker: Sequence[str] = GENERATOR,
) -> str:
    """Returns the answer of the run in ``run_dir``.

    A run that was trained with ``trust_remote_code`` needs it here again: run directories are
    passed on, and what one says about code is no permission.

    Raises:
        UsageError: there is no finished run.
        FsdpqError: whatever the worker reports.
    """
    files = _open_run(run_dir)
    device = _device(files)
    files.logs.mkdir(exist_ok=True)
    arguments = [
        *worker, str(files.root), f"--prompt={question.prompt}",
        f"--max-new-tokens={question.max_new_tokens}", f"--temperature={question.temperature}",
        f"--device={device}",
        *(["--base"] if question.base else []),
        *([TRUST_FLAG] if trust_remote_code else []),
    ]  # fmt: skip
    logs = WorkerFiles(
        files.logs / "generate.out", files.logs / "generate.log", files.generate_error
    )
    return run_single_worker(arguments, logs)


def _open_run(run_dir: Path) -> RunFiles:
    files = RunFiles(run_dir)
    if not files.resolved.is_file() or not files.lock.is_file():
        hint = "name a directory that `fsdpq train` made, such as `runs/quickstart-1a2b3c4d`"
        raise UsageError(f"`{run_dir}` is no run directory", hint=hint)
    if not any(path.is_dir() for path in (files.adapter, files.model, files.delta)):
        message = f"the run `{run_dir}` has exported nothing: it did not finish"
        hint = "train it to the end with `fsdpq train`; `logs/` tells why it ended"
        raise UsageError(message, hint=hint)
    base = Path(json.loads(files.lock.read_text(encoding="utf-8"))["inputs"]["model"]["directory"])
    if not base.is_dir():
        message = f"the base model of the run `{run_dir}` is gone: there is no `{base}`"
        raise UsageError(message, hint="bring it back there; a new `fsdpq train` fetches it again")
    return files


def _device(files: RunFiles) -> str:
    """The GPU where the run had one and there still is one, else the CPU."""
    trained_on = load_resolved(files.resolved).launch.device
    return "cuda" if trained_on == "cuda" and list_gpus() else "cpu"
