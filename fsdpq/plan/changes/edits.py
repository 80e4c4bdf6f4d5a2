"""The smallest changes of a recipe that make it fit, the fastest first.

One change where one does, two where two are faster or needed, and otherwise as few as can be left
of a ladder of all of them. What keeps the result comes before what changes it. Every candidate is
planned anew, so a change counts for what it does to all of the memory, the host's too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from fsdpq.errors import CheckpointError
from fsdpq.plan.case import Case, Memory
from fsdpq.plan.changes.moves import Move, list_moves
from fsdpq.plan.changes.settings import (
    Settings,
    apply_settings,
    as_overrides,
    has_effect,
    merge_settings,
    problems_of,
)
from fsdpq.plan.result import Edit
from fsdpq.recipe.root import Recipe

MAX_KEEPING, MAX_CHANGING = 4, 2


@dataclass(frozen=True)
class Found:
    """Moves that make a recipe fit.

    Attributes:
        moves: together.
        settings: of all of them.
        recipe: with them.
        memory: with them.
        slowdown: time a token as a multiple of before, None where it is not known.
    """

    moves: tuple[Move, ...]
    settings: Settings
    recipe: Recipe
    memory: Memory
    slowdown: float | None

    @property
    def changes_result(self) -> bool:
        """Whether one of them does."""
        return any(move.changes_result for move in self.moves)

    @property
    def cost(self) -> float:
        """The slowdown, or what it is about where it is not known."""
        product = 1.0
        for move in self.moves:
            product *= move.cost
        return self.slowdown if self.slowdown is not None else product


def find_edits(recipe: Recipe, case: Case, *, accumulation: int | None = None) -> tuple[Edit, ...]:
    """Returns changes that make a resolved recipe fit; none where it fits, or where none does.

    Args:
        recipe: resolved.
        case: model and machine.
        accumulation: ``training.gradient_accumulation_steps`` of the recipe as it was written.
    """
    search = Search(recipe, case)
    if not search.needed and search.fitting(()) is not None:
        return ()
    found = search.search(list_moves(search.start))
    return tuple(
        Edit(
            settings=as_overrides(
                merge_settings((search.needed, each.settings)), accumulation, each.recipe
            ),
            peak_bytes=each.memory.peak_bytes,
            host_bytes=each.memory.host_bytes,
            slowdown=each.slowdown,
            changes_result=each.changes_result,
        )
        for each in found
    )


@dataclass
class Search:
    """The search for one recipe.

    Attributes:
        recipe: resolved.
        case: model and machine.
        needed: settings without which nothing fits: as many ranks as there are GPUs.
        start: the recipe with them.
    """

    recipe: Recipe
    case: Case
    needed: Settings = ()
    start: Recipe = field(init=False)
    _tried: dict[Settings, Found | None] = field(default_factory=dict[Settings, "Found | None"])

    def __post_init__(self) -> None:
        """Takes the ranks that the machine has."""
        gpus = self.case.machine.gpus
        if gpus and self.recipe.launch.device == "cuda":
            ranks = len(gpus)
            if int(self.recipe.launch.nproc_per_node) > ranks:
                self.needed = (("launch.nproc_per_node", ranks),)
                if ranks == 1 and self.recipe.fsdp.strategy != "full_shard":
                    self.needed += (("fsdp.strategy", "full_shard"), ("fsdp.shard_size", None))
        self.start = apply_settings(self.recipe, self.needed)
        self._known = problems_of(self.recipe, self.case.base_dir)
        self._speed = self._tokens_per_s(self.recipe, self.case.memory(self.recipe))

    def search(self, dimensions: Sequence[Sequence[Move]]) -> list[Found]:
        """Returns what fits, in the order in which it is shown."""
        if (alone := self.fitting(())) is not None:
            return [alone]
        keeping = [[m for m in moves if not m.changes_result] for moves in dimensions]
        changing = [[m for m in moves if m.changes_result] for moves in dimensions]
        keeping, changing = ([d for d in part if d] for part in (keeping, changing))
        found = self._one_or_two(keeping) or self._ladders(keeping)
        others = self._singles(changing)
        if not found and not others:
            others = self._ladders([*keeping, *changing])
        return [*_best(found, MAX_KEEPING), *_best(others, MAX_CHANGING)]

    def fitting(self, moves: tuple[Move, ...]) -> Found | None:
        """Returns the moves with what comes of them, None where they do not fit or are refused."""
        settings = merge_settings(move.settings for move in moves)
        if settings not in self._tried:
            self._tried[settings] = self._try(moves, settings)
        return self._tried[settings]

    def _try(self, moves: tuple[Move, ...], settings: Settings) -> Found | None:
        if settings and not has_effect(self.start, settings):
            return None
        changed = apply_settings(self.start, settings)
        if problems_of(changed, self.case.base_dir) - self._known:
            return None
        try:
            memory = self.case.memory(changed)
        except CheckpointError:
            return None  # blocks of a quantization do not fit a matrix
        if self.case.shortages(changed, memory):
            return None
        speed = self._tokens_per_s(changed, memory)
        slowdown = self._speed / speed if self._speed and speed else None
        return Found(moves, settings, changed, memory, slowdown)

    def _tokens_per_s(self, recipe: Recipe, memory: Memory) -> float | None:
        return self.case.time(recipe, memory).tokens_per_s

    def _singles(self, dimensions: Iterable[Sequence[Move]]) -> list[Found]:
        """The mildest move of each dimension that fits alone."""
        firsts = (self._first((move,) for move in moves) for moves in dimensions)
        return [found for found in firsts if found is not None]

    def _one_or_two(self, dimensions: Sequence[Sequence[Move]]) -> list[Found]:
        """Single moves, and pairs that are faster than any of them."""
        singles = self._singles(dimensions)
        fastest = min((found.cost for found in singles), default=float("inf"))
        pairs = (self._pair(first, second) for first, second in combinations(dimensions, 2))
        return singles + [pair for pair in pairs if pair is not None and pair.cost < fastest]

    def _pair(self, first: Sequence[Move], second: Sequence[Move]) -> Found | None:
        """The fastest pair of two dimensions of which neither move does alone."""
        alone = [self.fitting((move,)) is not None for move in second]
        others = [move for move, fits in zip(second, alone, strict=True) if not fits]
        found = (
            self._first((move, other) for other in others)
            for move in first
            if self.fitting((move,)) is None
        )
        known = (pair for pair in found if pair is not None)
        return min(known, key=lambda pair: pair.cost, default=None)

    def _ladders(self, dimensions: Sequence[Sequence[Move]]) -> list[Found]:
        """All moves one after the other until it fits, then as few and mild ones as will do."""
        found = (self._climb(order) for order in (dimensions, dimensions[::-1]))
        return [self._eased(each, dimensions) for each in found if each is not None]

    def _climb(self, dimensions: Sequence[Sequence[Move]]) -> Found | None:
        taken: tuple[Move, ...] = ()
        for moves in dimensions:
            before = taken
            for move in moves:
                taken = (*before, move) if self._allowed((*before, move)) else taken
                if (found := self.fitting(taken)) is not None:
                    return found
        return None

    def _allowed(self, moves: tuple[Move, ...]) -> bool:
        settings = merge_settings(move.settings for move in moves)
        changed = apply_settings(self.start, settings)
        return not problems_of(changed, self.case.base_dir) - self._known

    def _eased(self, found: Found, dimensions: Sequence[Sequence[Move]]) -> Found:
        """Leaves out every move without which it fits too, then takes milder ones."""
        for move in sorted(found.moves, key=lambda each: (-each.changes_result, -each.cost)):
            rest = tuple(each for each in found.moves if each is not move)
            found = self.fitting(rest) or found
        for move in found.moves:
            rest = tuple(each for each in found.moves if each is not move)
            moves = next(moves for moves in dimensions if move in moves)
            found = self._first((*rest, milder) for milder in moves) or found
        return found

    def _first(self, candidates: Iterable[tuple[Move, ...]]) -> Found | None:
        found = (self.fitting(moves) for moves in candidates)
        return next((each for each in found if each is not None), None)


def _best(found: Iterable[Found], number: int) -> Iterator[Found]:
    """Yields the fastest, each set of settings once."""
    unique = {frozenset(each.settings): each for each in found}
    yield from sorted(unique.values(), key=lambda each: each.cost)[:number]
