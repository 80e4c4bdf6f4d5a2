"""DoRA: LoRA that trains each output row's magnitude apart (https://arxiv.org/abs/2402.09353).

``y = m / ||W + s B A|| * (W x + s B A x) + bias``, the norm taken over each row and treated as a
constant in the backward pass (section 4.3 of the paper). Dropout d in training is as PEFT has it:
what DoRA changes sees the dropped input, at the price of twice the tokens in the base's product:
``y = m / ||W + s B A|| * (W + s B A) d(x) + W (x - d(x)) + bias``.

PEFT makes ``W + s B A`` whole in every forward to take its norm. Here it never exists, because

    ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s b_i (W A^T)_i + s^2 b_i (A A^T) b_i^T

where ``||w_i||`` is measured once after loading, ``A A^T`` is ``rank x rank``, and ``W A^T`` is a
product with the matrix that the layer dequantizes anyway, as large as ``rank`` more tokens. The
base is dequantized as often as LoRA dequantizes it. `fsdpq.adapter.dora_product` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fsdpq.adapter.dora_product import DoraBase, dora_product, row_norms
from fsdpq.adapter.lora import LoraAdapter, LoraLinear
from fsdpq.adapter.saved_modules import KEY
from fsdpq.dist import gather_whole, own_shard
from fsdpq.errors import Problem, RecipeError
from fsdpq.protocols import compute_dtype
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
    fp32_names: ClassVar[tuple[str, ...]] = ("magnitude",)
    """In bf16 a magnitude near 1 moves in steps of 0.4% or not at all."""

    def __init__(self, base: nn.Module, options: LoraOptions) -> None:
        super().__init__(base, options)
        shape, device = self.lora_B.shape[:1], self.lora_B.device
        self.magnitude = nn.Parameter(torch.empty(shape, device=device))
        self.base_norm = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)`` in the dtype of the product."""
        dtype = compute_dtype(x)
        x, shape = x.flatten(0, -2).to(dtype), x.shape[:-1]
        drops = self.training and self.dropout > 0
        inputs = functional.dropout(x, self.dropout) if drops else x
        rest = x - inputs if drops else None
        low_rank = (self.lora_A.to(dtype), self.lora_B.to(dtype))
        if torch.compiler.is_compiling():
            result = self._traced_product(inputs, rest, low_rank)
        else:
            base = self._dora_base(dtype)
            result = dora_product(
                inputs, rest, base, low_rank, self.magnitude, scaling=self.scaling
            )
        return result.unflatten(0, shape)

    def _traced_product(
        self, x: Tensor, rest: Tensor | None, low_rank: tuple[Tensor, Tensor]
    ) -> Tensor:
        """As `dora_product`, in operators that ``torch.compile`` can trace and fuse."""
        a, b = low_rank
        base, base_times_a = self._base_product(torch.cat([x, a.detach()])).split(
            [x.shape[0], a.shape[0]]
        )
        product = torch.addmm(base, x @ a.T, b.T, alpha=self.scaling)
        norms = row_norms(self.base_norm, base_times_a.T, a, b, scaling=self.scaling)
        result = torch.addcmul(product, product, (self.magnitude / norms - 1.0).to(x.dtype))
        if rest is not None:
            result = result + self._base_product(rest)
        bias: Tensor | None = self.base.bias  # pyright: ignore[reportAssignmentType]
        return result if bias is None else result + bias.to(x.dtype)

    def _base_product(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return functional.linear(x, self.base.weight.to(x.dtype))
        return self.base.product(x)  # pyright: ignore[reportCallIssue]

    def _dora_base(self, dtype: torch.dtype) -> DoraBase:
        base = self.base
        bias: Tensor | None = base.bias  # pyright: ignore[reportAssignmentType]
        bias = None if bias is None else bias.to(dtype)
        if isinstance(base, nn.Linear):
            return DoraBase((base.weight,), _cast_weight, bias, self.base_norm)
        return DoraBase(base.packed, base.dequantize, bias, self.base_norm)  # pyright: ignore[reportArgumentType]

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


def _cast_weight(stored: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return stored[0].to(dtype)


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
