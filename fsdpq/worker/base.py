"""Chooses where a run's base comes from: a base that is quantized already, or the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.base_source import QuantizedBaseSource, check_is_original
from fsdpq.model.loading.bnb_checkpoint import BnbCheckpointSource
from fsdpq.model.loading.source import BaseSource, CheckpointSource
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.quantization import BnbOptions, QuantizationOptions
from fsdpq.recipe.stored_quantization import find_disagreements, read_stored_quantization
from fsdpq.registry import resolve_builder
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.base_manifest import Key, base_key, is_base


@dataclass(frozen=True)
class QuantizedBase:
    """A base that the launcher found or made: ``inputs.base`` of the lock.

    Attributes:
        directory: of the base.
        key: what it must be made from.
    """

    directory: Path
    key: Key


def read_base_input(inputs: Mapping[str, Any]) -> QuantizedBase | None:
    """Returns ``inputs.base`` of a lock, None where the base is to come from the checkpoint."""
    base = inputs.get("base")
    return None if base is None else QuantizedBase(Path(base["directory"]), base["key"])


def key_of_run(files: RunFiles, recipe: Recipe) -> Key:
    """Returns what the base of a run directory's recipe is made from."""
    lock = json.loads(files.lock.read_text(encoding="utf-8"))
    return base_key(
        model=lock["inputs"]["model"],
        quantization=recipe.quantization.model_dump(mode="json"),
        dtype=recipe.model.dtype,
        device=recipe.launch.device,
    )


def check_stored_quantization(recipe: Recipe, model_dir: Path) -> None:
    """Checks that the recipe fits weights that are quantized already.

    Raises:
        CheckpointError: it does not; says what differs.
    """
    stored = read_stored_quantization(model_dir)
    problems = [] if stored is None else list(find_disagreements(stored, recipe.quantization))
    if problems:
        raise CheckpointError("; ".join(p.message for p in problems), hint=problems[0].hint)


def open_checkpoint_source(
    model: CausalLM,
    options: QuantizationOptions,
    model_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> CheckpointSource | BnbCheckpointSource:
    """Returns the source of a checkpoint: quantized while it is read, or as it is stored.

    Args:
        model: on meta.
        options: the recipe's ``quantization``.
        model_dir: the checkpoint.
        dtype: of the model.
        device: this rank's device.

    Raises:
        CheckpointError: names, shapes or the quantization do not fit, or a file is damaged.
    """
    if read_stored_quantization(model_dir) is None or not isinstance(options, BnbOptions):
        return CheckpointSource(model, model_dir, dtype=dtype, device=device)
    tables = resolve_builder("quantization", options)(options).library_tables()
    return BnbCheckpointSource(model, model_dir, options=options, tables=tables, device=device)


def open_source(
    model: CausalLM,
    options: QuantizationOptions,
    model_dir: Path,
    base: QuantizedBase | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload: str = "none",
) -> tuple[BaseSource, str]:
    """Returns the source of a base, and a notice for the user or an empty text.

    Args:
        model: sharded, on meta.
        options: the recipe's ``quantization``.
        model_dir: the checkpoint.
        base: made from it; None, or one that is gone, is made from the checkpoint while it loads.
        dtype: of the model.
        device: this rank's device.
        offload: ``fsdp.offload``; with ``disk`` frozen rows stay in the base's file.

    Raises:
        CheckpointError: a base that is there and whole is of another model or recipe, the
            checkpoint cannot be read, or there is no base to map.
        DamagedBaseError: a base is not what was written.
    """

    def open_checkpoint() -> CheckpointSource | BnbCheckpointSource:
        check_is_original(model_dir)
        return open_checkpoint_source(model, options, model_dir, dtype=dtype, device=device)

    mapped = offload == "disk"
    if mapped and (base is None or not is_base(base.directory)):
        raise CheckpointError(
            "`fsdp.offload: disk` maps a quantized base from its file, and there is none"
            + ("" if base is None else f" in {base.directory}"),
            hint="write one with `fsdpq quantize RECIPE --out DIR` and name DIR in "
            "`model.name_or_path`, or use `offload: cpu`",
        )
    if base is None:
        checkpoint = open_checkpoint()
        return checkpoint, checkpoint.notice
    if not is_base(base.directory):
        notice = f"the quantized base {base.directory} is gone: quantizing {model_dir} again"
        return open_checkpoint(), notice
    source = QuantizedBaseSource(
        model, base.directory, key=base.key, open_original=open_checkpoint, mapped=mapped
    )
    return source, ""
