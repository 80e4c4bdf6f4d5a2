"""Whether a model family keeps packed documents apart.

transformers builds a block-diagonal mask from position ids that restart, in
``masking_utils.find_packed_sequence_indices``, when no attention mask is given. That holds for
families that build their masks through ``create_causal_mask`` and its siblings and pass it the
position ids. Layers that are no attention (state space, linear attention) carry state across
documents, and ALiBi counts its distances by itself.

Flash attention has no mask. It takes the places where documents begin, which transformers reads
from the position ids of a single row (``modeling_flash_attention_utils._is_packed_sequence``), in
every layer anew, or is told. Families hand on one or both, or neither.

``sdpa`` needs no mask of packed rows where documents are computed by themselves
(`fsdpq.model.document_attention`): in families that do nothing with a mask but hand it on to
transformers' attention functions. Families that ask for their mask without position ids, and take
one of four dimensions instead, are given it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from fsdpq.errors import CheckpointError
from fsdpq.model.structure import find_decoder_layers

ISOLATING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
KERNEL_CALL = "attention_interface"
"""What transformers' attention modules call the function of ``attn_implementation``."""

TAKE_A_MASK = ("falcon", "opt")
"""Families that ask for their mask without position ids and use one that they are given."""

MASK = "attention_mask"
MASK_ARGUMENTS = {"config", MASK, "past_key_values"}
MORE_THAN_CAUSAL = {"position_bias", "s_aux", "softcap"}
"""What some families hand to their attention function beside the mask."""


def check_packing_isolates(hf: PreTrainedModel) -> None:
    """Raises `CheckpointError` where documents packed into one row could see each other."""
    reason = _leak(hf)
    if reason:
        raise CheckpointError(
            f"`data.packing: best_fit`: `{type(hf).__name__}` {reason}: packed documents would see "
            "each other",
            hint="add `data.packing=none` to the command line",
        )


def document_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Returns where the documents of packed rows begin, as transformers passes it to its kernels.

    Args:
        position_ids: ``(1, tokens)``, 0 at the start of every document and of the padding.

    Returns:
        ``FlashAttentionKwargs``: bounds ``(documents + 1,)``, int32, and the longest document's
        tokens, each for queries and for keys.
    """
    starts = (position_ids[0] == 0).nonzero().reshape(-1)
    bounds = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def needs_document_mask(hf: PreTrainedModel) -> bool:
    """Returns whether packed rows need `document_mask` to be kept apart, and are by it."""
    config = hf.config.get_text_config()
    return (
        config.model_type in TAKE_A_MASK
        and config._attn_implementation in ("sdpa", "eager")
        and not getattr(config, "alibi", False)
        and not _masks_by_position(type(hf.base_model).forward)
    )


def document_mask(hf: PreTrainedModel, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask of packed rows that transformers would make, ``(rows, 1, tokens, tokens)``.

    Args:
        hf: the model, all of its layers with the same mask.
        position_ids: ``(rows, tokens)``, 0 at the start of every document and of the padding.
        dtype: of the hidden states; ``eager`` adds the mask to its scores.
    """
    hidden = torch.empty((*position_ids.shape, 0), dtype=dtype, device=position_ids.device)
    return create_causal_mask(  # pyright: ignore[reportReturnType]
        config=hf.config.get_text_config(),
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
        allow_is_causal_skip=False,
    )


def longest_alone(hf: PreTrainedModel) -> int:
    """Returns how long a document may be whose attention is computed by itself, 0 for not at all.

    By itself it is plainly causal, or within the sliding window that its layer tells the kernel. If
    layers do not tell, it must be no longer than the window.
    """
    config, forward = hf.config.get_text_config(), type(hf.base_model).forward
    layers = list({type(layer): layer for layer in find_decoder_layers(hf)}.values())
    alone = (
        config._attn_implementation == "sdpa"
        and not getattr(config, "use_bidirectional_attention", False)
        and _only_asks_for_masks(forward)
        and all(_hands_mask_to_kernel(layer) for layer in layers)
    )
    windows = [getattr(config, "attention_chunk_size", None)]
    if not (_makes_window_masks(forward) and all(_tells_window(layer) for layer in layers)):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if window), default=sys.maxsize) if alone else 0


def _leak(hf: PreTrainedModel) -> str:
    config = hf.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ISOLATING_LAYERS
    if others:
        return f"has layers of the type `{min(others)}`"
    if getattr(config, "alibi", False):
        return "has ALiBi positions"
    flash = config._attn_implementation == "flash_attention_2"
    if flash and not _hands_positions_on(find_decoder_layers(hf)[0]):
        return "does not hand position ids to flash attention"
    by_position = _masks_by_position(type(hf.base_model).forward) or needs_document_mask(hf)
    if not flash and not by_position:
        return "does not build its attention mask from position ids"
    return ""


def _hands_positions_on(layer: nn.Module) -> bool:
    """Returns whether a decoder layer's attention gets the position ids, and its kernel too.

    Each is a call with ``position_ids``, or with all that the caller was given and does not name.
    """
    kernels = {
        name: call
        for name, each in layer.named_modules()
        for call in _calls(type(each), KERNEL_CALL)
    }
    inner = [
        call
        for name in kernels
        for call in _calls(type(layer), f"self.{name}")
        if not _takes(layer, "position_ids") or "position_ids" in _argument_names(call)
    ]
    passed = [
        _argument_names(call) & {"position_ids", None} for call in (*kernels.values(), *inner)
    ]
    return bool(inner) and all(passed)


@functools.cache
def _calls(kind: type[nn.Module], function: str) -> list[ast.Call]:
    """Returns the calls of ``function`` in the forward of ``kind``, None stands for ``**``."""
    calls = [node for node in ast.walk(_tree(kind.forward)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == function]


def _hands_mask_to_kernel(layer: nn.Module) -> bool:
    """Returns whether the modules of a layer hand their mask to each other and to the kernel.

    And do nothing else with it, and hand the kernel nothing that is more than causal attention.
    """
    modules = {type(module): module for module in layer.modules()}
    kernels = [call for kind in modules for call in _calls(kind, KERNEL_CALL)]
    given = [node for kind in modules for node in _readers(kind.forward)]
    functions = {
        f"self.{name}" for module in modules.values() for name, _ in module.named_modules()
    }
    return (
        bool(kernels)
        and all(call in given for call in kernels)
        and not any(_argument_names(call) & MORE_THAN_CAUSAL for call in kernels)
        and all(_function(node) in functions | {KERNEL_CALL} for node in given)
    )


def _tells_window(layer: nn.Module) -> bool:
    kinds = {type(module) for module in layer.modules()}
    kernels = [call for kind in kinds for call in _calls(kind, KERNEL_CALL)]
    return all("sliding_window" in _argument_names(call) for call in kernels)


def _makes_window_masks(forward: Callable[..., Any]) -> bool:
    """Returns whether ``forward`` applies the window that layers tell: OLMoE's tell, and it not."""
    names = {node.id for node in ast.walk(_tree(forward)) if isinstance(node, ast.Name)}
    return "create_sliding_window_causal_mask" in names


def _only_asks_for_masks(forward: Callable[..., Any]) -> bool:
    """Returns whether ``forward`` hands its mask to the functions that make masks, no others."""
    given = _readers(forward)
    return any(_argument_names(node) >= MASK_ARGUMENTS for node in given) and all(
        _argument_names(node) >= MASK_ARGUMENTS
        or _function(node) == "isinstance"
        or isinstance(node, ast.NamedExpr)
        for node in given
    )


@functools.cache
def _readers(forward: Callable[..., Any]) -> list[ast.AST]:
    """Returns what the mask stands in, wherever ``forward`` reads it: calls, dicts, and others."""
    parents: dict[ast.AST, ast.AST] = {}
    for node in ast.walk(_tree(forward)):
        parents |= dict.fromkeys(ast.iter_child_nodes(node), node)
    direct = [up for node, up in parents.items() if isinstance(node, ast.Name) and node.id == MASK]
    return [parents[node] if isinstance(node, ast.keyword) else node for node in direct]


def _function(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


@functools.cache
def _tree(forward: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(inspect.unwrap(type(module).forward)).parameters


def _masks_by_position(forward: Callable[..., Any]) -> bool:
    """Returns whether every request for a mask in ``forward`` passes the position ids on.

    A request is a call of ``create_causal_mask`` or one of its siblings, or the dict of arguments
    for several of them. Falcon and OPT, for example, ask without.
    """
    named = [_argument_names(node) for node in ast.walk(_tree(forward))]
    requests = [names for names in named if names >= MASK_ARGUMENTS]
    return bool(requests) and all("position_ids" in names for names in requests)


def _argument_names(node: ast.AST) -> set[Any]:
    if isinstance(node, ast.Call):
        return {keyword.arg for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return set()
