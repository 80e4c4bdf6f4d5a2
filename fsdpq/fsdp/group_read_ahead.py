"""Asks the system for the pages of the groups that run next, under ``fsdp.offload: disk``.

A group's frozen shards are pages of a file, and FSDP reads them when it gathers the group: where
the file does not fit into memory, computing and reading would take turns. Every decoder layer,
embedding and head announces here that it runs, forward or backward, and one thread tells the system
which ranges of the file come next, a few groups ahead. The pages go to the page cache and become no
memory of this process. Where there is no ``posix_fadvise`` (macOS, Windows) nothing is announced.

Nothing is dropped behind. A step runs over the layers forward and then backward, so of a file
larger than memory the pages used last are needed first again: the order in which the system drops
pages, least recently used first, is the best one there is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

GROUPS_AHEAD = 3
"""In backward FSDP2 gathers one group ahead by itself, so that two are left to be read."""

PIECE_BYTES = 8 << 20
"""A range is announced in pieces of this size, and given up between them when it is too late."""

PAGE_BYTES = 4096

Range = tuple[int, int]
"""First byte in the file, and the one after the last."""


class GroupReadAhead:
    """Announces groups before they run.

    A visit is a group's forward or backward; a cycle lists the groups of visits that follow each
    other, its first after its last.

    Args:
        descriptor: of the file.
        ranges: of every group.
        layers: the groups that are decoder layers, in order of their forward.
        first_trained: the layer where backward ends; None where it reads nothing.
        on_visit: called before every visit.
    """

    def __init__(
        self,
        descriptor: int,
        ranges: Sequence[Sequence[Range]],
        *,
        layers: Sequence[int],
        first_trained: int | None,
        on_visit: Callable[[], Any] = lambda: None,
    ) -> None:
        self._descriptor = descriptor
        self._ranges = ranges
        self._forward = list(range(len(ranges)))
        backward = [] if first_trained is None else list(layers[first_trained:][::-1])
        self._step = self._forward + backward
        self._backward_at = {g: len(self._forward) + at for at, g in enumerate(backward)}
        self._on_visit = on_visit
        self._visit = 0
        self._expected: dict[int, int] = {}
        self._thread = ThreadPoolExecutor(1, "group-read-ahead")

    def enter_forward(self, group: int) -> None:
        """Says that the forward of ``group`` begins; with gradients a backward follows it."""
        self._enter(self._step if torch.is_grad_enabled() else self._forward, group)

    def enter_backward(self, group: int) -> None:
        """Says that the backward of ``group`` begins."""
        at = self._backward_at.get(group)
        if at is not None:
            self._enter(self._step, at)

    def _enter(self, cycle: Sequence[int], at: int) -> None:
        self._on_visit()
        self._visit += 1
        self._expected[cycle[at]] = self._visit
        for ahead in range(1, GROUPS_AHEAD + 1):
            group, visit = cycle[(at + ahead) % len(cycle)], self._visit + ahead
            # Where its last visit is so near, its pages are there, or on the way.
            if visit - self._expected.get(group, -GROUPS_AHEAD) > GROUPS_AHEAD:
                self._expected[group] = visit
                self._thread.submit(self._announce, group, visit)

    def _announce(self, group: int, visit: int) -> None:
        for start, stop in self._ranges[group]:
            for at in range(start, stop, PIECE_BYTES):
                if self._visit >= visit:
                    return
                size = min(PIECE_BYTES, stop - at)
                # A file that cannot be read says so where it is read.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._descriptor, at, size, os.POSIX_FADV_WILLNEED)


def apply_read_ahead(
    groups: Sequence[Sequence[nn.Module]],
    *,
    layers: Sequence[nn.Module],
    descriptor: int,
    ranges: Mapping[int, Range],
    reshards: bool,
    on_visit: Callable[[], Any] = lambda: None,
) -> GroupReadAhead | None:
    """Makes groups announce those that run after them, in place; after loading.

    Args:
        groups: modules of every group, in order of their forward; its first module runs first.
        layers: the decoder layers, each a group of its own.
        descriptor: of the file; stays open as long as the modules run.
        ranges: of the rows of this rank in the file, by the ``id`` of a Parameter.
        reshards: whether a layer's backward gathers it again.
        on_visit: called before every forward and backward of a group.

    Returns:
        What takes the announcements, None where the system takes none.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    is_layer = {id(layer) for layer in layers}
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    trains_embedding = any(p.requires_grad for module in groups[0] for p in module.parameters())
    first_trained = 0 if trains_embedding else next((i for i, t in enumerate(trained) if t), None)
    if not reshards:
        first_trained = None
    ahead = GroupReadAhead(
        descriptor,
        [_ranges_of(group, ranges) for group in groups],
        layers=[i for i, group in enumerate(groups) if id(group[0]) in is_layer],
        first_trained=first_trained,
        on_visit=on_visit,
    )
    for index, group in enumerate(groups):
        # Before FSDP's own hook, which gathers: what comes next is read meanwhile.
        group[0].register_forward_pre_hook(partial(_before_forward, ahead, index), prepend=True)
        if id(group[0]) in is_layer:
            group[0].register_forward_hook(partial(_after_forward, ahead, index), prepend=True)
    return ahead


def _before_forward(ahead: GroupReadAhead, group: int, _module: nn.Module, _inputs: Any) -> None:
    ahead.enter_forward(group)


def _after_forward(
    ahead: GroupReadAhead, group: int, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    hidden = output[0] if isinstance(output, tuple) else output
    if isinstance(hidden, Tensor) and hidden.requires_grad:
        hidden.register_hook(lambda _gradient: ahead.enter_backward(group))


def _ranges_of(group: Sequence[nn.Module], ranges: Mapping[int, Range]) -> list[Range]:
    """Returns the ranges of a group's parameters in order, those that touch made one."""
    found = {ranges[id(p)] for m in group for p in m.parameters() if id(p) in ranges}
    merged: list[Range] = []
    for start, stop in sorted(found):
        if merged and start - merged[-1][1] < PAGE_BYTES:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
