"""Writes and reads adapters in PEFT's format; the only module that imports peft.

Adapter weights are gathered on all ranks (saving from rank 0 alone would write one shard) and
written by rank 0 into a directory that appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fsdpq.checkpoint.directory import save_tensors, whole_directory
from fsdpq.dist import assign_own_rows, gather_whole, rank
from fsdpq.errors import ExportError
from fsdpq.protocols import AdaptedLayer
from fsdpq.recipe.sections.adapter import LoraOptions

PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base model."""

WEIGHTS_NAME = "adapter_model.safetensors"


def export_adapter(
    layers: Mapping[str, AdaptedLayer],
    directory: Path,
    *,
    options: LoraOptions,
    base_model: str,
    revision: str | None,
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``.

    Ranks: all (collective); rank 0 writes.

    Args:
        layers: adapted layers by their name in the transformers model
            (``model.layers.0.self_attn.q_proj``).
        directory: where to; replaced if it is there.
        options: the adapter's section of the recipe.
        base_model: what PEFT loads as the base: a directory or a name on the hub.
        revision: of the base.

    Raises:
        ExportError: the directory cannot be written.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(layers).items():
        whole = gather_whole(parameter)
        if rank() == 0:
            weights[name] = whole.cpu().contiguous()
    if rank() != 0:
        return
    with whole_directory(directory, what="the adapter") as partial:
        save_tensors(weights, partial / WEIGHTS_NAME)
        _config(options, list(layers), base_model, revision).save_pretrained(str(partial))


def import_adapter(layers: Mapping[str, AdaptedLayer], directory: Path) -> None:
    """Fills each rank's rows of the adapter from a PEFT directory, in place.

    Raises:
        ExportError: a tensor is missing, unexpected or of another shape.
    """
    try:
        weights = load_file(directory / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"no adapter in {directory}: {error}", hint="did the run finish? see its logs"
        ) from error
    expected = _named_parameters(layers)
    shapes = {name: tuple(parameter.shape) for name, parameter in expected.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != found:
        differing = sorted(set(shapes.items()) ^ set(found.items()))[:5]
        raise ExportError(
            f"the adapter in {directory} does not fit the model: {differing}",
            hint="it belongs to another base model or another adapter section",
        )
    for name, parameter in expected.items():
        assign_own_rows(parameter, weights[name])


def _named_parameters(layers: Mapping[str, AdaptedLayer]) -> dict[str, nn.Parameter]:
    """Trained Parameters by their names in PEFT's files."""
    return {
        f"{PREFIX}{name}.{peft_name}": getattr(layer, attribute)
        for name, layer in layers.items()
        for attribute, peft_name in layer.peft_names.items()
    }


def _config(options: LoraOptions, names: list[str], base_model: str, revision: str | None) -> Any:
    from peft import LoraConfig, TaskType

    targets = options.target_modules
    if targets == "all-linear":
        targets = tuple(sorted({name.rpartition(".")[2] for name in names}))
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        revision=revision,
        r=options.rank,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType] - PEFT takes floats too
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        use_dora=options.kind == "dora",
        target_modules=list(targets),
        inference_mode=True,
    )
