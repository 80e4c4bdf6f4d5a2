"""Builds the sharded, loaded model that training and generation share.

The order matters: adapters before sharding (``fully_shard`` never broadcasts, and everything must
be in a group), checkpointing before sharding, loading after it (no rank ever holds the model).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from fsdpq.dist import check_same_on_all_ranks, own_shard
from fsdpq.errors import EnvironmentProblemError
from fsdpq.fsdp.wrap import apply_fsdp, build_mesh
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.meta import DTYPES, build_meta_model, count_parameters
from fsdpq.model.packing import check_packing_isolates
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.model.stream import checkpoint_name, load_base
from fsdpq.model.structure import matches_suffix
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.registry import resolve_builder
from fsdpq.run_files import RunFiles


@dataclass(frozen=True)
class Inputs:
    """Where the launcher put what the recipe names.

    Attributes:
        model_dir: the base model's checkpoint.
        model_revision: commit of a hub repository, None elsewhere.
        data_path: the data file, None where rows are made up.
    """

    model_dir: Path
    model_revision: str | None
    data_path: Path | None


@dataclass(frozen=True)
class Assembled:
    """A sharded, loaded model.

    Attributes:
        model: the root of what FSDP shards.
        num_parameters: weights of the base, tied ones once.
        num_quantized: those stored quantized.
        num_groups: FSDP groups.
    """

    model: CausalLM
    num_parameters: int
    num_quantized: int
    num_groups: int

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The trained Parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def adapted_layers(self) -> dict[str, nn.Module]:
        """Adapted layers by their name in the transformers model."""
        return {
            checkpoint_name(name): module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        }

    def own_bytes(self, *, trainable: bool) -> int:
        """Resident bytes of this rank's shards of the adapter, or of the frozen base."""
        return sum(
            own_shard(parameter).rows.nbytes
            for parameter in self.model.parameters()
            if parameter.requires_grad == trainable
        )


def read_inputs(files: RunFiles) -> Inputs:
    """Reads from the lock where model and data lie."""
    inputs = json.loads(files.lock.read_text(encoding="utf-8"))["inputs"]
    model, data = inputs["model"], inputs["data"]
    data_path = Path(data["path"]) if data["path"] is not None else None
    return Inputs(Path(model["directory"]), model["revision"], data_path)


def resolve_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Returns the compute dtype of a resolved recipe.

    Raises:
        EnvironmentProblemError: bf16 on a GPU that has none.
    """
    dtype = DTYPES[recipe.model.dtype]
    on_gpu = device.type == "cuda"
    if dtype is torch.bfloat16 and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise EnvironmentProblemError(
            f"{torch.cuda.get_device_name(device)} does not compute in bf16",
            hint="add `model.dtype=fp32` to the command line",
        )
    return dtype


def assemble_model(
    recipe: Recipe,
    model_dir: Path,
    *,
    device: torch.device,
    report_load: Callable[[int, int], Any],
) -> Assembled:
    """Builds, shards and loads the model, adapters at their initial values.

    Ranks: all (collective).
    """
    dtype = resolve_dtype(recipe, device)
    quantizer = resolve_builder("quantization", recipe.quantization)(recipe.quantization)
    adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    model = build_meta_model(
        model_dir,
        dtype=dtype,
        attn_implementation=recipe.model.attn_implementation,
        quantizer=quantizer,
    )
    if recipe.data.packing != "none":
        check_packing_isolates(model.hf)
    num_parameters, num_quantized = count_parameters(model)
    adapter.apply_adapter(
        model.decoder_layers, is_target=target_test(lora_options(recipe).target_modules)
    )
    if recipe.fsdp.activation_checkpointing == "full":
        model.apply_checkpointing()
    num_groups = apply_fsdp(
        model,
        recipe.fsdp,
        mesh=build_mesh(device),
        layers=model.decoder_layers,
        embedding_groups=model.embedding_groups,
        forward_methods=("next_token_logits",),
    )
    load_base(model, model_dir, dtype=dtype, device=device, report=report_load)
    digest = adapter.init_adapter(model, seed=recipe.training.seed)
    check_same_on_all_ranks("the adapters' initial values", digest)
    return Assembled(model, num_parameters, num_quantized, num_groups)


def lora_options(recipe: Recipe) -> LoraOptions:
    """Returns the adapter's options, which `fsdpq.recipe.not_yet` lets be LoRA's only."""
    if not isinstance(recipe.adapter, LoraOptions):
        raise TypeError(f"adapter.kind `{recipe.adapter.kind}` cannot be assembled")
    return recipe.adapter


def target_test(targets: str | tuple[str, ...]) -> Callable[[str, nn.Module], bool]:
    """Returns whether a module inside the decoder layers gets an adapter."""

    def is_target(name: str, module: nn.Module) -> bool:
        if not isinstance(module, QuantizedLinear | nn.Linear):
            return False
        return isinstance(targets, str) or matches_suffix(name, targets)

    return is_target


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Returns the checkpoint's tokenizer."""
    return AutoTokenizer.from_pretrained(model_dir)


def stop_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end an answer: the tokenizer's and the generation config's."""
    found: set[int] = set()
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    if (model_dir / "generation_config.json").exists():
        listed = GenerationConfig.from_pretrained(model_dir).eos_token_id
        found |= set(listed) if isinstance(listed, list) else {listed} - {None}
    return found
