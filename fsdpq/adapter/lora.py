"""LoRA: low-rank matrices beside frozen linear layers (https://arxiv.org/abs/2106.09685).

Names, initialisation and scaling are PEFT's, so that PEFT loads what is trained here. Weights are
fp32 masters, cast to the input's dtype in forward. Initial values come from a generator seeded by
the recipe's seed and the parameter's name: the same for any rank and any world size, because
``fully_shard`` never broadcasts and ranks with different adapters train on without complaint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsdpq.dist import assign_own_rows
from fsdpq.errors import CheckpointError
from fsdpq.protocols import Adapter
from fsdpq.recipe.sections.adapter import LoraOptions


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank addition.

    Args:
        base: the frozen layer, with ``in_features`` and ``out_features``.
        options: rank, scaling and dropout.

    Attributes:
        base: the frozen layer (`fsdpq.protocols.BASE`).
        lora_A: ``(rank, in_features)``, fp32.
        lora_B: ``(out_features, rank)``, fp32.
    """

    peft_names: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
    }

    def __init__(self, base: nn.Module, options: LoraOptions) -> None:
        super().__init__()
        self.base = base
        self.scaling = options.scaling
        self.dropout = options.dropout
        device = next(base.parameters()).device
        out_features, in_features = int(base.out_features), int(base.in_features)  # pyright: ignore[reportArgumentType]
        self.lora_A = nn.Parameter(torch.empty(options.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, options.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x``."""
        dropped = functional.dropout(x, self.dropout, self.training)
        low_rank = functional.linear(dropped, self.lora_A.to(x.dtype))
        addition = functional.linear(low_rank, self.lora_B.to(x.dtype))
        return self.base(x) + addition * self.scaling

    def init_weights(self, name: str, *, seed: int) -> Tensor:
        """Fills this rank's rows: A uniform as PEFT has it, B zero.

        Returns:
            The whole A.
        """
        whole = _initial_matrix(f"{name}.lora_A", tuple(self.lora_A.shape), seed)
        assign_own_rows(self.lora_A, whole)
        assign_own_rows(self.lora_B, torch.zeros(self.lora_B.shape))
        return whole


class LoraAdapter(Adapter):
    """Puts `LoraLinear` around the target layers; see `fsdpq.protocols.Adapter`."""

    layer_class: type[LoraLinear] = LoraLinear

    def __init__(self, options: LoraOptions) -> None:
        self.options = options

    def apply_adapter(
        self, layers: nn.ModuleList, *, is_linear: Callable[[nn.Module], bool]
    ) -> None:
        """Wraps the target layers in place.

        Raises:
            CheckpointError: no layer is a target.
        """
        targets = [
            (parent, attribute, child)
            for parent_name, parent in list(layers.named_modules())
            for attribute, child in list(parent.named_children())
            if is_linear(child) and self.options.is_target(f"{parent_name}.{attribute}")
        ]
        if not targets:
            raise CheckpointError(
                f"no layer of the model matches adapter.target_modules "
                f"({self.options.target_modules})",
                hint="`adapter.target_modules=all-linear` takes every linear layer",
            )
        for parent, attribute, child in targets:
            setattr(parent, attribute, self.layer_class(child, self.options))

    def init_adapter(
        self,
        model: nn.Module,
        *,
        seed: int,
        dtype: torch.dtype,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
    ) -> str:
        """Fills this rank's rows; returns a hash of the whole adapter.

        Memory: peak is one whole adapter matrix.
        """
        digest = hashlib.sha256()
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                whole = module.init_weights(name, seed=seed)
                digest.update(name.encode() + whole.numpy().tobytes())
        return digest.hexdigest()


def _initial_matrix(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Kaiming uniform with a = sqrt(5), as ``peft.tuners.lora.layer.reset_lora_parameters``."""
    own = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(own, "big") >> 1)
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
