"""Fills a sharded model from safetensors, row slice by row slice.

Every rank reads only the rows it owns, quantizes them on its device and keeps its shard: no rank,
on GPU or host, ever holds the model. All ranks walk the modules in the same order, because double
quantization gathers the scales of each matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsdpq.dist import Shard, own_shard, placement, shard_range
from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.checkpoint_files import CheckpointFiles, to_device
from fsdpq.model.checkpoint_names import ModelTensors
from fsdpq.model.expansion import source_name
from fsdpq.model.quantized_experts import PackedExperts
from fsdpq.model.quantized_linear import PackedMatrix, packed_parameter_ids
from fsdpq.protocols import BASE, RowReader

COPY_ROWS_BYTES = 16 << 20
"""Rows of an unquantized tensor are copied in pieces of about this size."""


def load_base(
    model: CausalLM,
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shards_on_host: bool = False,
    report: Callable[[int, int], Any],
) -> None:
    """Fills every parameter of the base and buffer of a sharded meta model, in place.

    Ranks: all (collective).
    Memory: the rank's shards plus about the rank's rows of the largest tensor.

    Args:
        model: after ``fully_shard``, on meta; an adapter's parameters are allocated, not filled.
        directory: the checkpoint.
        dtype: what weights are cast to before they are quantized or kept.
        device: this rank's device; rows are quantized and buffers live there.
        shards_on_host: whether FSDP keeps the shards in host memory.
        report: told ``(done_bytes, total_bytes)`` of this rank after each tensor.

    Raises:
        CheckpointError: names or shapes do not fit, or a file is damaged; nothing is loaded then.
    """
    tensors = open_checkpoint(model, directory)
    allocate(model, torch.device("cpu") if shards_on_host else device, buffers=device)
    recompute_buffers(model)
    targets = loading_targets(model)  # only now: `to_empty` made new buffers
    total = sum(_own_weights(target) for target in targets.values()) * dtype.itemsize
    done = 0
    for name, target in targets.items():
        read = _row_reader(tensors, source_name(model, name), target, dtype=dtype, device=device)
        if isinstance(target, PackedMatrix):
            shape = (target.out_features, target.in_features)
            target.quantizer.quantize_shards(read, shape, _packed_shards(target))
        else:
            _copy_rows(read, own_shard(target))
        done += _own_weights(target) * dtype.itemsize
        report(done, total)


def open_checkpoint(model: CausalLM, directory: Path) -> ModelTensors:
    """Returns the checkpoint's tensors, by the names of `source_name`, after checking them.

    Raises:
        CheckpointError: names or shapes do not fit, or a file is damaged.
    """
    targets = loading_targets(model)
    shapes = {source_name(model, n): full_shape(target) for n, target in targets.items()}
    ignored = {source_name(model, name) for name in _tied_names(model, targets)}
    return ModelTensors(CheckpointFiles(directory), model.hf, shapes, ignored=ignored)


def load_trained_base(model: CausalLM, directory: Path) -> None:
    """Fills the trained parameters of the base from a checkpoint of the whole model, in place.

    Args:
        model: sharded and loaded.
        directory: a checkpoint with as many layers as the model has.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file is damaged.
    """
    targets = loading_targets(model)
    shapes = {name: full_shape(target) for name, target in targets.items()}
    files, ignored = CheckpointFiles(directory), _tied_names(model, targets)
    tensors = ModelTensors(files, model.hf, shapes, ignored=ignored)
    for name, target in targets.items():
        if isinstance(target, nn.Parameter) and target.requires_grad:
            device = own_shard(target).rows.device
            read = _row_reader(tensors, name, target, dtype=target.dtype, device=device)
            _copy_rows(read, own_shard(target))


def allocate(model: CausalLM, device: torch.device, *, buffers: torch.device) -> None:
    """Gives a meta model memory without content, in place: parameters on ``device``."""
    model.to_empty(device=device)
    if buffers == device:
        return
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            empty = torch.empty_like(buffer, device=buffers)
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, empty, persistent=persistent)


def checkpoint_name(name: str) -> str:
    """Returns the checkpoint's name of a parameter or module of a `CausalLM`.

    The wrapper's ``hf.`` in front and an adapter's ``base`` in between are ours.
    """
    parts = name.removeprefix("hf.").split(".")
    return ".".join(part for part in parts if part != BASE)


def recompute_buffers(model: CausalLM) -> None:
    """Fills buffers that no checkpoint holds (RoPE ``inv_freq``), in their own dtype.

    transformers recomputes them in ``_init_weights``; weights that it touches on the way are loaded
    afterwards.

    Raises:
        CheckpointError: a family does not recompute one of them; names it.
    """
    for name, module in model.hf.named_modules():
        buffers = {n: getattr(module, n) for n in module._non_persistent_buffers_set}
        floating = {n: b for n, b in buffers.items() if b is not None and b.is_floating_point()}
        if not floating:
            continue
        for buffer in floating.values():
            buffer.fill_(float("nan"))
        model.hf._init_weights(module)
        left = [n for n in floating if getattr(module, n).isnan().any()]
        if left:
            raise CheckpointError(
                f"`{type(model.hf).__name__}` does not recompute `{name}.{left[0]}`, which is in "
                "no checkpoint",
                hint="train a model of another family",
            )


LoadingTarget = PackedMatrix | nn.Parameter


def loading_targets(model: CausalLM) -> dict[str, LoadingTarget]:
    """Maps names of transformers to what of the base they fill; tied weights once."""
    packed = packed_parameter_ids(model)
    targets: dict[str, LoadingTarget] = {
        checkpoint_name(name if isinstance(module, PackedExperts) else f"{name}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, PackedMatrix)
    }
    for name, parameter in model.named_parameters():
        parent = model.get_submodule(name.rpartition(".")[0])
        is_adapter = hasattr(parent, BASE)
        if not is_adapter and id(parameter) not in packed:
            targets[checkpoint_name(name)] = parameter
    for name, buffer in model.named_buffers():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
            targets[checkpoint_name(name)] = buffer  # pyright: ignore[reportArgumentType]
    return targets


def _tied_names(model: CausalLM, targets: dict[str, LoadingTarget]) -> set[str]:
    names = {checkpoint_name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    return names - targets.keys()


def full_shape(target: LoadingTarget) -> tuple[int, ...]:
    """Shape of the tensor in the checkpoint that fills ``target``."""
    if isinstance(target, PackedExperts):
        rows = target.rows_per_expert
        return (target.out_features // rows, rows, target.in_features)
    return _sharded_shape(target)


def _sharded_shape(target: LoadingTarget) -> tuple[int, ...]:
    if isinstance(target, PackedMatrix):
        return (target.out_features, target.in_features)
    return tuple(target.shape)


def _own_weights(target: LoadingTarget) -> int:
    shape = _sharded_shape(target)
    tensor = target if isinstance(target, Tensor) else getattr(target, target.packed_names[0])
    place = placement(tensor)
    start, stop = shard_range(shape[0] if shape else 1, place.index, place.size)
    return (stop - start) * torch.Size(shape[1:]).numel()


def _packed_shards(module: PackedMatrix) -> dict[str, Shard]:
    return {name: own_shard(getattr(module, name)) for name in module.packed_names}


def _row_reader(
    tensors: ModelTensors,
    name: str,
    target: LoadingTarget,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> RowReader:
    """Reads rows in ``dtype`` where they are quantized, else in the precision of the target."""
    packed = isinstance(target, PackedMatrix)
    read_dtype = dtype if packed else target.dtype
    read_rows = tensors.read_matrix_rows if packed else tensors.read_rows

    def read(start: int, stop: int) -> Tensor:
        return to_device(read_rows(name, start, stop), dtype=read_dtype, device=device)

    return read


def _copy_rows(read: RowReader, shard: Shard) -> None:
    if shard.rows.dim() == 0:
        shard.rows.copy_(read(0, 1))
        return
    row_bytes = max(1, shard.rows[:1].nbytes)
    step = max(1, min(COPY_ROWS_BYTES // row_bytes, (shard.stop - shard.start) // 4))
    for start in range(shard.start, shard.stop, step):
        stop = min(start + step, shard.stop)
        shard.rows[start - shard.start : stop - shard.start] = read(start, stop)
