"""What a recipe trains, made of other people's code: transformers, PEFT, bitsandbytes, hqq.

A quantized base is made of the library's own modules, ``Linear4bit`` or ``HQQLinear``; adapters are
PEFT's. LLaMA Pro has no library: its model is transformers', with copied layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from support import reference
from support.library_linears import with_library_linears

PEFT_NAMES = {
    ".lora_A.default.weight": ".lora_A",
    ".lora_B.default.weight": ".lora_B",
    ".lora_magnitude_vector.default.weight": ".magnitude",
}


def build(
    directory: Path,
    adapter: Mapping[str, Any],
    quantization: dict[str, Any],
    initial_a: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Returns the whole model, frozen but for what is trained.

    Args:
        directory: an unquantized checkpoint.
        adapter: the section of a recipe; ``alpha`` is twice the rank.
        quantization: the section of a recipe.
        initial_a: the first values of every A, by the layer's name in transformers.
        dtype: of the base.
    """
    if adapter["kind"] == "llama_pro":
        return expanded(directory, adapter["num_new_layers"], quantization)
    model = reference.load_plain(directory, dtype)
    if quantization["kind"] != "none":
        with_library_linears(model, quantization, dtype)
    if adapter["kind"] == "none":
        return model
    return reference.with_peft_lora(
        model,
        initial_a,
        rank=adapter["rank"],
        use_dora=adapter["kind"] == "dora",
        use_rslora=adapter.get("use_rslora", False),
    ).train()


def expanded(directory: Path, num_new: int, quantization: dict[str, Any]) -> nn.Module:
    """Returns a Llama with a copy of the last layer of each of ``num_new`` groups behind it.

    The copies' output projections are zero, trained and not quantized.
    """
    original = reference.load_plain(directory)
    config = AutoConfig.from_pretrained(directory)
    group = config.num_hidden_layers // num_new
    sources: list[int] = []
    for index in range(config.num_hidden_layers):
        sources += [index, index] if (index + 1) % group == 0 else [index]
    config.num_hidden_layers = len(sources)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[source] for source in sources]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rest = {k: v for k, v in original.state_dict().items() if ".layers." not in k}
    model.load_state_dict(rest, strict=False)
    model.requires_grad_(False)
    trained: list[str] = []
    for index, source in enumerate(sources):
        layer: Any = model.model.layers[index]
        layer.load_state_dict(original.model.layers[source].state_dict())  # pyright: ignore
        if index and sources[index - 1] == source:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                nn.init.zeros_(layer.get_submodule(name).requires_grad_(True).weight)
                trained.append(f"model.layers.{index}.{name}")
    if quantization["kind"] != "none":
        with_library_linears(model, quantization, trained=trained)
    return model


def named_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters by the names that they have in fsdpq, tied ones once."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.removeprefix("base_model.model.")
            for theirs, ours in PEFT_NAMES.items():
                key = key.replace(theirs, ours)
            found[key] = parameter
    return found
