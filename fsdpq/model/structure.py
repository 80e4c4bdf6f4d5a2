"""Finds the parts of a decoder-only model by structure, never by class names.

What counts: the one ``nn.ModuleList`` with as many entries as the config has hidden layers, the
input embedding and the output embedding as transformers' own accessors give them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the list of decoder layers.

    Raises:
        CheckpointError: there is not exactly one such list; names what was looked for.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    outermost = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise CheckpointError(
            f"cannot find the decoder layers of `{type(model).__name__}`: looked for one "
            f"`nn.ModuleList` of {num_layers} layers (`num_hidden_layers`), found "
            f"{len(outermost)}: {', '.join(outermost) or 'none'}",
            hint="only decoder-only language models of transformers can be trained",
        )
    return found[outermost[0]]


def named_linears(layers: nn.ModuleList) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """Yields every ``nn.Linear`` inside the decoder layers.

    Yields:
        Its name below ``layers`` (``0.self_attn.q_proj``), its parent module, its attribute name
        there, and the linear itself.
    """
    for parent_name, parent in list(layers.named_modules()):
        for attribute, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                yield f"{parent_name}.{attribute}".lstrip("."), parent, attribute, child


def matches_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether the last parts of a dotted name are one of ``suffixes`` (``mlp.down_proj``)."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
