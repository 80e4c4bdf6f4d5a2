"""DoRA: LoRA that trains each output row's magnitude apart (https://arxiv.org/abs/2402.09353).

``y = m / ||W + s B A|| * (W x + s B A x) + bias``, the norm taken over each row and treated as a
constant in the backward pass (section 4.3 of the paper). Dropout d in training is as PEFT has it:
what DoRA changes sees the dropped input, at the price of twice the tokens in the base's product:
``y = W x + m / ||W + s B A|| * (W + s B A) d(x) - W d(x) + bias``. It is added up as
``W x + s B A d(x) + (m / ||W + s B A|| - 1) * (W + s B A) d(x)``, the small parts first.

PEFT makes ``W + s B A`` whole in every forward to take its norm. Here it never exists, because

    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s b_i (W A^T)_i + s^2 b_i (A A^T) b_i^T

where ``||w_i||`` is measured once after loading, ``A A^T`` is ``rank x rank``, and ``W A^T`` comes
from the one product that the layer makes anyway: the rows of A ride along as ``rank`` more tokens.
The base is dequantized as often as LoRA dequantizes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsdpq.adapter.lora import LoraAdapter, LoraLinear
from fsdpq.adapter.saved_modules import KEY
from fsdpq.dist import gather_whole, own_shard
from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.sections.adapter import LoraOptions

NORM_CHUNK_WEIGHTS = 1 << 22
"""Weights whose squares exist in fp32 at once while row norms are taken."""


class DoraLinear(LoraLinear):
    """A frozen linear layer with a trainable low-rank addition and trainable row magnitudes.

    Attributes:
        magnitude: ``m``, ``(out_features,)``, fp32; starts as the row norms of the base.
        base_norm: row norms of the (dequantized) base, ``(out_features,)``, fp32, frozen.
    """

    peft_names: ClassVar[Mapping[str, str]] = {
        **LoraLinear.peft_names,
        "magnitude": "lora_magnitude_vector",
    }

    def __init__(self, base: nn.Module, options: LoraOptions) -> None:
        super().__init__(base, options)
        shape, device = self.lora_B.shape[:1], self.lora_B.device
        self.magnitude = nn.Parameter(torch.empty(shape, device=device))
        self.base_norm = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` in the dtype of ``x``."""
        x, shape = x.flatten(0, -2), x.shape[:-1]
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        drops = self.training and self.dropout > 0
        inputs = [x, functional.dropout(x, self.dropout)] if drops else [x]
        product = self._base_product(torch.cat([*inputs, a.detach()]))
        *base, base_times_a = product.split([part.shape[0] for part in (*inputs, a)])
        addition = functional.linear(functional.linear(inputs[-1], a), b) * self.scaling
        # The factor less 1: bf16 has no number between 1 and 1.0078, and magnitudes move by less.
        change = (self.magnitude / self._norm(base_times_a, a, b) - 1.0).to(x.dtype)
        result = base[0] + (addition + (base[-1] + addition) * change)
        bias: Tensor | None = self.base.bias  # pyright: ignore[reportAssignmentType]
        result = result if bias is None else result + bias
        return result.unflatten(0, shape)

    def _base_product(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, self.base.weight)
        return self.base.product(x)  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def _norm(self, base_times_a: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Returns the row norms of ``W + s B A``, ``(out_features,)``, fp32.

        Args:
            base_times_a: ``A W^T``, ``(rank, out_features)``.
            a: A as the forward uses it.
            b: B as the forward uses it.
        """
        a, b = a.float(), b.float()
        cross = (b * base_times_a.float().T).sum(dim=1)
        with torch.autocast(a.device.type, enabled=False):
            own = ((b @ (a @ a.T)) * b).sum(dim=1)
        square = self.base_norm.square() + 2 * self.scaling * cross + self.scaling**2 * own
        # A row of zeros has no direction: its magnitude is zero as well, and 0 / tiny is 0.
        return square.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def init_norms(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Measures this rank's row norms of the base; magnitudes start as those.

        Ranks: all (collective).
        Memory: the whole base matrix in ``dtype``, one layer at a time.
        """
        weight, shard = self._whole_base(dtype, device), own_shard(self.base_norm)
        step = max(1, NORM_CHUNK_WEIGHTS // weight.shape[1])
        for start in range(shard.start, shard.stop, step):
            stop = min(start + step, shard.stop)
            rows = torch.linalg.vector_norm(weight[start:stop].float(), dim=1)
            shard.rows[start - shard.start : stop - shard.start] = rows
        own_shard(self.magnitude).rows.copy_(shard.rows)

    def _whole_base(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return gather_whole(self.base.weight).to(device=device, dtype=dtype)
        names: tuple[str, ...] = self.base.packed_names  # pyright: ignore[reportAssignmentType]
        packed = tuple(gather_whole(getattr(self.base, name)).to(device) for name in names)
        return self.base.dequantize(packed, dtype)  # pyright: ignore[reportCallIssue]


class DoraAdapter(LoraAdapter):
    """Puts `DoraLinear` around the target layers; see `fsdpq.protocols.Adapter`."""

    layer_class = DoraLinear

    def unfreeze_base(
        self,
        hf: nn.Module,
        layers: nn.ModuleList,
        *,
        sources: Sequence[int],
        master_dtype: torch.dtype,
    ) -> None:
        """Makes ``modules_to_save`` trainable, in place.

        Raises:
            RecipeError: one is inside the decoder layers. Its weight would be cast where it is
                gathered, and the magnitudes of its layer with it.
        """
        super().unfreeze_base(hf, layers, sources=sources, master_dtype=master_dtype)
        if any(parameter.requires_grad for parameter in layers.parameters()):
            message = f"`{KEY}` names modules of the decoder layers, which hold the magnitudes"
            hint = "name modules outside of them (`lm_head`, `embed_tokens`), or use `kind: lora`"
            raise RecipeError([Problem(f"{message} of dora", KEY, hint=hint)])

    def init_adapter(
        self, model: nn.Module, *, seed: int, dtype: torch.dtype, device: torch.device
    ) -> str:
        """Fills this rank's rows; returns a hash of the low-rank part.

        Ranks: all (collective).
        Memory: peak is one whole matrix of the base in ``dtype``.
        """
        for module in model.modules():
            if isinstance(module, DoraLinear):
                module.init_norms(dtype=dtype, device=device)
        return super().init_adapter(model, seed=seed, dtype=dtype, device=device)
