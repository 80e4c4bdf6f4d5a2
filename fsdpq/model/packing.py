"""Whether a model family keeps packed documents apart.

transformers builds a block-diagonal mask from position ids that restart, in
``masking_utils.find_packed_sequence_indices``, when no attention mask is given. That holds for
families that build their masks through ``create_causal_mask`` and its siblings and pass it the
position ids. Layers that are no attention (state space, linear attention) carry state across
documents, and ALiBi counts its distances by itself.
"""

from __future__ import annotations

import inspect

from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError

ISOLATING_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


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
    forward = type(hf.base_model).forward
    source = inspect.getsource(forward)
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    if not takes_positions or "create_causal_mask" not in source:
        return "does not build its attention mask from position ids"
    return ""
