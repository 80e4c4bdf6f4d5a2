"""A checkpoint that transformers wrote with 4-bit weights of bitsandbytes.

Such a matrix is several tensors: ``weight``, the codes, flat, two a byte; ``weight.absmax``, its
scales; ``weight.quant_map``, the values of the codes; two ``nested_`` ones with double
quantization; and ``weight.quant_state.bitsandbytes__nf4``, JSON as bytes. `BnbFiles` shows them as
one tensor with the shape of the matrix, so that names and shapes are compared as for any other
checkpoint, and reads ranges of their bytes. Source of the format: ``QuantState.as_dict`` in
bitsandbytes/functional.py, version 0.50.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.recipe.sections.quantization import BnbOptions
from fsdpq.tensor_files.header import join_problems

NESTED_BLOCK_SIZE = 256
"""Scales that share one second-level scale; the library knows no other."""

_PART = re.compile(
    r"(?P<matrix>.+)\.(?P<part>absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4))"
)


@dataclass(frozen=True)
class StoredMatrix:
    """What the ``quant_state`` of one matrix says.

    Attributes:
        shape: of the matrix, ``(out_features, in_features)``.
        quant_type: ``nf4`` or ``fp4``.
        block_size: weights that share one scale.
        double_quant: whether the scales are quantized too.
        nested_block_size: scales that share a second-level scale; with double quantization.
        nested_offset: the mean that was subtracted from the scales.
    """

    shape: tuple[int, ...]
    quant_type: str
    block_size: int
    double_quant: bool
    nested_block_size: int
    nested_offset: float

    def lengths(self) -> dict[str, int]:
        """Entries of each tensor beside the codes."""
        blocks = -(-math.prod(self.shape) // self.block_size)
        lengths = {"absmax": blocks, "quant_map": 16}
        if self.double_quant:
            nested = -(-blocks // NESTED_BLOCK_SIZE)
            lengths |= {"nested_absmax": nested, "nested_quant_map": 256}
        return lengths


class BnbFiles(CheckpointFiles):
    """The tensors of a local checkpoint directory, a quantized matrix as one tensor.

    Raises:
        CheckpointError: a file is damaged, or parts of quantized matrices are missing, unexpected
            or mis-shaped: all of them at once.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        raise_all(directory, self.damage)
        parts: dict[str, set[str]] = defaultdict(set)
        for name in super().names:
            if match := _PART.fullmatch(name):
                parts[match["matrix"]].add(match["part"])
        self._names = super().names - {f"{m}.{part}" for m in parts for part in parts[m]}
        self.matrices: dict[str, StoredMatrix] = {}
        wrong: list[str] = []
        for matrix in sorted(parts):
            wrong += self._open_matrix(matrix, parts[matrix])
        raise_all(directory, wrong)

    @property
    def names(self) -> set[str]:
        """Names of all tensors, without the parts of quantized matrices."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, of the matrix where it is quantized."""
        stored = self.matrices.get(name)
        return super().shape(name) if stored is None else stored.shape

    def read_bytes(self, name: str, part: str, start: int, stop: int) -> Tensor:
        """Returns bytes ``[start, stop)`` of a part of a quantized matrix, on the host.

        Args:
            name: of the matrix.
            part: ``codes``, ``absmax``, ``nested_absmax`` or ``nested_offset``, as
                `fsdpq.protocols.Quantizer.packed_shapes` of bitsandbytes has them. Scales that are
                stored in another floating-point type come as fp32.
            start: first byte.
            stop: after the last byte, more than ``start``.
        """
        if part == "nested_offset":
            offset = torch.tensor([self.matrices[name].nested_offset], dtype=torch.float32)
            return offset.view(torch.uint8)[start:stop]
        tensor = name if part == "codes" else f"{name}.{part}"
        as_scales = part != "codes" and self.dtype(tensor).is_floating_point
        size = 4 if as_scales else self.dtype(tensor).itemsize
        first = start // size
        entries = super().read_rows(tensor, first, -(-stop // size)).reshape(-1)
        # Never through a float copy: the codes may be stored as bf16 and be NaN there.
        found = (entries.float() if as_scales else entries).view(torch.uint8)
        return found[start - first * size : stop - first * size]

    def check_format(self, options: BnbOptions, tables: Mapping[str, Tensor]) -> None:
        """Checks that every matrix is packed as the recipe says, with the library's own values.

        Args:
            options: of the recipe.
            tables: ``quant_map`` and ``nested_quant_map`` as the library makes them, fp32.

        Raises:
            CheckpointError: names all that are not.
        """
        differing: list[str] = []
        wrong: list[str] = []
        for name, stored in self.matrices.items():
            for field in ("quant_type", "block_size", "double_quant"):
                found, told = getattr(stored, field), getattr(options, field)
                if found != told:
                    differing.append(f"`{name}` has {field} {found}, the recipe says {told}")
            if stored.double_quant and stored.nested_block_size != NESTED_BLOCK_SIZE:
                size = stored.nested_block_size
                wrong.append(f"`{name}` has {size} scales to a nested block, not 256")
            if stored.quant_type == options.quant_type:
                wrong += self._foreign_tables(name, stored, tables)
        raise_all(
            self.directory,
            differing,
            hint="set the fields of `quantization` to what the checkpoint holds",
        )
        raise_all(self.directory, wrong)

    def _foreign_tables(
        self, name: str, stored: StoredMatrix, tables: Mapping[str, Tensor]
    ) -> Iterable[str]:
        for part in tables.keys() & stored.lengths().keys():
            found = super().read_rows(f"{name}.{part}", 0, len(tables[part]))
            if not torch.equal(found.float(), tables[part]):
                yield f"`{name}.{part}` is not the table of bitsandbytes"

    def _open_matrix(self, name: str, parts: set[str]) -> list[str]:
        """Fills ``matrices[name]``; returns what is wrong with the matrix."""
        states = [part for part in parts if part.startswith("quant_state")]
        if len(states) != 1:
            return [f"`{name}` has {len(states)} tensors `quant_state.bitsandbytes__*`, needs one"]
        try:
            stored = self._read_state(f"{name}.{states[0]}")
        except (ValueError, KeyError, TypeError) as error:
            return [f"`{name}.{states[0]}` cannot be read: {error!r}"]
        self.matrices[name] = stored
        if name not in self._names:
            return [f"missing `{name}`"]
        lengths = stored.lengths()
        wrong = [f"missing `{name}.{part}`" for part in sorted(lengths.keys() - parts)]
        surplus = parts - lengths.keys() - set(states)
        wrong += [f"unexpected `{name}.{part}`" for part in sorted(surplus)]
        for part in sorted(lengths.keys() & parts):
            found = super().shape(f"{name}.{part}")
            if found != (lengths[part],):
                wrong.append(
                    f"`{name}.{part}` has shape {list(found)}, its matrix needs [{lengths[part]}]"
                )
        if not wrong and (self.dtype(f"{name}.absmax") == torch.uint8) != stored.double_quant:
            dtype = self.dtype(f"{name}.absmax")
            wrong.append(f"`{name}.absmax` is {dtype}, which contradicts its quant_state")
        codes = super().shape(name)
        num_bytes = -(-math.prod(stored.shape) // 2)
        size = self.dtype(name).itemsize
        if codes != (-(-num_bytes // size), 1):
            wrong.append(
                f"`{name}` has shape {list(codes)} of {size} bytes each, codes of a "
                f"{list(stored.shape)} matrix need {num_bytes} bytes"
            )
        return wrong

    def _read_state(self, name: str) -> StoredMatrix:
        packed = super().read_rows(name, 0, super().shape(name)[0])
        state: dict[str, Any] = json.loads(bytes(packed.tolist()))
        if int(state["blocksize"]) < 1:
            raise ValueError(f"blocksize {state['blocksize']}")
        double_quant = "nested_offset" in state
        return StoredMatrix(
            shape=tuple(int(size) for size in state["shape"]),
            quant_type=str(state["quant_type"]),
            block_size=int(state["blocksize"]),
            double_quant=double_quant,
            nested_block_size=int(state["nested_blocksize"]) if double_quant else 0,
            nested_offset=float(state["nested_offset"]) if double_quant else 0.0,
        )


def raise_all(
    directory: Path,
    wrong: list[str],
    *,
    hint: str = "download the model again, or save it again with transformers",
) -> None:
    """Raises a `CheckpointError` that lists ``wrong``, if there is anything in it."""
    if wrong:
        what = f"the 4-bit weights of {directory} cannot be used"
        raise CheckpointError(join_problems(what, wrong), hint=hint)
