"""LoRA: low-rank matrices beside frozen linear layers (https://arxiv.org/abs/2106.09685).

Names, initialisation and scaling are PEFT's, so that PEFT loads what is trained here. Weights are
fp32 masters, cast to the input's dtype in forward. Initial values come from a generator seeded by
the recipe's seed and the parameter's name: the same for any rank and any world size, because
``fully_shard`` never broadcasts and ranks with different adapters train on without complaint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsdpq.adapter.saved_modules import unfreeze_modules
from fsdpq.adapter.starts import draw_a, factor_base
from fsdpq.dist import (
    assign_own_rows,
    broadcast_from_first,
    gather_numbers,
    gather_whole,
    own_shard,
    rank,
)
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
        initial: where the base was left ``W - s B A``, this rank's rows of that A and B by the
            names of the Parameters; else empty.
    """

    peft_names: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
    }

    fp32_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Module, options: LoraOptions) -> None:
        super().__init__()
        self.base = base
        self.options = options
        self.scaling = options.scaling
        self.dropout = options.dropout
        self.initial: dict[str, Tensor] = {}
        device = next(base.parameters()).device
        out_features, in_features = int(base.out_features), int(base.in_features)  # pyright: ignore[reportArgumentType]
        self.lora_A = nn.Parameter(torch.empty(options.rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, options.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x``."""
        x, shape = x.flatten(0, -2), x.shape[:-1]
        dropped = functional.dropout(x, self.dropout, self.training)
        low_rank = functional.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling
        addition = functional.linear(low_rank, self.lora_B.to(x.dtype))
        # The base comes last: a checkpointed layer that ends here need not compute it again.
        return self._add_base(addition, x).unflatten(0, shape)

    def _add_base(self, addition: Tensor, x: Tensor) -> Tensor:
        """Returns ``addition`` plus the base's output for ``x``, ``(tokens, out_features)``."""
        if isinstance(self.base, nn.Linear):
            product = torch.addmm(addition, x, self.base.weight.T)
            return product if self.base.bias is None else product + self.base.bias
        return self.base.add_to(addition, x)  # pyright: ignore[reportCallIssue]

    def init_weights(self, name: str, *, seed: int, device: torch.device) -> Tensor:
        """Fills this rank's rows as PEFT does, and takes from the base what ``init`` says.

        Ranks: all (collective).
        Memory: one adapter matrix; about four base matrices in fp32 for ``pissa`` and ``olora``.

        Returns:
            The whole A, on the host.
        """
        init = self.options.init
        if init in ("pissa", "olora"):
            return self._split_base(device)
        whole = draw_a(f"{name}.lora_A", tuple(self.lora_A.shape), seed=seed, init=init)
        assign_own_rows(self.lora_A, whole)
        assign_own_rows(self.lora_B, torch.zeros(self.lora_B.shape))
        return whole

    def _split_base(self, device: torch.device) -> Tensor:
        """Moves a part of the base into A and B; returns the whole A, on the host."""
        weight: Tensor = self.base.weight  # pyright: ignore[reportAssignmentType]
        whole = gather_whole(weight).to(device=device, dtype=torch.float32)
        a, b = (torch.empty(p.shape, device=device) for p in (self.lora_A, self.lora_B))
        if rank() == 0:
            factors = factor_base(
                whole, rank=a.shape[0], scaling=self.scaling, init=self.options.init
            )
            for target, factor in zip((a, b), factors, strict=True):
                target.copy_(factor)
        # Two devices need not round a decomposition alike.
        broadcast_from_first(a)
        broadcast_from_first(b)
        shard = own_shard(weight)
        own = slice(shard.start, shard.stop)
        shard.rows.copy_(whole[own] - (self.scaling * b[own]) @ a)
        for name, value in (("lora_A", a), ("lora_B", b)):
            parameter: nn.Parameter = getattr(self, name)
            assign_own_rows(parameter, value)
            self.initial[name] = own_shard(parameter).rows.clone()
        return a.cpu()

    @torch.no_grad()
    def restore_initial(self, initial: Mapping[str, Tensor]) -> None:
        """Takes the first values of a checkpoint, and leaves the base ``W - s B A`` by those.

        The same decomposition on another machine may differ in rounding or in the signs of its
        directions. Where it does not, the base stays as it is, bit for bit.

        Ranks: all (collective).
        Memory: both adapter matrices, whole, twice.
        """
        own = {name: self.initial[name].clone() for name in initial}
        for name, rows in initial.items():
            self.initial[name].copy_(rows)
        differs = any(not own[name].equal(self.initial[name]) for name in own)
        if not any(gather_numbers(float(differs))):
            return
        weight: Tensor = self.base.weight  # pyright: ignore[reportAssignmentType]
        shard = own_shard(weight)
        rows = shard.rows.float()
        for values, sign in ((own, 1.0), (self.initial, -1.0)):
            a = own_shard(self.lora_A).gather(values["lora_A"], self.lora_A.shape[0])
            b = own_shard(self.lora_B).gather(values["lora_B"], self.lora_B.shape[0])
            part = (self.scaling * b[shard.start : shard.stop].float()) @ a.float()
            rows += sign * part.to(rows.device)
        shard.rows.copy_(rows)


class LoraAdapter(Adapter):
    """Puts `LoraLinear` around the target layers; see `fsdpq.protocols.Adapter`."""

    layer_class: type[LoraLinear] = LoraLinear

    def __init__(self, options: LoraOptions) -> None:
        self.options = options

    def unfreeze_base(
        self,
        hf: nn.Module,
        layers: nn.ModuleList,  # noqa: ARG002
        *,
        sources: Sequence[int],  # noqa: ARG002
        master_dtype: torch.dtype,
    ) -> None:
        """Makes ``modules_to_save`` trainable, in place."""
        unfreeze_modules(hf, self.options.modules_to_save, master_dtype=master_dtype)

    def apply_adapter(
        self, layers: nn.ModuleList, *, is_linear: Callable[[nn.Module], bool], prefix: str
    ) -> None:
        """Wraps the target layers in place; those of ``modules_to_save`` are none.

        Raises:
            CheckpointError: no layer is a target, or one is smaller than the rank.
        """
        targets = [
            (parent, attribute, child)
            for parent_name, parent in list(layers.named_modules())
            for attribute, child in list(parent.named_children())
            if is_linear(child)
            and not any(parameter.requires_grad for parameter in child.parameters())
            and self.options.is_target(f"{prefix}{parent_name}.{attribute}")
        ]
        if not targets:
            raise CheckpointError(
                f"no layer of the model matches adapter.target_modules "
                f"({self.options.target_modules})",
                hint="`adapter.target_modules=all-linear` takes every linear layer",
            )
        for parent, attribute, child in targets:
            self._check_rank(attribute, child)
            setattr(parent, attribute, self.layer_class(child, self.options))

    def _check_rank(self, name: str, linear: nn.Module) -> None:
        smaller = min(int(linear.out_features), int(linear.in_features))  # pyright: ignore[reportArgumentType]
        if self.options.init in ("pissa", "olora") and self.options.rank > smaller:
            raise CheckpointError(
                f"adapter.init={self.options.init} takes {self.options.rank} directions from "
                f"`{name}`, which has {smaller}",
                hint=f"`adapter.rank={smaller}` or less",
            )

    def init_adapter(
        self,
        model: nn.Module,
        *,
        seed: int,
        dtype: torch.dtype,  # noqa: ARG002
        device: torch.device,
    ) -> str:
        """Fills this rank's rows; returns a hash of the matrices A.

        Ranks: all (collective).
        Memory: peak is one whole adapter matrix; see `LoraLinear.init_weights` for others.
        """
        digest = hashlib.sha256()
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                whole = module.init_weights(name, seed=seed, device=device)
                digest.update(name.encode() + whole.numpy().tobytes())
        return digest.hexdigest()
