"""LLaMA Pro: new decoder layers that start as identities (https://arxiv.org/abs/2401.02415).

The layers are split evenly into groups, and a copy of the last layer of each group follows it. In
a copy, the linear layers that write to the residual stream start at zero, stay unquantized and are
all that is trained; so the expanded model first computes what the original does. Copies are read
from the original's checkpoint: no expanded checkpoint is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fsdpq.adapter.masters import make_trainable
from fsdpq.adapter.residual import find_residual_linears
from fsdpq.dist import own_shard
from fsdpq.plan.costs.expansion import layer_sources
from fsdpq.protocols import Adapter
from fsdpq.recipe.sections.adapter import LlamaProOptions


class LlamaProAdapter(Adapter):
    """Expands the model by identity layers; see `fsdpq.protocols.Adapter`."""

    trains_base = True

    def __init__(self, options: LlamaProOptions) -> None:
        self.options = options

    def layer_sources(self, num_layers: int) -> tuple[int, ...]:
        """Returns the base's layer of each layer: ``(0, 1, 1, 2, 3, 3)`` for 2 new ones in 4.

        Raises:
            RecipeError: the new layers cannot be spread evenly.
        """
        return layer_sources(self.options, num_layers)

    def unfreeze_base(
        self,
        hf: nn.Module,
        layers: nn.ModuleList,
        *,
        sources: Sequence[int],
        master_dtype: torch.dtype,
    ) -> None:
        """Makes the new layers' output projections trainable, in place."""
        names = find_residual_linears(hf, layers)
        for index, layer in enumerate(layers):
            if index > 0 and sources[index] == sources[index - 1]:
                for name in names:
                    for parameter in layer.get_submodule(name).parameters():
                        make_trainable(parameter, master_dtype=master_dtype)

    def init_adapter(
        self,
        model: nn.Module,
        *,
        seed: int,  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
    ) -> str:
        """Sets the trained weights to zero, in place."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                own_shard(parameter).rows.zero_()
        return ""
