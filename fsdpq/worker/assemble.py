"""Builds the sharded, loaded model that training and generation share.

The order matters: adapters before sharding (``fully_shard`` never broadcasts, and everything must
be in a group), checkpointing before sharding, loading after it (no rank ever holds the model).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fsdpq.dist import check_same_on_all_ranks, own_shard
from fsdpq.errors import EnvironmentProblemError
from fsdpq.fsdp.compiled_layers import apply_compile
from fsdpq.fsdp.precision import apply_buffers_dtype, apply_param_dtype, autocast_dtype
from fsdpq.fsdp.wrap import apply_fsdp
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.document_attention import use_document_attention
from fsdpq.model.loading.base_source import QuantizedBaseSource
from fsdpq.model.loading.mapped_base import MappedBase
from fsdpq.model.loading.stream import load_base
from fsdpq.model.loading.targets import checkpoint_name
from fsdpq.model.meta import build_meta_model, count_parameters
from fsdpq.model.packing import check_packing_isolates, longest_alone, needs_document_mask
from fsdpq.model.quantized_experts import router_ids
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.model.router_loss import build_router_loss
from fsdpq.protocols import BASE, DTYPES, AdaptedLayer, Adapter
from fsdpq.recipe.precision import Precision, precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.fsdp import FsdpOptions
from fsdpq.registry import resolve_builder
from fsdpq.rows.source import DataSources
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.base import (
    QuantizedBase,
    check_stored_quantization,
    open_source,
    read_base_input,
)
from fsdpq.worker.from_disk import read_ahead

COMPILE_NOTICE = "layers are compiled when they first run: the first steps take longer"


@dataclass(frozen=True)
class PreparedInput:
    """Prepared data that the launcher found or made: ``inputs.prepared`` of the lock.

    Attributes:
        directory: where it lies.
        digest: what its manifest's must be.
    """

    directory: Path
    digest: str


@dataclass(frozen=True)
class Inputs:
    """Where the launcher put what the recipe names.

    Attributes:
        model_dir: the base model's checkpoint.
        model_revision: commit of a hub repository, None elsewhere.
        data: where the rows are, None for a run that reads none.
        trust_remote_code: run Python code that the model brings; from the command line only.
        base: the base model quantized already, None where it is quantized while it loads.
        prepared: tokenized rows, None where there are none to map.
    """

    model_dir: Path
    model_revision: str | None
    data: DataSources | None
    trust_remote_code: bool = False
    base: QuantizedBase | None = None
    prepared: PreparedInput | None = None


@dataclass(frozen=True)
class Assembled:
    """A sharded, loaded model.

    Attributes:
        model: the root of what FSDP shards.
        num_parameters: weights of the base, tied ones once.
        num_quantized: those stored quantized.
        num_groups: FSDP groups.
        notices: what the user should know about how it is held and where it came from.
        mapped_base: the rows that are pages of a file, None where there are none.
    """

    model: CausalLM
    num_parameters: int
    num_quantized: int
    num_groups: int
    notices: tuple[str, ...] = ()
    mapped_base: MappedBase | None = None

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The trained Parameters."""
        return list(self.named_trainable.values())

    @property
    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The trained Parameters by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def adapted_layers(self) -> dict[str, AdaptedLayer]:
        """Adapted layers by their name in the transformers model."""
        return {
            checkpoint_name(name): cast("AdaptedLayer", module)
            for name, module in self.model.named_modules()
            if hasattr(module, BASE)
        }

    @property
    def trained_base(self) -> dict[str, nn.Parameter]:
        """Trained Parameters of the base by their names in transformers, tied ones by each name."""
        return {
            checkpoint_name(name): parameter
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad
            and not hasattr(self.model.get_submodule(name.rpartition(".")[0]), BASE)
        }

    def own_bytes(self, *, trainable: bool) -> int:
        """Resident bytes of this rank's shards of what is trained, or of what is frozen."""
        return sum(
            own_shard(parameter).rows.nbytes
            for parameter in self.model.parameters()
            if parameter.requires_grad == trainable
        )


def read_inputs(
    files: RunFiles, *, trust_remote_code: bool = False, own: Path | None = None
) -> Inputs:
    """Reads where model and data lie: from the lock, or from a file of this machine's ``own``."""
    inputs = json.loads((own or files.lock).read_text(encoding="utf-8"))
    inputs = inputs if own is not None else inputs["inputs"]
    model = inputs["model"]
    directory, revision = Path(model["directory"]), model["revision"]
    data = DataSources.from_json(inputs["data"]) if inputs.get("data") else None
    found = inputs.get("prepared")
    prepared = PreparedInput(Path(found["directory"]), found["digest"]) if found else None
    return Inputs(directory, revision, data, trust_remote_code, read_base_input(inputs), prepared)


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


def without_gpu_kernels(recipe: Recipe) -> Recipe:
    """Returns ``recipe`` with attention and kernels that a CPU has too."""
    model, changed = recipe.model, {"use_liger_kernel": False}
    if model.attn_implementation not in ("sdpa", "eager"):
        changed |= {"attn_implementation": "eager"}  # every architecture has it
    return recipe.model_copy(update={"model": model.model_copy(update=changed)})


def assemble_model(
    recipe: Recipe,
    model_dir: Path,
    *,
    device: torch.device,
    report_load: Callable[[int, int], Any],
    base: QuantizedBase | None = None,
    trust_remote_code: bool = False,
    on_phase: Callable[[str], Any] = lambda _phase: None,
    sharded: bool = True,
) -> Assembled:
    """Builds, shards and loads the model, what is trained at its initial values.

    One process that answers needs no shards: without ``sharded`` the Parameters are plain ones.

    Tells ``on_phase`` of the ``start``, and of ``shard``, ``load`` and ``init`` as each ends.

    Ranks: all (collective).
    """
    on_phase("start")
    dtype, precision = resolve_dtype(recipe, device), precision_of(recipe)
    adapter: Adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    model = build_model(
        recipe, model_dir, adapter, dtype=dtype, trust_remote_code=trust_remote_code
    )
    num_parameters, num_quantized = count_parameters(model)
    apply_adapter(model, adapter)
    if sharded:
        num_groups, about_offload = shard_model(model, recipe, device, precision=precision)
    else:
        num_groups, about_offload = 0, ""
        apply_precision(model, precision)
        apply_param_dtype(model, precision)
    on_phase("shard")
    mapped_base, about_base = fill_base(
        model, recipe, model_dir, base, dtype=dtype, device=device, report=report_load
    )
    cast_buffers(model, precision, persistent=True)
    on_phase("load")
    digest = adapter.init_adapter(model, seed=recipe.training.seed, dtype=dtype, device=device)
    check_same_on_all_ranks("the initial values of what is trained", digest)
    on_phase("init")
    about_compile = COMPILE_NOTICE if recipe.training.compile else ""
    notices = tuple(notice for notice in (about_offload, about_base, about_compile) if notice)
    return Assembled(model, num_parameters, num_quantized, num_groups, notices, mapped_base)


def fill_base(
    model: CausalLM,
    recipe: Recipe,
    model_dir: Path,
    base: QuantizedBase | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[int, int], Any],
) -> tuple[MappedBase | None, str]:
    """Loads the base of a sharded meta model, in place.

    Returns:
        What of it stays in a file, and a notice or an empty text.

    Ranks: all (collective).
    """
    fsdp = recipe.fsdp
    source, notice = open_source(
        model, recipe.quantization, model_dir, base, dtype=dtype, device=device,
        offload=fsdp.offload,
    )  # fmt: skip
    load_base(
        model, source, dtype=dtype, device=device, offload=fsdp.offload,
        offload_trained=fsdp.offload_trained, report=report,
    )  # fmt: skip
    mapped = source.mapped_base if isinstance(source, QuantizedBaseSource) else None
    if mapped is not None:
        read_ahead(model, mapped, fsdp, device)
    return mapped, notice


def apply_adapter(model: CausalLM, adapter: Adapter) -> None:
    """Wraps the linears of the decoder layers in place; routers of mixtures stay as they are."""
    routers = router_ids(model.decoder_layers)
    adapter.apply_adapter(
        model.decoder_layers,
        is_linear=lambda each: is_linear(each) and id(each) not in routers,
        prefix=model.layers_prefix,
    )


def build_model(
    recipe: Recipe,
    model_dir: Path,
    adapter: Adapter,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> CausalLM:
    """Returns the base on meta, quantized where it is frozen, with the layers of the adapter."""
    check_stored_quantization(recipe, model_dir)
    quantizer = resolve_builder("quantization", recipe.quantization)(recipe.quantization)
    model = build_meta_model(
        model_dir,
        dtype=dtype,
        attn_implementation=recipe.model.attn_implementation,
        quantizer=quantizer,
        use_liger_kernel=recipe.model.use_liger_kernel,
        trust_remote_code=trust_remote_code,
        layer_sources=adapter.layer_sources,
        unfreeze=lambda hf, layers, sources: adapter.unfreeze_base(
            hf, layers, sources=sources, master_dtype=torch.float32
        ),
    )
    if recipe.data.packing != "none":
        keep_documents_apart(model, recipe)
    model.router_loss = build_router_loss(model.hf, recipe.training.router_aux_loss_coef)
    return model


def keep_documents_apart(model: CausalLM, recipe: Recipe) -> None:
    """Chooses how the documents of packed rows do not see each other, in place.

    Raises:
        CheckpointError: the family does not allow it.
    """
    check_packing_isolates(model.hf)
    model.masks_packed = needs_document_mask(model.hf)
    # With chunks, rows stay rows, and one chunk is one row: `check_packed_rows_stay_apart`.
    flash = recipe.model.attn_implementation == "flash_attention_2"
    model.flattens_packed = flash and recipe.training.layer_chunks == 1
    # Compiled layers get masks: the cuts between documents differ in every micro-batch.
    model.longest_alone = 0 if recipe.training.compile else longest_alone(model.hf)
    if model.longest_alone:
        use_document_attention(model.hf)


def cast_buffers(model: CausalLM, precision: Precision, *, persistent: bool) -> None:
    """Casts buffers to their dtype, in place; see `fsdpq.fsdp.precision.apply_buffers_dtype`."""
    kept = model.hf._keep_in_fp32_modules_strict or ()
    apply_buffers_dtype(model, precision, persistent=persistent, fp32_names=kept)


def apply_precision(model: CausalLM, precision: Precision) -> None:
    """Sets autocast, and casts the buffers that no checkpoint holds, in place; on meta."""
    model.autocast_dtype = autocast_dtype(precision)
    cast_buffers(model, precision, persistent=False)


def shard_model(
    model: CausalLM,
    recipe: Recipe,
    device: torch.device,
    *,
    precision: Precision,
) -> tuple[int, str]:
    """Applies the ``fsdp`` section in place; returns the number of groups and a notice, if any.

    Ranks: all (collective).
    """
    apply_precision(model, precision)
    if recipe.training.compile:
        apply_compile(list(model.decoder_layers))
    return apply_fsdp(
        model,
        options_of_machine(recipe),
        device=device,
        layers=list(model.decoder_layers),
        embedding_groups=model.embedding_groups,
        forward_methods=("losses", "next_token_logits", "token_scores"),
        precision=precision,
        layer_chunks=recipe.training.layer_chunks,
    )


def options_of_machine(recipe: Recipe) -> FsdpOptions:
    """Returns the recipe's ``fsdp``; a hybrid strategy's groups are machines where it has several.

    So they stay where fewer machines than it asks for are left, down to one.
    """
    options, local_ranks = recipe.fsdp, os.environ.get("LOCAL_WORLD_SIZE")
    is_hybrid = options.strategy.startswith("hybrid") and options.shard_size is None
    if not is_hybrid or recipe.launch.max_nodes == 1 or local_ranks is None:
        return options
    return options.model_copy(update={"shard_size": int(local_ranks)})


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can wrap ``module``."""
    return isinstance(module, QuantizedLinear | nn.Linear)


def stop_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end an answer: the tokenizer's and the generation config's."""
    found: set[int] = set()
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    if (model_dir / "generation_config.json").exists():
        listed = GenerationConfig.from_pretrained(model_dir).eos_token_id
        found |= set(listed) if isinstance(listed, list) else {listed} - {None}
    return found
