"""Full finetuning: every weight of the base is trained, and nothing is added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fsdpq.adapter.masters import make_trainable
from fsdpq.protocols import Adapter
from fsdpq.recipe.sections.adapter import NoAdapterOptions


class FullFinetuning(Adapter):
    """Trains the base itself; see `fsdpq.protocols.Adapter`."""

    trains_base = True

    def __init__(self, options: NoAdapterOptions) -> None:
        self.options = options

    def unfreeze_base(
        self,
        hf: nn.Module,
        layers: nn.ModuleList,  # noqa: ARG002 - embedding, head and last norm are trained too
        *,
        sources: Sequence[int],  # noqa: ARG002 - no layer is new
        master_dtype: torch.dtype,
    ) -> None:
        """Makes every parameter trainable, in place; tied ones stay tied."""
        for parameter in hf.parameters():
            make_trainable(parameter, master_dtype=master_dtype)
