"""Places where trials run at the same time: GPUs shared out, or cores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fsdpq.launch.machine.devices import count_cores
from fsdpq.recipe.root import Recipe

_UUID = re.compile(r"UUID: ([^)\s]+)")


@dataclass(frozen=True)
class Slot:
    """A place for one trial.

    Attributes:
        environment: variables of its processes, beside those of this one.
    """

    environment: tuple[tuple[str, str], ...] = ()


class Slots:
    """Shares out the GPUs and cores of this machine.

    One trial at a time has all of them, as ``fsdpq train`` would, and its environment is left as it
    is. Several at a time get GPUs of their own by ``CUDA_VISIBLE_DEVICES``; on a CPU the cores are
    shared by ``OMP_NUM_THREADS``, where the user has not set it.

    Args:
        parallel: trials that run at the same time at most.
        gpus: those of this machine, as `fsdpq.launch.machine.devices.list_gpus` names them.
        threads_are_set: whether the user chose ``OMP_NUM_THREADS``.
    """

    def __init__(self, parallel: int, *, gpus: Sequence[str], threads_are_set: bool) -> None:
        self._parallel = parallel
        self._names = [_name_of(gpu) for gpu in gpus]
        self._free = list(self._names)
        self._in_use: dict[str, list[str]] = {}
        self._threads_are_set = threads_are_set

    def take(self, trial_id: str, recipe: Recipe, *, smoke: bool = False) -> Slot | None:
        """Returns a place for a trial, None while there is none.

        Args:
            trial_id: of the trial, which gives it back by `give_back`.
            recipe: of the trial; `refuse` has nothing against it.
            smoke: whether it is only tried, which is done on the CPU.
        """
        if len(self._in_use) >= self._parallel:
            return None
        if self._parallel == 1:
            self._in_use[trial_id] = []
            return Slot()
        if not self._needs_gpus(recipe, smoke=smoke):
            self._in_use[trial_id] = []
            return Slot(environment=self._threads(recipe))
        return self._take_gpus(trial_id, recipe)

    def refuse(self, recipe: Recipe, *, smoke: bool = False) -> str:
        """Returns why a trial will never have a place, empty where it will.

        Args:
            recipe: of the trial.
            smoke: whether it is only tried.
        """
        ranks, there = recipe.launch.nproc_per_node, len(self._names)
        if self._parallel == 1 or not self._needs_gpus(recipe, smoke=smoke):
            return ""
        if ranks == "auto" or int(ranks) <= there:
            return ""
        return f"`launch.nproc_per_node` is {ranks}, and there are {there} GPUs"

    def give_back(self, trial_id: str) -> None:
        """Makes the place of a trial free."""
        self._free += self._in_use.pop(trial_id)

    def _take_gpus(self, trial_id: str, recipe: Recipe) -> Slot | None:
        wanted = recipe.launch.nproc_per_node
        number = max(1, len(self._names) // self._parallel) if wanted == "auto" else int(wanted)
        if number > len(self._free):
            return None
        taken, self._free = self._free[:number], self._free[number:]
        self._in_use[trial_id] = taken
        return Slot(environment=(("CUDA_VISIBLE_DEVICES", ",".join(taken)),))

    def _needs_gpus(self, recipe: Recipe, *, smoke: bool) -> bool:
        return bool(self._names) and not smoke and recipe.launch.device != "cpu"

    def _threads(self, recipe: Recipe) -> tuple[tuple[str, str], ...]:
        if self._threads_are_set:
            return ()
        ranks = recipe.launch.nproc_per_node
        number = 2 if ranks == "auto" else int(ranks)
        threads = max(1, count_cores() // (self._parallel * number))
        return (("OMP_NUM_THREADS", str(threads)),)


def _name_of(gpu: str) -> str:
    """Returns what ``CUDA_VISIBLE_DEVICES`` calls a GPU: its UUID; a part of one has that name."""
    found = _UUID.search(gpu)
    return found[1] if found else gpu
