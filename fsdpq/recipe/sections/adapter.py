"""``adapter``: what is trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options
from fsdpq.recipe.sections.quantization import ModuleNames


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

    target_modules: Annotated[str, Field(min_length=1)] | ModuleNames = "all-linear"
    """Linear layers inside the decoder layers that get an adapter: ``all-linear``, a list of the
    last parts of their names (``q_proj``, ``mlp.down_proj``), or a regular expression that the
    whole name matches (``.*\\.(q|v)_proj``). Experts and routers of a mixture are no linear layers:
    its attention is adapted, and linear layers of a shared expert are."""

    use_rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""

    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """First values, all as PEFT's. ``default``: A uniform, B zero. ``gaussian``: A normal with a
    deviation of ``1 / rank``, B zero. ``pissa`` and ``olora`` take A and B from the base, by its
    largest singular values (https://arxiv.org/abs/2404.02948) or a QR decomposition
    (https://arxiv.org/abs/2406.01775), and leave the base the rest: not with a quantized base."""

    modules_to_save: ModuleNames = ()
    """Modules that are trained whole, in fp32, and saved beside the adapter, by the last parts of
    their names (``lm_head``, ``embed_tokens``, ``input_layernorm``). They are not quantized and get
    no adapter."""

    @property
    def scaling(self) -> float:
        """Factor on the adapter's output."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def is_target(self, name: str) -> bool:
        """Whether the linear layer of this dotted name, as transformers gives it, is a target."""
        targets = self.target_modules
        if targets == "all-linear":
            return True
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)


class DoraOptions(LoraOptions):
    """LoRA that trains each output row's magnitude apart (https://arxiv.org/abs/2402.09353)."""

    kind: Literal["dora"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this adapter."""


class LlamaProOptions(Options):
    """New decoder layers that start as identities, the old ones frozen.

    One of ``num_new_layers`` and ``expansion_rate`` (https://arxiv.org/abs/2401.02415).
    """

    kind: Literal["llama_pro"]
    """Selects this adapter."""

    num_new_layers: int | None = Field(default=None, ge=1)
    """New layers, spread evenly; must divide the number of the model's layers."""

    expansion_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    """New layers as a share of the model's layers: 0.1 of 40 layers is 4."""


class NoAdapterOptions(Options):
    """Full finetuning: every weight of the model is trained."""

    kind: Literal["none"]
    """Selects full finetuning."""


AdapterOptions = Annotated[
    LoraOptions | DoraOptions | LlamaProOptions | NoAdapterOptions, Field(discriminator="kind")
]
