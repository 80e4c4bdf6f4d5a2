"""Whether a model family keeps packed documents apart.

transformers builds a block-diagonal mask from position ids that restart, in
``masking_utils.find_packed_sequence_indices``, when no attention mask is given. That holds for
families that build their masks through ``create_causal_mask`` and its siblings and pass it the
position ids. Layers that are no attention (state space, linear attention) carry state across
documents, and ALiBi counts its distances by itself.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError

ISOLATING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
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


def _leak(hf: PreTrainedModel) -> str:
    config = hf.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ISOLATING_LAYERS
    if others:
        return f"has layers of the type `{min(others)}`"
    if getattr(config, "alibi", False):
        return "has ALiBi positions"
    if not _masks_by_position(type(hf.base_model).forward):
        return "does not build its attention mask from position ids"
    return ""


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
