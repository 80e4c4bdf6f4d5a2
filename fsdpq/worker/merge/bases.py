"""The base that a change is merged into, by rows: as it is stored, or as training saw it.

Training ran over weights that were quantized and dequantized again. Those are the quantized base of
the run where it is still there (in the cache, or the model itself), else each matrix is quantized
again as it was, bit for bit, when its rows are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.expansion import source_name
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.model.loading.checkpoint_names import ModelTensors
from fsdpq.model.loading.source import BaseSource
from fsdpq.model.loading.targets import LoadingTarget, full_shape, loading_targets
from fsdpq.model.quantized_linear import PackedMatrix


class BaseRows(Protocol):
    """The weights of a base, by their names in transformers."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows of one weight, on the host.

        All dimensions but the last are flattened to one; the rows of a vector are its elements.
        """
        ...


class StoredRows:
    """A checkpoint's own weights.

    Args:
        model: whose base it is; on meta.
        files: the checkpoint.
        tensors: the same by the model's names.
    """

    def __init__(self, model: CausalLM, files: CheckpointFiles, tensors: ModelTensors) -> None:
        self._model = model
        self.files = files
        self.tensors = tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows of one weight as they are stored; see `BaseRows`."""
        return self.tensors.read_matrix_rows(source_name(self._model, name), start, stop)

    def sources(self, name: str) -> list[str]:
        """Returns the checkpoint's tensors that make up one weight, in order of their rows."""
        return self.tensors.sources(source_name(self._model, name))


class TrainedRows:
    """The weights as training computed with them.

    Memory: the packed bytes of the last matrix that was read.

    Args:
        model: on meta, made as for training.
        source: of its packed matrices.
        stored: of all other weights, None where those are in ``source`` too.
        device: matrices are quantized and dequantized there.
    """

    def __init__(
        self,
        model: CausalLM,
        source: BaseSource,
        stored: StoredRows | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._targets = loading_targets(model)
        self._source = source
        self._stored = stored
        self._dtype = dtype
        self._device = device
        self._last: tuple[str, Mapping[str, Tensor]] = ("", {})

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows of one weight; see `BaseRows`."""
        target = self._targets[name]
        if isinstance(target, PackedMatrix):
            shape = (target.out_features, target.in_features)
            packed = self._filled(name, target)
            rows = target.quantizer.dequantize_rows(packed, shape, start, stop, self._dtype)
            return rows.cpu()
        if self._stored is None:
            whole = self._filled(name, target)[""].cpu()
            return whole.reshape(matrix_rows(whole.shape), *whole.shape[1:][-1:])[start:stop]
        rows = self._stored.read(name, start, stop)
        return rows.to(target.dtype) if rows.is_floating_point() else rows

    def _filled(self, name: str, target: LoadingTarget) -> Mapping[str, Tensor]:
        if self._last[0] != name:
            self._last = ("", {})  # its memory first
            self._last = (name, fill_whole(self._source, name, target, self._device))
        return self._last[1]


def fill_whole(
    source: BaseSource, name: str, target: LoadingTarget, device: torch.device
) -> dict[str, Tensor]:
    """Returns the packed tensors of a matrix by name, or a plain tensor under ``""``.

    Args:
        source: fills it.
        name: of the target.
        target: on meta; left as it was.
        device: of the result.
    """
    if not isinstance(target, PackedMatrix):
        plain = nn.Parameter(
            torch.empty(full_shape(target), dtype=target.dtype, device=device), requires_grad=False
        )
        source.fill(name, plain)
        return {"": plain.detach()}
    on_meta = {packed: target.get_parameter(packed) for packed in target.packed_names}
    try:
        for packed, parameter in on_meta.items():
            memory = torch.empty_like(parameter, device=device)
            target.register_parameter(packed, nn.Parameter(memory, requires_grad=False))
        source.fill(name, target)
        return {packed: target.get_parameter(packed).detach() for packed in on_meta}
    finally:
        for packed, parameter in on_meta.items():
            target.register_parameter(packed, parameter)


def matrix_rows(shape: tuple[int, ...]) -> int:
    """Returns the rows of a tensor as a matrix: elements of a vector, 1 for a scalar."""
    return torch.Size(shape[:1]).numel() * torch.Size(shape[1:-1]).numel()


def no_original(where: object) -> CheckpointError:
    """Returns the error for a base whose unquantized weights nobody has here."""
    return CheckpointError(
        f"the run was trained over {where}, which holds 4-bit weights only: there is no original "
        "to merge into",
        hint="leave `--onto original` out: the adapter is merged into the dequantized weights",
    )
