"""What a rank tells of itself and hears from outside, in one hand."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from fsdpq.dist import TIMEOUT, WATCHED_TIMEOUT, launched_rank
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.keeping.heartbeat import Heartbeat
from fsdpq.worker.keeping.post_mortem import PostMortem
from fsdpq.worker.keeping.stopping import StopWatch


@dataclass(frozen=True)
class RankWatch:
    """Signs of life of this rank, and wishes that the run may end.

    Attributes:
        heartbeat: for the launcher.
        stop: what the ranks agree on.
        post_mortem: explains it where this rank runs out of memory.
    """

    heartbeat: Heartbeat
    stop: StopWatch
    post_mortem: PostMortem

    @classmethod
    def open(cls, files: RunFiles) -> RankWatch:
        """Begins; the process group may come later."""
        heartbeat = Heartbeat(files.heartbeat(launched_rank()))
        return cls(heartbeat, StopWatch(files), PostMortem(files, heartbeat))

    def breaks_off(self) -> bool:
        """Whether an evaluation is to be left; a sign of life.

        Ranks: all (collective).
        """
        self.heartbeat.beat_again()
        return bool(self.stop.ask().stop)


def group_timeout(recipe: Recipe) -> datetime.timedelta:
    """Returns how long a collective waits: long, where the launcher sees that ranks hang."""
    return TIMEOUT if recipe.launch.hang_timeout_s is None else WATCHED_TIMEOUT
