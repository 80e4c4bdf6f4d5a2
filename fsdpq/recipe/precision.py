"""What ``fsdp.precision`` and ``model.dtype`` say together: the dtypes of a run.

A preset is a name for a combination, and nothing else knows presets: both halves of the program
read a `Precision`. Dtypes have their names in recipes here, because the front half has no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.fsdp import FsdpOptions, PrecisionOptions, Preset

Dtype = Literal["fp32", "bf16", "fp16"]

PRESETS: Mapping[Preset, PrecisionOptions] = {
    "auto": PrecisionOptions.model_construct(),
    "fp32": PrecisionOptions.model_construct(param="fp32", compute="fp32", buffers="fp32"),
    "bf16": PrecisionOptions.model_construct(param="bf16", compute="bf16", buffers="bf16"),
    "fp16_autocast": PrecisionOptions.model_construct(param="fp32", compute="fp16", buffers="fp32"),
    "bf16_autocast": PrecisionOptions.model_construct(param="fp32", compute="bf16", buffers="fp32"),
    "bf16_buffers_autocast": PrecisionOptions.model_construct(
        param="bf16", compute="bf16", buffers="fp32"
    ),
}
"""Every preset as the combination that it is."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        param: trained weights, their gradients where the optimizer takes them, and its states.
        compute: products.
        reduce: gradients while they are summed over ranks.
        buffers: floating buffers, but RoPE's frequencies.
        base: ``model.dtype``: frozen weights that are not quantized, and what flows between layers.
            Trained weights of the base itself are gathered in it.
    """

    param: Dtype
    compute: Dtype
    reduce: Dtype
    buffers: Dtype
    base: Dtype

    @property
    def autocasts(self) -> bool:
        """Whether forward runs under autocast: something that meets in a product is wider."""
        return {self.base, self.buffers} != {self.compute}

    @property
    def scales_loss(self) -> bool:
        """Whether gradients pass through fp16, whose small numbers vanish without a scale."""
        return self.compute == "fp16"

    @property
    def words(self) -> str:
        """What forward runs in, for people: ``bf16``, or ``fp32 under autocast to fp16``."""
        return f"{self.base} under autocast to {self.compute}" if self.autocasts else self.base


def precision_options(fsdp: FsdpOptions) -> PrecisionOptions:
    """Returns the combination that ``fsdp.precision`` is or names."""
    chosen = fsdp.precision
    return PRESETS[chosen] if isinstance(chosen, str) else chosen


def base_dtype(recipe: Recipe, default: Dtype | None = None) -> Dtype | None:
    """Returns what ``model.dtype`` is, ``default`` where the recipe leaves it to the machine.

    ``auto`` follows the combination: fp32 where trained weights and buffers are held in fp32 beside
    a ``compute`` that is given, else that ``compute``.
    """
    options = precision_options(recipe.fsdp)
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if options.compute == "auto":
        return default
    return "fp32" if options.param == options.buffers == "fp32" else options.compute


def compute_dtype(recipe: Recipe, default: Dtype | None = None) -> Dtype | None:
    """Returns the dtype of products, ``default`` where the recipe leaves it to the machine."""
    told = precision_options(recipe.fsdp).compute
    return base_dtype(recipe, default) if told == "auto" else told


def precision_of(recipe: Recipe, *, default: Dtype = "fp32") -> Precision:
    """Returns the dtypes of a run.

    Args:
        recipe: as the launcher resolved it, or before.
        default: the machine's dtype, for a recipe that leaves it to the machine.
    """
    options = precision_options(recipe.fsdp)
    base = base_dtype(recipe, default) or default
    return Precision(
        param=options.param,
        compute=base if options.compute == "auto" else options.compute,
        reduce=options.reduce,
        buffers=base if options.buffers == "auto" else options.buffers,
        base=base,
    )
