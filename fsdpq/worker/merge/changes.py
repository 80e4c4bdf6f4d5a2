"""What a run trained, as a change of the base's weights: applied to any rows of any of them.

It is read from what the run exported, which is what others load. All is local to rows: a low-rank
matrix adds ``s B A``, of which rows need the same rows of B and the whole, small A; DoRA scales
each row by its own magnitude; a module that was trained whole brings its rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fsdpq.checkpoint.peft import PREFIX
from fsdpq.errors import CheckpointError
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.tensor_files.header import join_problems

LOW_RANK = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
"""What PEFT calls the tensors of one adapted layer, after the layer's name."""


class Change(Protocol):
    """What was trained of a model."""

    names: Set[str]
    """The weights that it changes, by their names in transformers."""

    starts_at_zero: bool
    """Whether those were zero before training, whatever the base holds in their place."""

    def apply(self, name: str, base: Tensor, start: int) -> Tensor:
        """Returns the trained rows of one weight.

        Args:
            name: one of ``names``.
            base: rows of the base's weight, fp32; a vector's rows are its elements.
            start: which row of the weight the first of them is.
        """
        ...


class AdapterChange:
    """An adapter in PEFT's format; see `Change`.

    Args:
        directory: of the adapter.
        shapes: of the model's weights, by their names in transformers.
        tied: names of weights that are others' under a second name.

    Raises:
        CheckpointError: it is damaged, or does not fit the model; names all that does not.
    """

    starts_at_zero = False

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        tied: Set[str] = frozenset(),
    ) -> None:
        try:
            config: Any = json.loads((directory / "adapter_config.json").read_text("utf-8"))
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the adapter's configuration in {directory} cannot be read: {error!r}",
                hint="did the run finish? see its logs",
            ) from error
        self._scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        self._files = CheckpointFiles(directory)
        _raise_all(directory, self._files.damage)
        adapted, whole = _sort_names(self._files.names)
        self._check(directory, adapted, whole - tied, shapes)
        self._whole = whole
        self.names: Set[str] = {f"{layer}.weight" for layer in adapted} | whole
        self._has_magnitude = bool(config.get("use_dora"))
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def apply(self, name: str, base: Tensor, start: int) -> Tensor:
        """Returns the trained rows of one weight; see `Change`."""
        stop = start + base.shape[0]
        if name in self._whole:
            rows = self._files.read_matrix_rows(f"{PREFIX}{name}", start, stop)
            return rows.float().reshape(base.shape)
        layer = f"{PREFIX}{name.removesuffix('.weight')}"
        b = self._files.read_rows(f"{layer}.lora_B.weight", start, stop).float()
        trained = base + (b @ self._read_a(layer)) * self._scaling
        if self._has_magnitude:
            magnitude = self._files.read_rows(f"{layer}.lora_magnitude_vector", start, stop)
            norms = torch.linalg.vector_norm(trained, dim=1)
            trained.mul_((magnitude.float() / norms)[:, None])
        return trained

    def _read_a(self, layer: str) -> Tensor:
        """Returns a whole A in fp32; the last one is kept, as rows of a matrix come in pieces."""
        if self._last[0] != layer:
            name = f"{layer}.lora_A.weight"
            rows = self._files.read_rows(name, 0, self._files.shape(name)[0])
            self._last = (layer, rows.float())
        return self._last[1]

    def _check(
        self,
        directory: Path,
        adapted: Set[str],
        whole: Set[str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        wrong: list[str] = []
        for layer in sorted(adapted):
            names = [f"{PREFIX}{layer}.{part}" for part in LOW_RANK[:2]]
            found = [self._files.shape(n) for n in names if n in self._files.names]
            shape = shapes.get(f"{layer}.weight")
            product = (found[1][0], found[0][1]) if len(found) == 2 else None
            if shape is None or product != shape:
                wrong.append(
                    f"`{layer}` is {'not of the model' if shape is None else list(shape)}, its A "
                    f"and B have shapes {[list(each) for each in found]}"
                )
        for name in sorted(whole):
            found = self._files.shape(f"{PREFIX}{name}")
            if shapes.get(name) != found:
                wrong.append(f"`{name}` has shape {list(found)}, the model {shapes.get(name)}")
        _raise_all(directory, wrong)


def _sort_names(names: Set[str]) -> tuple[set[str], set[str]]:
    """Returns the layers with low-rank matrices, and the weights that were trained whole."""
    adapted: set[str] = set()
    whole: set[str] = set()
    for name in names:
        plain = name.removeprefix(PREFIX)
        part = next((part for part in LOW_RANK if plain.endswith(f".{part}")), None)
        (whole if part is None else adapted).add(plain.removesuffix(f".{part}"))
    return adapted, whole


def _raise_all(directory: Path, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(
            join_problems(f"what was trained, in {directory}, cannot be merged", wrong),
            hint="it is damaged, or belongs to another base model: train again",
        )


class DeltaChange:
    """The weights of new layers that ``export.format: delta`` left; see `Change`.

    New layers start as identities: the weights that are trained are zero.

    Args:
        directory: of the delta.

    Raises:
        CheckpointError: it is damaged.
    """

    starts_at_zero = True

    def __init__(self, directory: Path) -> None:
        self._files = CheckpointFiles(directory)
        _raise_all(directory, self._files.damage)
        self.names: Set[str] = self._files.names

    def apply(self, name: str, base: Tensor, start: int) -> Tensor:
        """Returns the trained rows of one weight; see `Change`."""
        return self._files.read_matrix_rows(name, start, start + base.shape[0]).float()
