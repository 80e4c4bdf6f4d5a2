"""Writes and reads adapters in PEFT's format; the only module that imports peft.

Adapter weights are gathered on all ranks (saving from rank 0 alone would write one shard) and
written by rank 0 into a directory that appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

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
    hf_config: PretrainedConfig,
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
        hf_config: of the base.
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
        config = _config(options, list(layers), saved, hf_config)
        config.base_model_name_or_path, config.revision = base_model, revision
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


def check_loadable(
    layers: Mapping[str, AdaptedLayer],
    hf: nn.Module,
    *,
    options: LoraOptions,
    saved: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> None:
    """Checks, before anything is trained, that PEFT will adapt the layers that are adapted here.

    Args:
        layers: as for `export_adapter`.
        hf: the base as transformers builds it, on meta; PEFT's layers go into it.
        options: the adapter's section of the recipe.
        saved: as for `export_adapter`.

    Raises:
        ExportError: it will not.
    """
    from peft import get_peft_model

    try:
        config = _config(options, list(layers), saved, hf.config)  # pyright: ignore
        wrapped = get_peft_model(hf, config, low_cpu_mem_usage=True)  # pyright: ignore
        theirs = {
            name.removeprefix(PREFIX)
            for name, module in wrapped.named_modules()
            if hasattr(module, "lora_A")
        }
        differing = sorted(theirs ^ layers.keys())
        problem = f"it adapts {len(differing)} other layers: {', '.join(differing[:3])}"
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        differing, problem = ["all"], str(error)
    if differing:
        raise ExportError(
            f"PEFT could not load what this recipe trains of a `{type(hf).__name__}`: {problem}",
            hint="name other layers in `adapter.target_modules`; with `kind: dora` try `lora`",
        )


def wrap_in_peft(hf: nn.Module, directory: Path) -> nn.Module:
    """Returns PEFT's own model around ``hf``, with the adapter of ``directory`` as PEFT loads it.

    Raises:
        ExportError: PEFT does not load it, or not all of it, or changes values; PEFT itself only
            warns of some of this.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        wrapped = PeftModel.from_pretrained(hf, str(directory))  # pyright: ignore
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise ExportError(
            f"PEFT cannot load the adapter that was written: {error}",
            hint="report this with the recipe: the trained weights are in the directory's files",
        ) from error
    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    written = load_file(directory / WEIGHTS_NAME)
    differing = sorted(written.keys() ^ loaded.keys()) or sorted(
        name
        for name, tensor in written.items()
        if not torch.equal(tensor.to(loaded[name].dtype), loaded[name].cpu())
    )
    if differing:
        raise ExportError(
            f"PEFT did not take {len(differing)} of the adapter's tensors as they were written: "
            f"{', '.join(differing[:3])}",
            hint="report this with the recipe: the trained weights are in the directory's files",
        )
    return wrapped


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
    hf_config: PretrainedConfig,
) -> Any:
    from peft import LoraConfig, TaskType

    targets = options.target_modules
    if targets == "all-linear":
        targets = tuple(sorted({name.rpartition(".")[2] for name in names}))
    elif isinstance(targets, str):  # PEFT would look for it outside the decoder layers, too
        targets = tuple(names)
    renamed = tuple(target for target in targets if _means_experts(target, hf_config))
    parameters = [f"{name}.weight" for name in names if _matches_any(name, renamed)]
    times = 2 if options.init in ("pissa", "olora") else 1
    scaled = times**0.5 if options.use_rslora else times
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.rank * times,
        lora_alpha=options.alpha * scaled,  # pyright: ignore[reportArgumentType] - PEFT takes floats too
        lora_dropout=0.0 if parameters else options.dropout,  # PEFT drops nothing beside parameters
        use_rslora=options.use_rslora,
        use_dora=options.kind == "dora",
        target_modules=[target for target in targets if target not in renamed],
        target_parameters=parameters or None,
        modules_to_save=sorted({name.rpartition(".")[0] for name in saved}) or None,
        ensure_weight_tying=len({id(parameter) for parameter in saved.values()}) < len(saved),
        inference_mode=True,
    )
    # PEFT makes a set of the list, and writes it in an order that is another in every process.
    config.target_modules = sorted(config.target_modules or ())  # pyright: ignore[reportAttributeAccessIssue]
    return config


def _matches_any(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether the last parts of a dotted name are one of ``suffixes``."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _means_experts(target: str, hf_config: PretrainedConfig) -> bool:
    """Whether PEFT takes a name of a linear layer for one of experts in a mixture of this family.

    Transformers 5 keeps experts as parameters, and PEFT (0.21, ``transformers_weight_conversion``)
    translates the old names of their linear layers, also where a dense layer or a shared expert has
    the same name. A weight that is named as a parameter is not translated.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = LoraConfig(target_modules=[target])
    family: Any = SimpleNamespace(config=hf_config)
    try:
        convert_peft_config_for_transformers(probe, family, None)
    except ValueError:  # one of two names that belong together
        return True
    return target not in (probe.target_modules or ())
