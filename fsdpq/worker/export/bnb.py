"""Quantizes a checkpoint and writes it as bitsandbytes' own 4-bit format, for transformers.

Every rank quantizes its own rows of one matrix at a time and rank 0 writes it: no rank holds the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsdpq import dist
from fsdpq.checkpoint.bnb_format import (
    MAX_FILE_BYTES,
    TensorGroup,
    quantization_config,
    write_bnb_directory,
)
from fsdpq.dist import Shard, all_gather_rows, rank, shard_range, world_size
from fsdpq.errors import CheckpointError, ExportError, UsageError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.source import TensorRows, open_checkpoint, row_reader
from fsdpq.model.loading.targets import (
    checkpoint_name,
    full_shape,
    loading_targets,
)
from fsdpq.model.quantized_experts import PackedExperts
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.quantization.bnb import BnbQuantizer
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.quantization import BnbOptions
from fsdpq.recipe.stored_quantization import read_stored_quantization
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.assemble import resolve_dtype
from fsdpq.worker.quantize import build_frozen_model, start_job
from fsdpq.worker.train import load_reporter


def export_bnb(files: RunFiles, out: Path, *, trust_remote_code: bool = False) -> None:
    """Writes the model of a run directory's recipe in bitsandbytes' format into ``out``.

    Ranks: all (collective).
    """
    job = start_job(files)
    write_recipe_bnb(
        job.recipe,
        job.model_dir,
        out,
        device=job.device,
        report=load_reporter(job.events),
        trust_remote_code=trust_remote_code,
    )
    dist.wait_for_all()


def write_recipe_bnb(
    recipe: Recipe,
    model_dir: Path,
    out: Path,
    *,
    device: torch.device,
    report: Callable[[int, int], Any],
    trust_remote_code: bool = False,
) -> None:
    """Writes the model of a recipe in bitsandbytes' format into ``out``.

    Ranks: all (collective).

    Raises:
        UsageError: the recipe quantizes with another library, or not at all.
        CheckpointError: the checkpoint is damaged, or quantized already.
        ExportError: see `save_bnb_checkpoint`.
    """
    if not isinstance(recipe.quantization, BnbOptions):
        raise UsageError(
            "`--format bnb` writes 4-bit weights of bitsandbytes, and `quantization.kind` is "
            f"`{recipe.quantization.kind}`",
            hint="leave `--format` out, or use `quantization: {kind: bnb}`",
        )
    if read_stored_quantization(model_dir) is not None:
        raise CheckpointError(
            f"the weights of {model_dir} are quantized already",
            hint="use that directory as it is, or name the unquantized repository",
        )
    dtype = resolve_dtype(recipe, device)
    model = build_frozen_model(recipe, model_dir, dtype=dtype, trust_remote_code=trust_remote_code)
    quantizer = BnbQuantizer(recipe.quantization)
    save_bnb_checkpoint(
        model, model_dir, out, quantizer=quantizer, dtype=dtype, device=device, report=report
    )


@dataclass(frozen=True)
class GivenWeights:
    """The unquantized weights of a model that is to be written.

    Attributes:
        tensors: the weights, by the model's names.
        original: the checkpoint that the tokenizer's files are copied from.
        on_packed: told on rank 0 of each packed matrix by name, and of its whole tensors.
    """

    tensors: TensorRows
    original: Path
    on_packed: Callable[[str, Mapping[str, Tensor]], Any] = lambda _name, _packed: None


def save_bnb_checkpoint(
    model: CausalLM,
    directory: Path,
    out: Path,
    *,
    quantizer: BnbQuantizer,
    dtype: torch.dtype,
    device: torch.device,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Callable[[int, int], Any] = lambda _done, _total: None,
) -> None:
    """Writes a checkpoint as `save_bnb_weights` does.

    Args:
        model: on meta, neither sharded nor adapted; made with ``quantizer``.
        directory: its checkpoint, unquantized.
        out: where to; replaced if it is there.
        quantizer: of all packed matrices.
        dtype: of the weights before they are quantized, and of those that stay.
        device: this rank's; rows are quantized there.
        max_file_bytes: a file is full at this size.
        report: told ``(done_bytes, total_bytes)`` of what is written, after each target.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or is damaged.
        ExportError: see `save_bnb_weights`.
    """
    _check_no_stacks(model)
    weights = GivenWeights(open_checkpoint(model, directory), directory)
    save_bnb_weights(
        model, weights, out, quantizer=quantizer, dtype=dtype, device=device,
        max_file_bytes=max_file_bytes, report=report,
    )  # fmt: skip


def save_bnb_weights(
    model: CausalLM,
    weights: GivenWeights,
    out: Path,
    *,
    quantizer: BnbQuantizer,
    dtype: torch.dtype,
    device: torch.device,
    max_file_bytes: int,
    report: Callable[[int, int], Any],
) -> None:
    """Writes a model directory that ``AutoModelForCausalLM.from_pretrained`` reads.

    The tensors are those that transformers saves of the same checkpoint with ``load_in_4bit``, bit
    for bit, where it quantizes the same layers with blocks of 64.

    Ranks: all (collective); rank 0 writes.
    Memory: one matrix, packed, and the rank's rows of it; on rank 0 one unquantized tensor.

    Args:
        model: on meta, neither sharded nor adapted; made with ``quantizer``.
        weights: of the model.
        out: where to; replaced if it is there.
        quantizer: of all packed matrices.
        dtype: of the weights before they are quantized, and of those that stay.
        device: this rank's; rows are quantized there.
        max_file_bytes: a file is full at this size.
        report: told ``(done_bytes, total_bytes)`` of what is written, after each target.

    Raises:
        ExportError: experts are quantized, which transformers cannot read, or ``out`` cannot be
            written.
    """
    _check_no_stacks(model)
    groups = [
        _packed_group(name, target, weights, quantizer, dtype=dtype, device=device)
        if isinstance(target, PackedMatrix)
        else _plain_group(name, target, weights.tensors)
        for name, target in loading_targets(model).items()
    ]
    config = model.hf.config
    config.dtype = dtype
    config.quantization_config = quantization_config(
        quant_type=quantizer.quant_type,
        double_quant=quantizer.double_quant,
        dtype=dtype,
        unquantized=_plain_linears(model),
    )
    write_bnb_directory(
        groups, out, config=config, original=weights.original, max_file_bytes=max_file_bytes,
        report=report,
    )  # fmt: skip


def _check_no_stacks(model: CausalLM) -> None:
    targets = loading_targets(model)
    stacks = [name for name, target in targets.items() if isinstance(target, PackedExperts)]
    if stacks:
        raise ExportError(
            f"transformers cannot read quantized experts, and {len(stacks)} stacks of them are "
            f"(`{stacks[0]}`)",
            hint="add `experts` to `quantization.modules_to_not_convert`, or write fsdpq's own "
            "format",
        )


def _plain_linears(model: CausalLM) -> Sequence[str]:
    """Returns what transformers must not replace: plain linears, and the output head.

    All are named, since naming any takes away transformers' own default, the head.
    """
    return [
        checkpoint_name(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or module is model.head
    ]


def _plain_group(name: str, target: nn.Parameter, tensors: TensorRows) -> TensorGroup:
    def gather() -> Mapping[str, Tensor]:
        if rank() != 0:
            return {}
        rows = target.shape[0] if target.dim() else 1
        whole = row_reader(tensors, name, target, dtype=target.dtype, device=torch.device("cpu"))(
            0, rows
        )
        return {name: whole}

    return TensorGroup([name], target.nbytes, gather)


def _packed_group(
    name: str,
    target: PackedMatrix,
    weights: GivenWeights,
    quantizer: BnbQuantizer,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> TensorGroup:
    rows, columns = full_shape(target)
    shapes = quantizer.packed_shapes(rows, columns)
    parts = ["absmax", "quant_map", f"quant_state.bitsandbytes__{quantizer.quant_type}"]
    parts += ["nested_absmax", "nested_quant_map"] * quantizer.double_quant

    def gather() -> Mapping[str, Tensor]:
        shards = {part: _own_rows(shape, device) for part, shape in shapes.items()}
        read = row_reader(weights.tensors, name, target, dtype=dtype, device=device)
        quantizer.quantize_shards(read, (rows, columns), shards)
        whole = {
            part: all_gather_rows(shard.rows, shapes[part][0]).cpu()
            for part, shard in shards.items()
        }
        if rank() != 0:
            return {}
        weights.on_packed(name, whole)
        found = quantizer.library_parts(whole, (rows, columns), dtype)
        return {f"{name}.{part}" if part else name: tensor for part, tensor in found.items()}

    num_bytes = sum(height * width for height, width in shapes.values())
    return TensorGroup([name, *(f"{name}.{part}" for part in parts)], num_bytes, gather)


def _own_rows(shape: tuple[int, int], device: torch.device) -> Shard:
    start, stop = shard_range(shape[0], rank(), world_size())
    rows = torch.empty((stop - start, shape[1]), dtype=torch.uint8, device=device)
    return Shard(rows, start, stop, torch.distributed.group.WORLD if world_size() > 1 else None)
