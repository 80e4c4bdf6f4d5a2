"""What happens between two steps: saving where it is due, saving and ending where it is wished."""

from __future__ import annotations

import dataclasses

from fsdpq.protocols import MetricSink
from fsdpq.training.loop import LoopState, Trainer
from fsdpq.worker.keeping.checkpoints import Checkpoints
from fsdpq.worker.keeping.watch import RankWatch


class Keeping:
    """Keeps a run from losing what it did.

    Attributes:
        has_ended: the run was saved, or could not be, and is to be left.

    Args:
        watch: signs of life and wishes.
        checkpoints: of the run.
        events: told of the wish, and of the end.
    """

    def __init__(self, watch: RankWatch, checkpoints: Checkpoints, events: MetricSink) -> None:
        self.has_ended = False
        self._watch = watch
        self._checkpoints = checkpoints
        self._events = events

    def attach(self, trainer: Trainer) -> Trainer:
        """Returns the same trainer, which asks after every step and shows that it is alive."""
        beat = self._watch.heartbeat.beat
        return dataclasses.replace(trainer, after_step=self.after_step, on_part=beat)

    def after_step(self, state: LoopState) -> bool:
        """Saves where that is due, in the background; saves and returns True to end the loop.

        Ranks: all (collective).
        """
        agreed = self._watch.stop.ask(due=self._checkpoints.minutes_passed())
        if agreed.stop:
            return self.end(state)
        if self._checkpoints.is_due(state, minutes_passed=agreed.due):
            self._watch.heartbeat.beat("save")
            self._checkpoints.start(state)
        return False

    def end(self, state: LoopState) -> bool:
        """Saves now where the ranks agreed to end; returns whether they did.

        Ranks: all (collective).
        """
        signal_name = self._watch.stop.agreed
        if not signal_name or self.has_ended:
            return self.has_ended
        self._events.write({"event": "stop", "signal": signal_name})
        self._watch.heartbeat.beat("save")
        directory = self._checkpoints.save(state)
        self._events.write(
            {
                "event": "stopped",
                "step": state.progress.steps,
                "directory": None if directory is None else str(directory),
            }
        )
        self.has_ended = True
        return True
