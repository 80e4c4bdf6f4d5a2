"""Every allocation of what runs inside ``with``: by device and category, with the peak of a phase.

An allocation lives as long as the memory of its tensors does (a weak reference to the storage tells
when that ends), whatever views there are of it. FSDP2 frees gathered weights by resizing their
storage to nothing and fills it again by resizing it back, which no operator shows: one storage of
each gathered group is looked at after every operator.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsdpq.plan.result import Category
from fsdpq.worker.plan_trace.workspaces import WORKSPACES

STORED: tuple[Category, ...] = ("codes", "scales", "plain", "trained")
"""Categories of what lies in memory between uses."""

BLOCK_BYTES = 512
"""torch's allocator for GPUs hands out multiples of it."""


@dataclass(slots=True)
class _Piece:
    """A live allocation."""

    storage: weakref.ref[torch.UntypedStorage]
    num_bytes: int
    category: Category
    device: str


@dataclass(frozen=True)
class Peak:
    """The most of a phase on one device.

    Attributes:
        total: bytes.
        parts: category -> bytes.
        where: what ran.
    """

    total: int
    parts: dict[Category, int]
    where: str


class Tracker(TorchDispatchMode):
    """Counts allocations; see the module.

    Args:
        category: returns what an allocation is that is made now.
        node_made: told after each operator, for what its backward will allocate.
        where: returns what runs now, for people.
        round_on: device type whose allocations are rounded to `BLOCK_BYTES`.

    Attributes:
        phase: under whose name peaks are kept.
        peaks: by device type and phase.
        num_operators: that ran.
    """

    def __init__(
        self,
        *,
        category: Callable[[], Category],
        node_made: Callable[[], None],
        where: Callable[[], str],
        round_on: str = "",
    ) -> None:
        super().__init__()
        self._category, self._node_made, self._where = category, node_made, where
        self._round_on = round_on
        self._pieces: dict[int, _Piece] = {}
        self._gathered: list[list[int]] = []
        self._held: dict[str, defaultdict[Category, int]] = {}
        self._totals: dict[str, int] = defaultdict(int)
        self.phase = ""
        self.peaks: dict[tuple[str, str], Peak] = {}
        self.num_operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs ``func`` and counts what is new."""
        if func is torch.ops.prim.device.default:
            return func(*args)
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its shards come by themselves
        kwargs = kwargs or {}
        self.num_operators += 1
        category = self._category()
        self._look_at_gathered()
        result = func(*args, **kwargs)
        self._node_made()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, category)
        if (rule := _RULES.get(func)) is not None:
            rule(self, args, kwargs)
        if (workspace := WORKSPACES.get(func)) is not None:
            self._note_peak(args[0].device.type, category, workspace(args))
        return result

    def held(self, device: str) -> dict[Category, int]:
        """Returns what is held now on a device type."""
        return {c: n for c, n in self._held.get(device, {}).items() if n}

    def begin_phase(self, phase: str) -> None:
        """Counts peaks under another name from here, beginning with what is held."""
        self.phase = phase
        for device in self._held:
            self._note_peak(device, "plain", 0)

    def retag(self, tensor: Tensor | None, category: Category) -> None:
        """Changes what the memory of ``tensor`` counts as."""
        if tensor is None:
            return
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        piece = self._pieces.get(local.untyped_storage()._cdata) or self._see(local, category)
        if piece is not None and piece.category != category:
            held = self._held[piece.device]
            held[piece.category] -= piece.num_bytes
            held[category] += piece.num_bytes
            piece.category = category

    def watch_gathered(self, tensors: Iterable[Tensor]) -> None:
        """Looks from now on whether FSDP2 frees these, which it does together; now they are not."""
        found = [tensor.untyped_storage()._cdata for tensor in tensors]
        keys = [key for key in found if self._pieces[key].category not in STORED]
        for key, tensor in zip(found, tensors, strict=True):
            if key in keys:
                self.retag(tensor, "gathered")
        if keys:
            self._gathered.append(keys)

    def category_of(self, tensor: Tensor) -> Category | None:
        """Returns what the memory of ``tensor`` counts as, None where it was not seen."""
        piece = self._pieces.get(tensor.untyped_storage()._cdata)
        return None if piece is None else piece.category

    def _see(self, tensor: Tensor, category: Category) -> _Piece | None:
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        piece = self._pieces.get(key)
        num_bytes = self._rounded(storage.nbytes(), tensor.device.type)
        if piece is None:
            gone = functools.partial(self._forget, key)
            piece = _Piece(weakref.ref(storage, gone), 0, category, tensor.device.type)
            self._pieces[key] = piece
        if piece.num_bytes != num_bytes:
            self._resize(piece, num_bytes)
        return piece

    def _rounded(self, num_bytes: int, device: str) -> int:
        if device != self._round_on:
            return num_bytes
        return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES

    def _resize(self, piece: _Piece, num_bytes: int) -> None:
        held = self._held.setdefault(piece.device, defaultdict(int))
        added = num_bytes - piece.num_bytes
        held[piece.category] += added
        self._totals[piece.device] += added
        piece.num_bytes = num_bytes
        if added > 0:
            self._note_peak(piece.device, piece.category, 0)

    def _forget(self, key: int, _storage: Any) -> None:
        piece = self._pieces.pop(key, None)
        if piece is not None:
            self._resize(piece, 0)

    def _note_peak(self, device: str, category: Category, more: int) -> None:
        total = self._totals[device] + more
        peak = self.peaks.get((device, self.phase))
        if peak is None or total > peak.total:
            parts = self.held(device)
            if more:
                parts[category] = parts.get(category, 0) + more
            self.peaks[device, self.phase] = Peak(total, parts, self._where())

    def _look_at_gathered(self) -> None:
        """Takes notice of groups that FSDP2 has freed or given memory again."""
        for group in self._gathered:
            first = self._pieces[group[0]]
            storage = first.storage()
            if storage is None or bool(storage.nbytes()) == bool(first.num_bytes):
                continue
            for key in group:
                piece = self._pieces[key]
                storage = piece.storage()
                if storage is not None:
                    self._resize(piece, self._rounded(storage.nbytes(), piece.device))

    def _after_gather_copy_in(self, args: Any, kwargs: Any) -> None:
        """In backward the flat buffer is all there is of the group that is fetched ahead."""
        del kwargs
        self.retag(args[1], "gathered" if self.phase == "backward" else "communication")

    def _after_gather_copy_out(self, args: Any, kwargs: Any) -> None:
        del args
        for output in kwargs["out"]:
            self._see(output, "gathered")

    def _after_reduce_copy_in(self, args: Any, kwargs: Any) -> None:
        for gradient in args[0]:
            self.retag(gradient, "gradients")
        self.retag(kwargs["out"], "communication")

    def _after_reduce_scatter(self, args: Any, kwargs: Any) -> None:
        del kwargs
        self.retag(args[0], "gradients")

    def _after_as_strided(self, args: Any, kwargs: Any) -> None:
        """What FSDP2 has reduced becomes the gradients of the shards by views."""
        del kwargs
        if self.category_of(args[0]) == "communication":
            self.retag(args[0], "gradients")

    def _after_copy(self, args: Any, kwargs: Any) -> None:
        """Where one rank has all rows, FSDP2 gathers by copies."""
        del kwargs
        self._see(args[0], "gathered")
        self._inherit(args[0], args[1])

    def _inherit(self, target: Tensor, source: Tensor) -> None:
        category = self.category_of(source)
        if target.device != source.device and category in ("layer_inputs", "gradients"):
            self.retag(target, category)


_RULES: dict[Any, Callable[[Tracker, Any, Any], None]] = {
    torch.ops.fsdp.all_gather_copy_in.default: Tracker._after_gather_copy_in,
    torch.ops.fsdp.split_with_sizes_copy.default: Tracker._after_gather_copy_out,
    torch.ops.fsdp.chunk_cat.default: Tracker._after_reduce_copy_in,
    torch.ops.c10d._reduce_scatter_base_.default: Tracker._after_reduce_scatter,
    torch.ops.aten.as_strided.default: Tracker._after_as_strided,
    torch.ops.aten.copy_.default: Tracker._after_copy,
}
"""Operators of FSDP2, and copies, whose memory has a category of its own."""
