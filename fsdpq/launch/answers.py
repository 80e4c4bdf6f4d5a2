"""A worker process that holds a model and answers, for ``fsdpq generate`` and ``fsdpq chat``.

Requests and events are JSON lines through pipes; `fsdpq.worker.answering.answers` has the tables.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fsdpq.errors import LaunchError, RunStoppedError
from fsdpq.launch.ranks.failure import count_oom_kills
from fsdpq.launch.ranks.processes import TRUST_FLAG, ProcessTree
from fsdpq.launch.ranks.single_worker import WorkerFiles, explain_end, worker_alone_environment
from fsdpq.launch.runs.checkpoint_choice import choose_checkpoint
from fsdpq.launch.runs.trained_run import choose_device, open_run
from fsdpq.run_files.paths import RunFiles

ANSWERER = ("-m", "fsdpq.worker", "answer")

MEMORY_HINT = (
    "use less memory: `--dequantize never` keeps the base in 4 bits, and a shorter conversation or "
    "`--max-new-tokens` needs less beside it"
)
END_S = 5.0
"""Time that a worker gets to end once it has no more requests."""

Event = dict[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Loading:
    """What a worker loads.

    Attributes:
        verb: names its log in the run directory: ``generate`` or ``chat``.
        base: the model as it was before training.
        checkpoint: a step, ``newest`` or ``best``; None is what the run exported.
        compares: keep both, to switch between them.
        needs_turns: refuse a run that can only go on with a text.
        device: ``auto``, ``cuda`` or ``cpu``; ``auto`` is the GPU where the run had one and there
            still is one.
        dequantize: ``auto``, ``always`` or ``never``.
        trust_remote_code: run code that the model brings. A run that was trained with it needs it
            here again: run directories are passed on, and what one says is no permission.
    """

    verb: str = "generate"
    base: bool = False
    checkpoint: str | None = None
    compares: bool = False
    needs_turns: bool = False
    device: str = "auto"
    dequantize: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Choosing:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among so many of the likeliest tokens only, 0 among all.
        top_p: sample among the likeliest tokens that have this much of the probability together.
        repetition_penalty: above 1, tokens that were there already become less likely.
        seed: of the generator before the answer, None goes on with it.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Ready:
    """What a worker says of the model that it has loaded.

    Attributes:
        model: ``model.name_or_path``.
        device: its name.
        asks: ``conversation``, ``single`` messages, or ``text`` to go on with.
        format: of the rows that it was trained on.
        dtype: what it computes in.
        context: tokens that it was made for, None where its config does not say.
        kept: share of the quantized weights that is dequantized for good.
        compares: whether it can answer without what was trained, too.
        notices: what the user should know.
    """

    model: str
    device: str
    asks: str
    format: str
    dtype: str
    context: int | None
    kept: float
    compares: bool
    notices: list[str] = field(default_factory=list[str])


class AnswerSession:
    """A worker that answers until the session is closed; a context manager.

    Args:
        run_dir: of a finished run.
        loading: what the worker loads.
        on_notice: told what the user should know before it is loaded.
        worker: arguments of Python that start it.

    Raises:
        UsageError: there is nothing to load.
        CheckpointError: no checkpoint that was asked for is whole.
    """

    def __init__(
        self,
        run_dir: Path,
        loading: Loading,
        *,
        on_notice: Callable[[str], None],
        worker: Sequence[str] = ANSWERER,
    ) -> None:
        files = open_run(run_dir, needs_export=not loading.base and loading.checkpoint is None)
        checkpoint: list[str] = []
        if loading.checkpoint is not None:
            chosen, saved = choose_checkpoint(files, loading.checkpoint, on_notice=on_notice)
            on_notice(f"answers come from the checkpoint of step {saved.step}")
            checkpoint = [f"--checkpoint={chosen}"]
        device = choose_device(files, loading.device)
        self._files = _worker_files(files, loading.verb)
        self._oom_kills = count_oom_kills()
        arguments = [
            *worker, str(files.root), f"--error={self._files.error}", f"--device={device}",
            f"--dequantize={loading.dequantize}", *checkpoint,
            *(["--base"] if loading.base else []),
            *(["--compare"] if loading.compares else []),
            *(["--turns"] if loading.needs_turns else []),
            *([TRUST_FLAG] if loading.trust_remote_code else []),
        ]  # fmt: skip
        self._tree = ProcessTree(
            [sys.executable, *arguments],
            environment=worker_alone_environment(), stdout=None, stderr=self._files.log,
        )  # fmt: skip
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True, name="answers")
        self._reader.start()
        self._number = 0

    def __enter__(self) -> AnswerSession:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def wait_ready(self, on_load: Callable[[int, int], None]) -> Ready:
        """Returns what was loaded, once it is; tells done and total bytes meanwhile.

        Raises:
            FsdpqError: whatever the worker reports.
        """
        while True:
            event = self._next()
            if event["event"] == "load":
                on_load(event["done"], event["total"])
            elif event["event"] == "ready":
                known = Ready.__dataclass_fields__
                return Ready(**{name: value for name, value in event.items() if name in known})

    def ask(self, messages: Sequence[Message], choosing: Choosing, *, trained: bool = True) -> None:
        """Asks for an answer to a conversation; `next_event` has it.

        Args:
            messages: ``role`` and ``content``, the user's last.
            choosing: how the answer is chosen.
            trained: False answers with the base; the session must compare.
        """
        self._number += 1
        self._send({
            "request": "ask", "id": self._number, "trained": trained, **asdict(choosing),
            "messages": [{name: _utf8(value) for name, value in m.items()} for m in messages],
        })  # fmt: skip

    def next_event(self) -> Event:
        """Returns the next ``text`` of the answer, or ``done`` or ``refused``, which is the last.

        Raises:
            FsdpqError: the worker died; says why.
        """
        while True:
            event = self._next()
            if event.get("id") == self._number:
                return event

    def stop(self) -> None:
        """Ends the answer that is being given, after its next token."""
        self._send({"request": "stop", "id": self._number})

    def close(self) -> None:
        """Ends the worker."""
        with suppress(OSError):
            if self._tree.input is not None:
                self._tree.input.close()
        self._tree.kill()
        self._reader.join()
        if self._tree.output is not None:
            self._tree.output.close()
        self._files.error.unlink(missing_ok=True)

    def _send(self, request: Event) -> None:
        if self._tree.input is None:
            raise RuntimeError("the worker has no pipe")
        try:
            self._tree.input.write(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            self._tree.input.flush()
        except OSError:  # it is gone: what it said last is still to be read, then why
            return

    def _read(self) -> None:
        for line in self._tree.output or ():
            if line.endswith(b"\n"):  # a worker that is killed may leave half of one
                self._events.put(json.loads(line))
        self._events.put(None)

    def _next(self) -> Event:
        event = self._events.get()
        if event is not None:
            return event
        self._events.put(None)
        code = self._tree.wait_end(END_S)
        if code is None or code == 0:
            raise LaunchError("the worker ended too early", hint=f"its log is `{self._files.log}`")
        raise explain_end(code, self._files, self._oom_kills, memory_hint=MEMORY_HINT)


def _worker_files(files: RunFiles, verb: str) -> WorkerFiles:
    """Returns where the worker writes: into the run directory, or elsewhere if that is read-only.

    Two sessions of one run share a log and no error.
    """
    with suppress(OSError):
        files.logs.mkdir(exist_ok=True)
    is_writable = os.access(files.logs, os.W_OK)
    folder = files.logs if is_writable else Path(tempfile.mkdtemp(prefix="fsdpq-"))
    log, error = folder / f"{verb}.log", folder / f"{verb}-{os.getpid()}.error.json"
    log.unlink(missing_ok=True)
    error.unlink(missing_ok=True)
    return WorkerFiles(log, log, error)


def _utf8(value: Any) -> Any:
    """Returns a text without bytes that a terminal or file had and UTF-8 has not."""
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value


@contextmanager
def stop_signals_raised() -> Generator[None, None, None]:
    """Makes SIGTERM and SIGHUP raise `RunStoppedError` until the block ends; SIGINT raises anyway.

    So a worker is ended and a terminal restored by whoever holds them.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise RunStoppedError(f"stopped by {signal.Signals(number).name}")

    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
