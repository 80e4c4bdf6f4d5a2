"""Causal attention of each packed document by itself, under ``attn_implementation: sdpa``.

Of packed rows transformers makes a mask of all pairs of tokens, ``(rows, 1, tokens, tokens)``, in
every micro-batch, and with a mask torch has no flash kernel to offer. Here the documents are cut
out instead and need no mask: time and memory grow with the squares of documents, not of rows, and
torch picks the kernel that it picks for rows which are not packed.

transformers hands a mask of four dimensions on as it is, from the model's forward to the attention
function (5.23, ``masking_utils._preprocess_mask_arguments``). So where documents begin travels in
the mask's place, in a shape and dtype that no other attention takes without an error. Anything else
in that place is a mask, and computed by transformers' own function.
https://huggingface.co/docs/transformers/en/attention_interface
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_document"
"""The function's name in transformers' registry."""

MAX_HEAD_DIM = 256
"""Of torch's flash kernels."""


def use_document_attention(hf: PreTrainedModel) -> None:
    """Makes the attention layers of ``hf``, built with ``sdpa``, compute documents by themselves.

    Nothing changes until they are given `document_starts` as their mask.
    """
    AttentionInterface.register(NAME, attend_documents)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)


def document_starts(position_ids: Tensor) -> Tensor:
    """Returns what stands in the mask's place, on the CPU: ``(rows, 1, 1, tokens + 1)``, int32.

    Per row it holds the places where documents begin, in order, and ``tokens`` from there on. One
    entry more than a mask of ``(rows, 1, 1, tokens)``, so that it cannot be taken for one.

    Args:
        position_ids: ``(rows, tokens)``, 0 at the start of every document and of the padding.
    """
    num_rows, width = position_ids.shape
    begins = position_ids.cpu() == 0
    rows, places = begins.nonzero(as_tuple=True)
    starts = torch.full((num_rows, width + 1), width, dtype=torch.int32)
    starts[rows, begins.cumsum(dim=1)[rows, places] - 1] = places.int()
    return starts[:, None, None, :]


def longest_document(starts: Tensor) -> int:
    """Returns the tokens of the longest document of `document_starts`."""
    return int(starts.diff().max())


def attend_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns what transformers' ``sdpa`` does, ``(rows, tokens, heads, head_dim)``, and None.

    Args:
        module: the attention layer.
        query: ``(rows, heads, tokens, head_dim)``.
        key: the same, maybe of fewer heads.
        value: as ``key``.
        attention_mask: `document_starts` of these rows, or a mask, or None for causal attention.
        **options: of ``sdpa_attention_forward``.

    Raises:
        ValueError: the starts belong to rows of another shape.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, tokens = query.shape[0], query.shape[2]
    if attention_mask.shape != (rows, 1, 1, tokens + 1) or key.shape[2] != tokens:
        shapes = f"{tuple(attention_mask.shape)} for queries {tuple(query.shape)}"
        raise ValueError(f"the starts of documents have the shape {shapes}")
    sizes = attention_mask.diff().flatten()
    lengths = tuple(sizes[sizes > 0].tolist())
    flat = Projected(*(_as_autocast(x).transpose(1, 2).flatten(0, 1) for x in (query, key, value)))
    if has_varlen_kernel(flat) and not options.get("dropout"):
        out = _attend_varlen(flat, lengths, options)
    else:
        # One split: slices would each fill a whole gradient with zeros in backward.
        documents = zip(*(x.split(lengths) for x in flat), strict=True)
        out = torch.cat([_attend_one(module, Projected(*each), options) for each in documents])
    return out.unflatten(0, (rows, tokens)), None


class Projected(NamedTuple):
    """Queries, keys and values, ``(tokens, heads, head_dim)``, of one document or many."""

    query: Tensor
    key: Tensor
    value: Tensor


def has_varlen_kernel(flat: Projected) -> bool:
    """Returns whether torch's flash kernel for documents of any lengths takes these tensors."""
    query = flat.query
    dtypes, head_dims = {x.dtype for x in flat}, {x.shape[-1] for x in flat}
    return (
        query.device.type == "cuda"
        and dtypes in ({torch.bfloat16}, {torch.float16})
        and len(head_dims) == 1
        and max(head_dims) <= MAX_HEAD_DIM
        and max(head_dims) % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _as_autocast(x: Tensor) -> Tensor:
    """Returns ``x`` in the dtype that autocast computes attention in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _attend_one(module: nn.Module, document: Projected, options: dict[str, Any]) -> Tensor:
    """Returns the attention of one document, ``(tokens, heads, head_dim)``."""
    query, key, value = (x.unsqueeze(0).transpose(1, 2) for x in document)
    mask = _window_mask(query.shape[2], options.get("sliding_window"), query.device)
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0].squeeze(0)


def _window_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Returns what a document longer than its window sees, ``(1, 1, tokens, tokens)``, or None."""
    if window is None or tokens <= window:
        return None
    places = torch.arange(tokens, device=device)
    distance = places[:, None] - places
    return ((distance >= 0) & (distance < window))[None, None]


def _attend_varlen(flat: Projected, lengths: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """Returns the attention of all documents in one kernel, ``(tokens, heads, head_dim)``."""
    bounds, longest = _bounds(lengths, flat.query.device), max(lengths)
    window = options.get("sliding_window")
    return varlen_attn(  # pyright: ignore[reportReturnType]
        *flat, bounds, bounds, longest, longest,
        scale=options.get("scaling"),
        window_size=(-1, 0) if window is None or longest <= window else (window - 1, 0),
        enable_gqa=flat.query.shape[1] != flat.key.shape[1],
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns where documents begin and the last one ends; all layers of a pass ask for it."""
    starts = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return starts.to(device)
