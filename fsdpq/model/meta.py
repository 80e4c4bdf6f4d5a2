"""Builds the base model on the meta device and swaps its linears for quantized ones.

Nothing here reads a weight: the result has shapes and dtypes only, and `fsdpq.model.stream` fills
it after FSDP has sharded it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.expansion import expand_config
from fsdpq.model.quantized_linear import QuantizedLinear, packed_parameter_ids
from fsdpq.model.structure import find_decoder_layers, matches_suffix, named_linears
from fsdpq.protocols import Quantizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names in recipes, and what torch calls them."""


def build_meta_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    quantizer: Quantizer,
    trust_remote_code: bool = False,
    layer_sources: Callable[[int], Sequence[int]] = range,
    unfreeze: Callable[[PreTrainedModel, nn.ModuleList, Sequence[int]], None] | None = None,
) -> CausalLM:
    """Returns the model on meta, in train mode, frozen linears of the decoder layers swapped.

    Args:
        directory: holds the checkpoint's ``config.json``.
        dtype: of the weights that stay unquantized.
        attn_implementation: attention code path of transformers.
        quantizer: packs the linear layers inside the decoder layers; the head stays.
        trust_remote_code: run the model class that the checkpoint brings as Python code.
        layer_sources: returns the checkpoint's layer of every layer that the model is to have, from
            the checkpoint's number of layers.
        unfreeze: makes weights trainable, given the model, its decoder layers and their sources;
            all are frozen before.

    Raises:
        CheckpointError: the architecture is unknown to transformers or not decoder-only.
    """
    try:
        config = read_config(directory, trust_remote_code=trust_remote_code)
        sources = layer_sources(config.get_text_config().num_hidden_layers)
        expand_config(config, sources)
        with torch.device("meta"), explained_remote_code(directory):
            hf = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"transformers cannot build the model of {directory}: {error}",
            hint="the directory needs the config.json of a causal language model",
        ) from error
    hf.tie_weights()
    hf.requires_grad_(False)
    if unfreeze is not None:
        unfreeze(hf, find_decoder_layers(hf), sources)
    model = CausalLM(hf, sources)
    swap_linears(hf, quantizer)
    return model.train()


def read_config(directory: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Returns the checkpoint's config.

    Raises:
        CheckpointError: it is code of the model's authors, and nobody said to trust it.
    """
    with explained_remote_code(directory):
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)


@contextmanager
def explained_remote_code(directory: Path) -> Iterator[None]:
    """Explains transformers' refusal to run Python code that a checkpoint brings.

    ``trust_remote_code`` must be given to transformers as False, not left out: left out, it asks on
    stdin (5.23, ``dynamic_module_utils.resolve_trust_remote_code``).
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"the model of {directory} is Python code that its authors wrote, and code runs only "
            "when you say so",
            hint="read it; if you trust its authors, add `--trust-remote-code` to the command",
        ) from error


def swap_linears(hf: PreTrainedModel, quantizer: Quantizer) -> None:
    """Replaces the linears of the decoder layers in place.

    Raises:
        CheckpointError: ``modules_to_not_convert`` names a module that does not exist, a big
            weight would silently stay unquantized, or all are trained.
    """
    layers = find_decoder_layers(hf)
    linears = list(named_linears(layers))
    unknown = [
        suffix
        for suffix in quantizer.modules_to_not_convert
        if not any(matches_suffix(name, (suffix,)) for name, *_ in linears)
    ]
    if unknown:
        endings = sorted({name.rpartition(".")[2] for name, *_ in linears})
        raise CheckpointError(
            f"`quantization.modules_to_not_convert` names {', '.join(unknown)}, which this model "
            "does not have",
            hint=f"its linear layers are {', '.join(endings)}",
        )
    for name, parent, attribute, linear in linears:
        if matches_suffix(name, quantizer.modules_to_not_convert) or linear.weight.requires_grad:
            continue
        if quantizer.packed_shapes(linear.out_features, linear.in_features):
            setattr(parent, attribute, QuantizedLinear(linear, quantizer=quantizer))
    if all(linear.weight.requires_grad for *_, linear in linears) and any(
        quantizer.packed_shapes(linear.out_features, linear.in_features) for *_, linear in linears
    ):
        raise CheckpointError(
            "every linear layer is trained, so nothing is left to quantize",
            hint="full finetuning needs `quantization: {kind: none}`",
        )
    check_all_quantized(hf, quantizer)


def check_all_quantized(hf: PreTrainedModel, quantizer: Quantizer) -> None:
    """Checks that no big weight of the decoder layers stays unquantized without being told to.

    transformers keeps the experts of a mixture as one parameter of three dimensions, and GPT-2's
    layers are no ``nn.Linear``: replacing linears alone would pass them by.

    Raises:
        CheckpointError: there is such a weight; names some.
    """
    layers = find_decoder_layers(hf)
    linears = {id(module.weight) for module in layers.modules() if isinstance(module, nn.Linear)}
    big = sum(parameter.numel() for parameter in layers.parameters()) // len(layers) // 100
    left = [
        name
        for name, parameter in layers.named_parameters()
        if parameter.is_floating_point() and id(parameter) not in linears
        if not parameter.requires_grad
        if parameter.dim() >= 3 or (parameter.dim() == 2 and parameter.numel() > big)
        if quantizer.packed_shapes(*parameter.shape[-2:])
    ]
    if left:
        raise CheckpointError(
            f"`{type(hf).__name__}` has {len(left)} weights that would silently stay unquantized: "
            f"{', '.join(left[:3])}",
            hint="mixtures of experts and layers that are no `nn.Linear` cannot be quantized yet: "
            "train another model, or use `quantization: {kind: none}`",
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the base model's weights, tied ones once, and how many of them are quantized.

    Adapters count too where they are attached already.
    """
    quantized = sum(
        module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
    )
    packed = packed_parameter_ids(model)
    plain = sum(
        parameter.numel() for parameter in model.parameters() if id(parameter) not in packed
    )
    return plain + quantized, quantized
