"""The flow of ``fsdpq generate``: one answer of a trained run, in one worker process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdpq.errors import LaunchError, RunStoppedError, UsageError
from fsdpq.launch.devices import list_gpus
from fsdpq.launch.failure import explain_rank_error, read_rank_error
from fsdpq.launch.processes import ProcessTree, catch_stop_signals, worker_environment
from fsdpq.recipe.load import load_resolved
from fsdpq.run_files import RunFiles

GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
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


def generate(run_dir: Path, question: Question, *, worker: Sequence[str] = GENERATOR) -> str:
    """Returns the answer of the run in ``run_dir``.

    Raises:
        UsageError: there is no finished run.
        FsdpqError: whatever the worker reports.
    """
    files = _open_run(run_dir)
    device = _device(files)
    files.logs.mkdir(exist_ok=True)
    answer, log = files.logs / "generate.out", files.logs / "generate.log"
    command = [
        sys.executable, *worker, str(files.root), f"--prompt={question.prompt}",
        f"--max-new-tokens={question.max_new_tokens}", f"--temperature={question.temperature}",
        f"--device={device}",
        *(["--base"] if question.base else []),
    ]  # fmt: skip
    log.unlink(missing_ok=True)
    files.generate_error.unlink(missing_ok=True)
    code = _run(command, device=device, answer=answer, log=log)
    if code == 0:
        text = answer.read_text(encoding="utf-8")
        answer.unlink()
        return text.removesuffix("\n")
    error = read_rank_error(files.generate_error)
    if error is not None:
        raise explain_rank_error(error, log=log)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    raise LaunchError(f"the worker ended with exit code {code}", f"its log is `{log}`", tail)


def _open_run(run_dir: Path) -> RunFiles:
    files = RunFiles(run_dir)
    if not files.resolved.is_file() or not files.lock.is_file():
        hint = "name a directory that `fsdpq train` made, such as `runs/quickstart-1a2b3c4d`"
        raise UsageError(f"`{run_dir}` is no run directory", hint=hint)
    if not (files.adapter.is_dir() or files.model.is_dir()):
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


def _run(command: list[str], *, device: str, answer: Path, log: Path) -> int:
    environment = worker_environment(device=device, num_ranks=1)
    for name in GROUP_VARIABLES:  # a job's own process group is none of ours
        environment.pop(name, None)
    with catch_stop_signals() as stop:
        tree = ProcessTree(command, environment=environment, stdout=answer, stderr=log)
        try:
            while (code := tree.poll()) is None and not stop.received:
                time.sleep(0.05)
            if code is None:
                tree.stop(stop)
                raise RunStoppedError(f"stopped by {stop.name}")
        finally:
            tree.kill()
    return code
