"""Builds the base model on the meta device and swaps its linears for quantized ones.

Nothing here reads a weight: the result has shapes and dtypes only, and `fsdpq.model.loading` fills
it after FSDP has sharded it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fsdpq.errors import CheckpointError, EnvironmentProblemError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.config import explained_remote_code, read_config
from fsdpq.model.expansion import expand_config
from fsdpq.model.liger import apply_liger_kernels
from fsdpq.model.loading.bnb_checkpoint import swap_stored_linears
from fsdpq.model.quantized_experts import QuantizedExperts, named_experts, router_ids
from fsdpq.model.quantized_linear import PackedMatrix, QuantizedLinear, packed_parameter_ids
from fsdpq.model.structure import (
    find_decoder_layers,
    matches_suffix,
    named_linears,
)
from fsdpq.protocols import Quantizer
from fsdpq.recipe.stored_quantization import is_bnb_4bit, method_of

PROBE = (4096, 4096)
"""A shape that every quantizer packs, if it packs any."""


def build_meta_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    quantizer: Quantizer,
    use_liger_kernel: bool = False,
    trust_remote_code: bool = False,
    layer_sources: Callable[[int], Sequence[int]] = range,
    unfreeze: Callable[[PreTrainedModel, nn.ModuleList, Sequence[int]], None] | None = None,
) -> CausalLM:
    """Returns the model on meta, in train mode, frozen linears of the decoder layers swapped.

    Args:
        directory: holds the checkpoint's ``config.json``.
        dtype: of the weights that stay unquantized.
        attn_implementation: attention code path of transformers.
        quantizer: packs the linear layers inside the decoder layers; the head stays. Of a
            checkpoint with 4-bit weights of bitsandbytes, those layers that it holds quantized.
        use_liger_kernel: run Liger's kernels where it has some.
        trust_remote_code: run the model class that the checkpoint brings as Python code.
        layer_sources: returns the checkpoint's layer of every layer that the model is to have, from
            the checkpoint's number of layers.
        unfreeze: makes weights trainable, given the model, its decoder layers and their sources;
            all are frozen before.

    Raises:
        CheckpointError: the architecture is unknown to transformers or not decoder-only.
        EnvironmentProblemError: a package that the model or its attention needs is missing.
    """
    with _explained_build(directory):
        config = read_config(directory, trust_remote_code=trust_remote_code)
        stored = _check_not_foreign(config, directory)
        sources = layer_sources(config.get_text_config().num_hidden_layers)
        expand_config(config, sources)
        with torch.device("meta"), explained_remote_code(directory):
            hf = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    hf.tie_weights()
    hf.requires_grad_(False)
    if use_liger_kernel:
        apply_liger_kernels(hf)
    if unfreeze is not None:
        unfreeze(hf, find_decoder_layers(hf), sources)
    model = CausalLM(hf, sources)
    if stored:
        swap_stored_linears(model, quantizer, directory)
    else:
        swap_weights(hf, quantizer)
    return model.train()


@contextmanager
def _explained_build(directory: Path) -> Iterator[None]:
    """Explains why transformers cannot build a model."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot build the model of {directory}: {error}",
            hint="set `model.attn_implementation: eager`"
            if _is_about_attention(error)
            else "the directory needs the config.json of a causal language model",
        ) from error
    except ImportError as error:
        raise EnvironmentProblemError(
            f"transformers cannot build the model of {directory}: {error}",
            hint="set `model.attn_implementation: sdpa`"
            if _is_about_attention(error)
            else "install the package that it names",
        ) from error


def _is_about_attention(error: Exception) -> bool:
    message = str(error).lower()
    return "attention" in message or "attn_implementation" in message


def _check_not_foreign(config: PreTrainedConfig, directory: Path) -> bool:
    """Returns whether the weights are quantized already, by bitsandbytes in 4 bits."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return False
    stored = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if is_bnb_4bit(stored):
        return True
    raise CheckpointError(
        f"the weights of {directory} are quantized already (`quantization_config` in its "
        f"config.json: {method_of(stored)}), and only 4-bit weights of bitsandbytes can be read "
        "as they are",
        hint="name the unquantized repository in `model.name_or_path`: fsdpq quantizes while it "
        "loads",
    )


def swap_weights(hf: PreTrainedModel, quantizer: Quantizer) -> None:
    """Replaces the frozen linears and experts of the decoder layers in place.

    Raises:
        CheckpointError: ``modules_to_not_convert`` names a module that does not exist, a big
            weight would silently stay unquantized, or all are trained.
    """
    layers = find_decoder_layers(hf)
    routers = router_ids(layers)
    linears = [found for found in named_linears(layers) if id(found[-1]) not in routers]
    experts = list(named_experts(layers))
    names = [name for name, *_ in (*linears, *experts)]
    kept = quantizer.modules_to_not_convert
    unknown = [s for s in kept if not any(matches_suffix(name, (s,)) for name in names)]
    if unknown:
        endings = sorted({name.rpartition(".")[2] for name in names})
        raise CheckpointError(
            f"`quantization.modules_to_not_convert` names {', '.join(unknown)}, which this model "
            "does not have",
            hint=f"its linear layers are {', '.join(endings)}",
        )
    for name, parent, attribute, linear in linears:
        trained = linear.weight.requires_grad
        # One row: the gate of a shared expert.
        if trained or matches_suffix(name, kept) or linear.out_features == 1:
            continue
        if quantizer.packed_shapes(linear.out_features, linear.in_features):
            setattr(parent, attribute, QuantizedLinear(linear, quantizer=quantizer))
    for name, parent, attribute, module in experts:
        down = module.get_parameter("down_proj")
        if down.requires_grad or matches_suffix(name, kept):
            continue
        if quantizer.packed_shapes(*down.flatten(0, 1).shape):
            setattr(parent, attribute, QuantizedExperts(module, quantizer=quantizer))
    _check_some_frozen([linear for *_, linear in linears], quantizer)
    check_all_quantized(hf, quantizer)


def _check_some_frozen(linears: Sequence[nn.Linear], quantizer: Quantizer) -> None:
    packs = bool(linears) and quantizer.packed_shapes(*PROBE)
    if packs and all(each.weight.requires_grad for each in linears):
        raise CheckpointError(
            "every linear layer is trained, so nothing is left to quantize",
            hint="full finetuning needs `quantization: {kind: none}`",
        )


def _stays_plain(module: nn.Module) -> bool:
    """Whether it is a linear that was told to stay, or a filter of few weights for each channel."""
    is_filter = isinstance(module, nn.Conv1d) and module.groups == module.in_channels
    return is_filter or isinstance(module, nn.Linear)


def check_all_quantized(hf: PreTrainedModel, quantizer: Quantizer) -> None:
    """Checks that no big weight of the decoder layers stays unquantized without being told to.

    Some mixtures keep their experts in a layout that `QuantizedExperts` does not do, and GPT-2's
    layers are no ``nn.Linear``: replacing what is known alone would pass them by.

    Raises:
        CheckpointError: there is such a weight; names some.
    """
    layers = find_decoder_layers(hf)
    others = {id(module.weight) for module in layers.modules() if _stays_plain(module)}
    big = sum(parameter.numel() for parameter in layers.parameters()) // len(layers) // 100
    left = [
        name
        for name, parameter in layers.named_parameters()
        if parameter.is_floating_point() and id(parameter) not in others
        if not parameter.requires_grad
        if not matches_suffix(name.rpartition(".")[0], quantizer.modules_to_not_convert)
        if parameter.dim() >= 3 or (parameter.dim() == 2 and parameter.numel() > big)
        if quantizer.packed_shapes(*PROBE)
    ]
    if left:
        raise CheckpointError(
            f"`{type(hf).__name__}` has {len(left)} weights that would silently stay unquantized: "
            f"{', '.join(left[:3])}",
            hint="such layers cannot be quantized yet: train another model, or use "
            "`quantization: {kind: none}`",
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the base model's weights, tied ones once, and how many of them are quantized.

    Adapters count too where they are attached already.
    """
    quantized = sum(
        module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, PackedMatrix)
    )
    packed = packed_parameter_ids(model)
    plain = sum(
        parameter.numel() for parameter in model.parameters() if id(parameter) not in packed
    )
    return plain + quantized, quantized
