"""Reads a checkpoint's tensors under the names and shapes that the model gives them.

transformers renames weights on loading, and merges those of experts: a Mixtral checkpoint holds
``block_sparse_moe.experts.0.w1.weight``, the model one ``mlp.experts.gate_up_proj`` of three
dimensions for all experts. Its own tables say how (``transformers.conversion_mapping``, read here
and nowhere else); what they merge is read here as rows of several tensors, so that a rank still
touches its own rows only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.checkpoint_files import ByteRange, CheckpointFiles, check_tensors

Shape = tuple[int, ...]


class ModelTensors:
    """A checkpoint as the model sees it.

    Args:
        files: the checkpoint.
        hf: the transformers model, whose tables and names count.
        expected: shape of every tensor that the model needs, by the model's names.
        ignored: names that may be there and are not needed (tied copies).

    Raises:
        CheckpointError: all damaged, missing, unexpected and mis-shaped tensors at once, or a
            family whose weights transformers converts in another way than by stacking rows.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        hf: PreTrainedModel,
        expected: Mapping[str, Shape],
        *,
        ignored: set[str],
    ) -> None:
        self._files = files
        self._shapes = dict(expected)
        known = dict.fromkeys([*expected, *ignored], True)
        self._sources, unexpected = map_names(hf, files.names | files.lost, known)
        obsolete = [re.compile(p) for p in hf._keys_to_ignore_on_load_unexpected or ()]
        lost = {
            name
            for name, groups in self._sources.items()
            if any(source in files.lost for group in groups for source in group)
        }
        found = {
            name: merged_shape([[files.shape(s) for s in group] for group in groups])
            for name, groups in self._sources.items()
            if name not in lost
        }
        found |= {
            name: files.shape(name)
            for name in unexpected - files.lost
            if not any(pattern.search(name) for pattern in obsolete)
        }
        check_tensors(files, found, expected, ignored=ignored, lost=lost)

    @property
    def num_read_bytes(self) -> int:
        """Bytes of the files that were read so far."""
        return self._files.num_read_bytes

    def sources(self, name: str) -> list[str]:
        """Returns the checkpoint's tensors that make up one of the model, in order."""
        return [source for group in self._sources[name] for source in group]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` of the first dimension, in the file's dtype."""
        groups = self._sources[name]
        if len(groups) == 1 and len(groups[0]) == 1:
            return self._files.read_rows(groups[0][0], start, stop)
        shape = self._shapes[name]
        per_entry = torch.Size(shape[1:-1]).numel()
        rows = self.read_matrix_rows(name, start * per_entry, stop * per_entry)
        return rows.reshape(stop - start, *shape[1:])

    def read_matrix_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows ``[start, stop)`` with all but the last dimension flattened to one.

        The rows of a vector are its elements.
        """
        parts = list(self._parts(name, start, stop)) or [(self.sources(name)[0], 0, 0)]
        pieces = [self._files.read_matrix_rows(*part) for part in parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def matrix_ranges(self, name: str, start: int, stop: int) -> list[ByteRange]:
        """Returns the bytes that `read_matrix_rows` reads, in that order."""
        return [self._files.matrix_range(*part) for part in self._parts(name, start, stop)]

    def _parts(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yields the sources that rows ``[start, stop)`` come from, and their own rows."""
        offset = 0
        for source in self.sources(name):
            num_rows = self._files.num_rows(source)
            first, last = max(start - offset, 0), min(stop - offset, num_rows)
            offset += num_rows
            if first < last:
                yield source, first, last


Groups = list[list[str]]
"""Checkpoint tensors that make up one tensor of the model, in order. One list: the tensors are
concatenated on dim 0 (or there is only one). Several: each list is concatenated on dim 0 and the
results are stacked in a new first dimension."""


def merged_shape(groups: list[list[Shape]]) -> Shape:
    """Returns the shape of tensors concatenated by group and stacked; ``()`` if they do not fit."""
    joined: set[Shape] = set()
    for shapes in groups:
        if len(shapes) == 1:
            joined.add(shapes[0])
        elif len({shape[1:] for shape in shapes}) == 1:
            joined.add((sum(shape[0] for shape in shapes), *shapes[0][1:]))
        else:
            return ()
    if len(joined) != 1:
        return ()
    return joined.pop() if len(groups) == 1 else (len(groups), *joined.pop())


def map_names(
    hf: PreTrainedModel, names: set[str], known: dict[str, bool]
) -> tuple[dict[str, Groups], set[str]]:
    """Returns what each of the model's tensors is made of, and the names that nothing needs.

    Args:
        hf: the transformers model, whose tables count.
        names: of the checkpoint's tensors.
        known: the model's names, as keys.

    Raises:
        CheckpointError: a family whose weights transformers converts in another way than by
            stacking rows.
    """
    mapping = get_model_conversion_mapping(hf)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    sources: dict[str, Groups] = {}
    merged: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unexpected: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        prefix: Any = hf.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known:  # as transformers: perhaps it should not have been renamed
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unexpected.add(name)
        elif pattern is None:
            sources[target] = [[name]]
        else:
            merged[target][pattern].append(name)
    for target, parts in merged.items():
        sources[target] = _merge(hf, target, parts, by_pattern[next(iter(parts))])
    return sources, unexpected


def _merge(
    hf: PreTrainedModel, target: str, parts: dict[str, list[str]], converter: WeightConverter
) -> Groups:
    """Returns the order in which ``converter`` puts its sources together."""
    steps = [
        (type(operation), getattr(operation, "dim", None)) for operation in converter.operations
    ]
    lists = [parts.get(pattern, []) for pattern in converter.source_patterns]
    if steps == [(Concatenate, 0)]:
        return [[name for names in lists for name in names]]
    if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        raise CheckpointError(
            f"transformers makes `{target}` of `{type(hf).__name__}` from "
            f"{', '.join(converter.source_patterns)} in a way that cannot be read by rows",
            hint="load it with transformers once and save it with "
            "`model.save_pretrained(DIR, save_original_format=False)`, or train another model",
        )
    if len({len(names) for names in lists}) != 1:
        counts = (
            f"{len(names)} of `{pattern}`"
            for names, pattern in zip(lists, converter.source_patterns, strict=True)
        )
        raise CheckpointError(
            f"`{target}` needs as many experts of each kind, the checkpoint holds "
            f"{', '.join(counts)}",
            hint="the download is incomplete: download the model again",
        )
    return [list(group) for group in zip(*lists, strict=True)]
