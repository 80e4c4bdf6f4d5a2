"""Opens what a merge reads: the run's model on meta, its base, what it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fsdpq.checkpoint.whole_model import DELTA_NAME
from fsdpq.errors import UsageError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.bnb_files import BnbFiles
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.model.loading.source import open_tensors
from fsdpq.model.loading.targets import loading_targets, tied_names
from fsdpq.protocols import Adapter
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.stored_quantization import read_stored_quantization
from fsdpq.registry import resolve_builder
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.base_manifest import is_base
from fsdpq.worker.assemble import Inputs, build_model, read_inputs, resolve_dtype
from fsdpq.worker.assemble import without_gpu_kernels as plain_recipe
from fsdpq.worker.base import open_source
from fsdpq.worker.merge.bases import BaseRows, StoredRows, TrainedRows, no_original
from fsdpq.worker.merge.changes import AdapterChange, Change, DeltaChange
from fsdpq.worker.merge.layout import weight_shapes


@dataclass(frozen=True)
class FinishedRun:
    """A run, opened to be merged.

    Attributes:
        files: its directory.
        recipe: as the ranks read it.
        inputs: its base and its data.
        model: on meta, quantized and unfrozen as for training.
        stored: the base's checkpoint, None where the base is one of fsdpq's own.
        trained_over: the base as training saw it.
        change: what was trained.
        notice: what the user should know of the base, or an empty text.
    """

    files: RunFiles
    recipe: Recipe
    inputs: Inputs
    model: CausalLM
    stored: StoredRows | None
    trained_over: TrainedRows
    change: Change
    notice: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, by their names in transformers."""
        return weight_shapes(self.model)

    @property
    def is_stored_quantized(self) -> bool:
        """Whether no unquantized weights of the base are here."""
        return self.stored is None or isinstance(self.stored.files, BnbFiles)

    def base_rows(self, onto: str) -> BaseRows:
        """Returns the base to merge into.

        Args:
            onto: ``original`` or ``dequantized``.

        Raises:
            CheckpointError: there is no original.
        """
        if onto == "dequantized":
            return self.trained_over
        if self.stored is None or self.is_stored_quantized:
            raise no_original(f"`{self.inputs.model_dir}`")
        return self.stored


def open_finished_run(
    files: RunFiles, device: torch.device, *, trust_remote_code: bool = False
) -> FinishedRun:
    """Opens a run; no weight is read yet.

    Ranks: all (collective).

    Args:
        files: of the run.
        device: matrices are quantized and dequantized there.
        trust_remote_code: run code that the model brings.

    Raises:
        UsageError: it left a whole model already.
        CheckpointError: the base or what was trained is damaged, or one does not fit the other.
    """
    recipe = load_resolved(files.resolved)
    exported = files.exported(recipe.export.format)
    if recipe.export.format == "transformers":
        message = f"there is nothing to merge: the run left a whole model in `{exported}`"
        raise UsageError(message, hint="use that directory")
    inputs = read_inputs(files, trust_remote_code=trust_remote_code)
    adapter: Adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    dtype = resolve_dtype(recipe, device)
    model = build_model(
        plain_recipe(recipe), inputs.model_dir, adapter, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    stored = _open_stored(model, inputs.model_dir)
    source, notice = open_source(
        model, recipe.quantization, inputs.model_dir, inputs.base, dtype=dtype, device=device
    )
    trained_over = TrainedRows(model, source, stored, dtype=dtype, device=device)
    change = _open_change(exported, model)
    return FinishedRun(files, recipe, inputs, model, stored, trained_over, change, notice)


def _open_stored(model: CausalLM, directory: Path) -> StoredRows | None:
    if is_base(directory):
        return None
    quantized = read_stored_quantization(directory) is not None
    files = BnbFiles(directory) if quantized else CheckpointFiles(directory)
    return StoredRows(model, files, open_tensors(model, files))


def _open_change(exported: Path, model: CausalLM) -> Change:
    if (exported / DELTA_NAME).exists():
        return DeltaChange(exported)
    tied = tied_names(model, loading_targets(model))
    return AdapterChange(exported, weight_shapes(model), tied=tied)
