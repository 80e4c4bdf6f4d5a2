"""Writes and reads adapters in PEFT's format; the only module that imports peft.

Adapter weights are gathered on all ranks (saving from rank 0 alone would write one shard) and
written by rank 0 into a directory that appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fsdpq.checkpoint.directory import save_tensors, whole_directory
from fsdpq.dist import assign_own_rows, gather_whole, own_shard, rank
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
    saved: Mapping[str, nn.Parameter] = MappingProxyType({}),
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
        saved: trained Parameters of the base itself, by their names in the transformers model.

    Raises:
        ExportError: the directory cannot be written.
    """
    weights: dict[str, Tensor] = {}
    for name, (layer, attribute) in _adapter_names(layers).items():
        whole = _gather(layer, attribute)
        if rank() == 0:
            weights[name] = whole.cpu().contiguous()
    for name, parameter in saved.items():
        whole = gather_whole(parameter)
        if rank() == 0:
            weights[f"{PREFIX}{name}"] = whole.cpu().clone()  # tied weights: a copy by each name
    if rank() != 0:
        return
    with whole_directory(directory, what="the adapter") as partial:
        save_tensors(weights, partial / WEIGHTS_NAME)
        config = _config(options, list(layers), saved, base_model, revision)
        config.save_pretrained(str(partial))


def import_adapter(
    layers: Mapping[str, AdaptedLayer],
    directory: Path,
    *,
    saved: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> None:
    """Fills each rank's rows of the adapter from a PEFT directory, in place.

    Args:
        layers: as for `export_adapter`, at their initial values.
        directory: what `export_adapter` wrote.
        saved: as for `export_adapter`.

    Raises:
        ExportError: a tensor is missing, unexpected or of another shape.
    """
    try:
        weights = load_file(directory / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"no adapter in {directory}: {error}", hint="did the run finish? see its logs"
        ) from error
    adapter = _adapter_names(layers)
    shapes = {name: _file_shape(*place) for name, place in adapter.items()}
    shapes |= {f"{PREFIX}{name}": tuple(parameter.shape) for name, parameter in saved.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != found:
        differing = sorted(set(shapes.items()) ^ set(found.items()))[:5]
        raise ExportError(
            f"the adapter in {directory} does not fit the model: {differing}",
            hint="it belongs to another base model or another adapter section",
        )
    for name, (layer, attribute) in adapter.items():
        parameter: nn.Parameter = getattr(layer, attribute)
        own = tuple(slice(size) for size in parameter.shape)
        assign_own_rows(parameter, weights[name][own])
    for name, parameter in saved.items():
        assign_own_rows(parameter, weights[f"{PREFIX}{name}"])


def _adapter_names(layers: Mapping[str, AdaptedLayer]) -> dict[str, tuple[AdaptedLayer, str]]:
    """Layers and names of their trained Parameters, by the names in PEFT's files."""
    return {
        f"{PREFIX}{name}.{peft_name}": (layer, attribute)
        for name, layer in layers.items()
        for attribute, peft_name in layer.peft_names.items()
    }


RANK_DIM = {"lora_A": 0, "lora_B": 1}
"""Which dimension of a low-rank matrix is the rank."""


def _gather(layer: AdaptedLayer, attribute: str) -> Tensor:
    """Returns a whole matrix as the original base needs it.

    A base that was left ``W - s B0 A0`` is not what others load: ``W + s (B A - B0 A0)`` is written
    as one adapter of twice the rank, as PEFT's ``path_initial_model_for_weight_conversion`` does.

    Ranks: all (collective).
    """
    parameter: nn.Parameter = getattr(layer, attribute)
    whole = gather_whole(parameter)
    if attribute not in layer.initial:
        return whole
    first = own_shard(parameter).gather(layer.initial[attribute], parameter.shape[0])
    dim = RANK_DIM[attribute]
    return torch.cat([whole, -first if dim == 1 else first], dim=dim)


def _file_shape(layer: AdaptedLayer, attribute: str) -> tuple[int, ...]:
    shape = list(getattr(layer, attribute).shape)
    if attribute in layer.initial:
        shape[RANK_DIM[attribute]] *= 2
    return tuple(shape)


def _config(
    options: LoraOptions,
    names: list[str],
    saved: Mapping[str, nn.Parameter],
    base_model: str,
    revision: str | None,
) -> Any:
    from peft import LoraConfig, TaskType

    targets = options.target_modules
    if targets == "all-linear":
        targets = tuple(sorted({name.rpartition(".")[2] for name in names}))
    elif isinstance(targets, str):  # PEFT would look for it outside the decoder layers, too
        targets = tuple(names)
    times = 2 if options.init in ("pissa", "olora") else 1
    scaled = times**0.5 if options.use_rslora else times
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        revision=revision,
        r=options.rank * times,
        lora_alpha=options.alpha * scaled,  # pyright: ignore[reportArgumentType] - PEFT takes floats too
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        use_dora=options.kind == "dora",
        target_modules=list(targets),
        modules_to_save=sorted({name.rpartition(".")[0] for name in saved}) or None,
        ensure_weight_tying=len({id(parameter) for parameter in saved.values()}) < len(saved),
        inference_mode=True,
    )
    # PEFT makes a set of the list, and writes it in an order that is another in every process.
    config.target_modules = sorted(targets)  # pyright: ignore[reportAttributeAccessIssue]
    return config
