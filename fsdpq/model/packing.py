"""Whether a model family keeps packed documents apart.

transformers builds a block-diagonal mask from position ids that restart, in
``masking_utils.find_packed_sequence_indices``, when no attention mask is given. That holds for
families that build their masks through ``create_causal_mask`` and its siblings and pass it the
position ids. Layers that are no attention (state space, linear attention) carry state across
documents, and ALiBi counts its distances by itself.

Flash attention has no mask. It takes the places where documents begin, which transformers reads
from the position ids of a single row (``modeling_flash_attention_utils._is_packed_sequence``), in
every layer anew, or is told. Families hand on one or both, or neither.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError
from fsdpq.model.structure import find_decoder_layers

ISOLATING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
KERNEL_CALL = "attention_interface"
"""What transformers' attention modules call the function of ``attn_implementation``."""

MASK_ARGUMENTS = {"config", "attention_mask", "past_key_values"}


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
    if not flash and not _masks_by_position(type(hf.base_model).forward):
        return "does not build its attention mask from position ids"
    return ""


def _hands_positions_on(layer: nn.Module) -> bool:
    """Returns whether a decoder layer's attention gets the position ids, and its kernel too.

    Each is a call with ``position_ids``, or with all that the caller was given and does not name.
    """
    kernels = {
        name: call for name, each in layer.named_modules() for call in _calls(each, KERNEL_CALL)
    }
    inner = [
        call
        for name in kernels
        for call in _calls(layer, f"self.{name}")
        if not _takes(layer, "position_ids") or "position_ids" in _argument_names(call)
    ]
    passed = [
        _argument_names(call) & {"position_ids", None} for call in (*kernels.values(), *inner)
    ]
    return bool(inner) and all(passed)


def _calls(module: nn.Module, function: str) -> list[ast.Call]:
    """Returns the calls of ``function`` in the forward of ``module``, None stands for ``**``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) == function]


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(inspect.unwrap(type(module).forward)).parameters


def _masks_by_position(forward: Callable[..., Any]) -> bool:
    """Returns whether every request for a mask in ``forward`` passes the position ids on.

    A request is a call of ``create_causal_mask`` or one of its siblings, or the dict of arguments
    for several of them. Falcon and OPT, for example, ask without.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    named = [_argument_names(node) for node in ast.walk(tree)]
    requests = [names for names in named if names >= MASK_ARGUMENTS]
    return bool(requests) and all("position_ids" in names for names in requests)


def _argument_names(node: ast.AST) -> set[Any]:
    if isinstance(node, ast.Call):
        return {keyword.arg for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return set()
