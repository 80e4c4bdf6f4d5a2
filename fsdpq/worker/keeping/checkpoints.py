"""When a run is saved, how its checkpoints come to disk beside training, and how it goes on.

A save copies the state to the host between two steps; a thread writes the copy while training goes
on, with collectives of a process group of its own. A save that is due while one is being written
waits for it. A save that fails ends nothing: the run says why, and the next one tries again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from fsdpq import dist
from fsdpq.checkpoint.sharded import save_pieces
from fsdpq.checkpoint.storage import CheckpointReader, CheckpointWriter, remove_tree
from fsdpq.errors import CheckpointError
from fsdpq.protocols import MetricSink, Piece
from fsdpq.recipe.root import Recipe
from fsdpq.tensor_files.checkpoint_manifest import (
    STATE_NAME,
    SavedCheckpoint,
    SavedFile,
    check_checkpoint,
    choose_kept,
    list_checkpoints,
    list_drafts,
    read_checkpoint,
    read_document,
    step_directory,
)
from fsdpq.training.loop import LoopState, read_window
from fsdpq.worker.keeping.essentials import Essentials
from fsdpq.worker.keeping.run_state import RunState, copy_to_host


@dataclass
class _Job:
    """One checkpoint on its way to disk.

    Attributes:
        writer: of the checkpoint.
        directory: where it will be.
        pieces: copies on the host.
        started: when the save began, of the monotonic clock.
        failure: what went wrong: a message for the user, or an error of the program.
        saved: its manifest, once it is whole; on rank 0.
    """

    writer: CheckpointWriter
    directory: Path
    pieces: dict[str, Piece]
    started: float
    failure: BaseException | None = None
    saved: SavedCheckpoint | None = None


class Checkpoints:
    """Saves a run when it is due or asked for, and puts it back.

    Ranks: all make one (collective).

    Args:
        recipe: resolved.
        folder: of the checkpoints.
        run: what is saved.
        base: what identifies the base (`fsdpq.tensor_files.checkpoint_manifest.base_identity`).
        events: takes rows of ``events.jsonl``.
        essentials: what goes beside the checkpoints, should the run directory have been removed.
        forced: go on although the rows, or their order, are others: from the first of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        run: RunState,
        *,
        base: Mapping[str, Any],
        events: MetricSink,
        forced: bool = False,
        essentials: Essentials | None = None,
    ) -> None:
        self._recipe = recipe
        self._forced = forced
        self._options = recipe.checkpoint
        self._folder = folder
        self._run = run
        self._base = dict(base)
        self._events = events
        self._essentials = essentials
        self._group = dist.new_host_group()
        self._thread: Thread | None = None
        self._job: _Job | None = None
        self._last_step = 0
        self._seconds_before = 0.0
        self._began = self._last_time = time.monotonic()
        self._saves = self._options.interval is not None
        if dist.rank() == 0:
            self._attempt("remove what was left of a save", self._remove_drafts)

    @property
    def train_s(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._began

    def begin(self) -> None:
        """Starts the clocks: training begins now."""
        self._began = self._last_time = time.monotonic()

    def restore(self) -> LoopState | None:
        """Puts the newest whole checkpoint in place; returns its state, None where there is none.

        Ranks: all (collective).

        Raises:
            CheckpointError: there are checkpoints and none of them is whole, or the newest whole
                one does not fit this run.
        """
        directory = self.newest_whole()
        if directory is None:
            return None
        saved = read_checkpoint(directory)
        facts = read_document(directory, STATE_NAME)
        kinds = saved.recipe["optimizer"]["kind"], self._recipe.optimizer.kind
        if kinds[0] != kinds[1]:
            self._notice(f"the checkpoint has states of {kinds[0]}: {kinds[1]} starts anew")
        other_rows = self._forced and not self._run.loader.fits(facts["loader"])
        if other_rows:
            self._notice("the rows or their order are others: training goes on at the first row")
        state = self._run.restore(
            CheckpointReader(directory, saved), facts, self._group,
            world_size=saved.world_size, with_optimizer=kinds[0] == kinds[1],
            other_rows=other_rows,
        )  # fmt: skip
        self._seconds_before = facts["train_s"]
        self._last_step = saved.step
        self._saves = True
        self._events.write(
            {
                "event": "resume",
                "step": saved.step,
                "directory": str(directory),
                "world_size": saved.world_size,
            }
        )
        return state

    def minutes_passed(self) -> bool:
        """Whether the minutes between two checkpoints are over; rank 0's clock decides for all."""
        minutes = self._options.interval_minutes
        if minutes is None or dist.rank() != 0:
            return False
        return (time.monotonic() - self._last_time) / 60 >= minutes

    def is_due(self, state: LoopState, *, minutes_passed: bool) -> bool:
        """Whether to save after this step.

        Args:
            state: after the step.
            minutes_passed: what `minutes_passed` says on rank 0.
        """
        steps, options = state.progress.steps, self._options
        if steps == self._last_step:
            return False
        is_last = steps == self._run.trainer.total_steps
        if (options.interval and steps % options.interval == 0) or (is_last and self._saves):
            return True
        if options.keep_best and _is_best(state):
            return True
        return minutes_passed and not is_last

    def save(self, state: LoopState) -> Path | None:
        """Saves now and waits for it; returns the checkpoint, None where it failed.

        Nothing is written where this step is on disk already.

        Ranks: all (collective).
        """
        self._wait()
        directory = step_directory(self._folder, state.progress.steps)
        if self._last_step == state.progress.steps:
            return directory
        self.start(state)
        self._wait()
        return directory if self._last_step == state.progress.steps else None

    def finish(self) -> None:
        """Waits for a save that is being written, and leaves a directory that can be resumed.

        Ranks: all (collective).
        """
        self._wait()
        self._put_files_back()

    def start(self, state: LoopState) -> None:
        """Copies the state and starts to write the copy, in the background.

        Ranks: all (collective).

        Raises:
            TrainingError: a loss that no log line has yet is not finite: such a state must not
                take the place of a good one.
        """
        if state.window.results:
            read_window(state.window, last_step=state.progress.steps)
        self._wait()
        started = self._last_time = time.monotonic()
        step = state.progress.steps
        directory = step_directory(self._folder, step)
        facts = self._run.facts(state) | {"train_s": self.train_s}
        text = json.dumps(facts).encode()  # now: the loop goes on with the lists in it
        writer = CheckpointWriter(directory, text, self._describe(state, facts))
        self._job = _Job(writer, directory, copy_to_host(self._run.pieces(state)), started)
        self._saves = True
        self._thread = Thread(target=self._write, args=(self._job,), name="fsdpq-checkpoint")
        self._thread.start()

    def _describe(
        self, state: LoopState, facts: Mapping[str, Any]
    ) -> Callable[[dict[str, SavedFile]], SavedCheckpoint]:
        step, tokens = state.progress.steps, state.progress.tokens
        eval_loss = state.eval_losses.get(step)

        def describe(files: dict[str, SavedFile]) -> SavedCheckpoint:
            return SavedCheckpoint(
                step=step,
                tokens=tokens,
                world_size=dist.world_size(),
                eval_loss=eval_loss,
                created=time.time(),
                recipe=self._recipe.model_dump(mode="json"),
                data_digest=facts["loader"]["digest"],
                base=self._base,
                files=files,
            )

        return describe

    def _write(self, job: _Job) -> None:
        """Runs in the thread."""
        try:
            self._put_files_back()
            save_pieces(job.writer, job.pieces, self._group)
            if dist.rank() == 0:
                job.saved = read_checkpoint(job.directory)
                self._report(job, job.saved)
                self._attempt("delete old checkpoints", self._prune)
        except BaseException as error:  # raised, or said, by the thread that waits
            job.failure = error
        finally:
            job.pieces.clear()

    def _wait(self) -> None:
        """Waits for the save that is being written, if any, and says where it failed."""
        job, self._job = self._job, None
        if self._thread is None or job is None:
            return
        self._thread.join()
        self._thread = None
        if isinstance(job.failure, CheckpointError):
            self._notice(
                f"the checkpoint {job.directory.name} could not be saved: {job.failure.message}; "
                f"{job.failure.hint}. Training goes on, the next one tries again"
            )
        elif job.failure is not None:
            raise job.failure
        else:
            self._last_step = int(job.directory.name.removeprefix("step-"))

    def _report(self, job: _Job, saved: SavedCheckpoint) -> None:
        self._events.write(
            {
                "event": "checkpoint",
                "step": saved.step,
                "directory": str(job.directory),
                "num_bytes": saved.num_bytes,
                "seconds": time.monotonic() - job.started,
                "eval_loss": saved.eval_loss,
            }
        )

    def newest_whole(self) -> Path | None:
        """Returns the newest checkpoint of which every byte is right, None where there is none.

        Those that are newer and damaged are named in notices.

        Ranks: all (collective); each reads its share of the files.

        Raises:
            CheckpointError: there are checkpoints and none of them is whole.
        """
        found = list_checkpoints(self._folder)
        names = dist.gather_texts(" ".join(path.name for path in found))[0].split()
        problems: list[str] = []
        for directory in (self._folder / name for name in names):
            problem = ""
            try:
                check_checkpoint(directory, share=(dist.rank(), dist.world_size()))
            except CheckpointError as error:
                problem = error.message
            problem = next((text for text in dist.gather_texts(problem) if text), "")
            if not problem:
                for text in problems:
                    self._notice(f"{text}; the run goes on from {directory.name}")
                return directory
            problems.append(problem)
        if problems:
            raise CheckpointError(
                "none of the checkpoints is whole: " + "; ".join(problems),
                hint=f"delete {self._folder} to start from the first step",
            )
        return None

    def _prune(self) -> None:
        """Deletes what is not to be kept; a damaged one too, where a newer one is whole."""
        manifests: dict[Path, SavedCheckpoint | None] = {}
        for directory in list_checkpoints(self._folder):
            try:
                manifests[directory] = read_checkpoint(directory)
            except CheckpointError:
                manifests[directory] = None
        kept = choose_kept(
            [saved for saved in manifests.values() if saved is not None],
            keep_last=self._options.keep_last,
            keep_best=self._options.keep_best,
        )
        for directory, saved in manifests.items():
            if saved is None or saved.step not in kept:
                remove_tree(directory)

    def _put_files_back(self) -> None:
        if self._essentials is not None:
            self._attempt("put the run's files back", self._essentials.put_back)

    def _remove_drafts(self) -> None:
        for draft in list_drafts(self._folder):
            remove_tree(draft)

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._notice(f"could not {what} in {self._folder}: {error.strerror or error}")

    def _notice(self, text: str) -> None:
        self._events.write({"event": "notice", "message": text})


def _is_best(state: LoopState) -> bool:
    """Whether the last step's held-out loss is the lowest that was computed while training."""
    losses = {step: loss for step, loss in state.eval_losses.items() if step}
    return state.progress.steps in losses and losses[state.progress.steps] == min(losses.values())
