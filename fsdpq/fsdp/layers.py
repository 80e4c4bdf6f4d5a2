"""How a decoder layer runs: recomputed in backward, in chunks of the micro-batch, or plainly.

A layer's class gets `RunsInChunks` in front of it, as FSDP2 puts ``FSDPModule`` there: parameter
names stay, and FSDP's hooks stay outside, so that a group is gathered once for all chunks of a
pass. Each chunk is checkpointed by itself: memory is that of one chunk. The loop splits rows, so
attention, dropout and losses see what they would see without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsdpq.fsdp.activations import HostActivations

OF_HEADS = "position_bias"
"""MPT's ALiBi, ``(heads, 1, tokens)``: shared by all rows, whatever their number."""

OF_ROWS_AND_HEADS = "alibi"
"""Bloom's and Falcon's, ``(rows * heads, 1, tokens)``."""


@dataclass(frozen=True)
class LayerRun:
    """How one layer runs.

    Attributes:
        recompute: keep only the layer's input and compute the layer again in backward.
        num_chunks: parts of the micro-batch that run after each other.
        host: keeps the checkpointed inputs, None where they stay on the device.
        is_last: no layer after it is recomputed, so backward needs its input first of all.
        is_trained: it holds trained weights. A frozen layer below all trained ones is not part of
            backward: there is nothing to keep for it.
    """

    recompute: bool
    num_chunks: int
    host: HostActivations | None
    is_last: bool = False
    is_trained: bool = True


class RunsInChunks(nn.Module):
    """What is put in front of a decoder layer's class."""

    layer_run: LayerRun

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer over chunks of ``hidden``, ``(rows, tokens, hidden)``."""
        run, num_rows = self.layer_run, hidden.shape[0]
        plain = cast("Callable[..., Any]", super().forward)
        if kwargs.get("past_key_values") is not None:
            return plain(hidden, *args, **kwargs)  # generation: the cache belongs to all rows
        in_backward = torch.is_grad_enabled() and (run.is_trained or hidden.requires_grad)
        recompute = run.recompute and self.training and in_backward
        num_chunks = min(run.num_chunks, num_rows)
        # One split: slices would each fill a whole gradient with zeros in backward.
        sizes = [chunk.shape[0] for chunk in hidden.detach().tensor_split(num_chunks)]
        outputs: list[Any] = []
        for index, rows in enumerate(hidden.split(sizes)):
            part = functools.partial(_rows_of, num_rows=num_rows, chunk=(index, num_chunks))
            own_kwargs = {key: part(value, name=key) for key, value in kwargs.items()}
            function = functools.partial(plain, **own_kwargs)
            own_args = [rows, *(part(value) for value in args)]
            if recompute:
                with run.host.saving(stays=run.is_last) if run.host else nullcontext():
                    outputs.append(checkpoint(function, *own_args, use_reentrant=False))
            else:
                outputs.append(function(*own_args))
        return _join(outputs)


def apply_layer_runs(
    layers: Sequence[nn.Module],
    *,
    checkpointing: str,
    num_chunks: int,
    host: HostActivations | None,
) -> None:
    """Makes decoder layers run as asked, in place; before ``fully_shard``.

    Args:
        layers: decoder layers in order.
        checkpointing: ``full``, ``selective`` (every second layer, from the first) or ``none``.
        num_chunks: parts of a micro-batch.
        host: keeps checkpointed inputs in host memory, None for the device. That of the last such
            layer stays on the device, where backward needs it at once.
    """
    step = {"full": 1, "selective": 2}.get(checkpointing)
    recomputed = range(0) if step is None else range(0, len(layers), step)
    for index, layer in enumerate(layers):
        recompute = index in recomputed
        if not recompute and num_chunks == 1:
            continue
        layer.__class__ = _chunked_class(type(layer))
        layer.layer_run = LayerRun(  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            recompute,
            num_chunks,
            host,
            is_last=recompute and index == recomputed[-1],
            is_trained=any(parameter.requires_grad for parameter in layer.parameters()),
        )


@functools.cache
def _chunked_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns one class for all layers of a kind: compiled graphs are shared by class."""
    return type(f"Chunked{kind.__name__}", (RunsInChunks, kind), {})


def _rows_of(value: Any, *, num_rows: int, chunk: tuple[int, int], name: str = "") -> Any:
    """Returns a chunk's rows of what has rows (masks, positions); anything else as it is."""
    index, num_chunks = chunk
    if num_chunks == 1 or name == OF_HEADS:
        return value
    if isinstance(value, Tensor) and name == OF_ROWS_AND_HEADS:
        return value.unflatten(0, (num_rows, -1)).tensor_split(num_chunks)[index].flatten(0, 1)
    if isinstance(value, Tensor):
        # One dimension alone is positions of tokens, shared by all rows.
        by_row = value.dim() >= 2 and value.shape[0] == num_rows
        return value.tensor_split(num_chunks)[index] if by_row else value
    if isinstance(value, tuple | list):
        parts = [_rows_of(item, num_rows=num_rows, chunk=chunk) for item in value]
        return type(value)(parts)
    return value


def _join(outputs: list[Any]) -> Any:
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if first is None:  # beside the hidden states: attention weights that nobody asked for
        return None
    if isinstance(first, tuple):
        return tuple(_join(list(parts)) for parts in zip(*outputs, strict=True))
    raise TypeError(
        f"a decoder layer returns `{type(first).__name__}`, which `training.layer_chunks` cannot "
        "join: use training.layer_chunks=1"
    )
