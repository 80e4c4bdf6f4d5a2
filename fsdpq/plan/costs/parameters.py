"""What the tensors of a group become under a recipe: packed, plain and trained Parameters.

The order of decisions is that of `fsdpq.model.meta` and `fsdpq.worker.assemble`: what is trained is
not quantized, what is left is quantized where it is a matrix of a decoder layer, and then adapters
are put around linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fsdpq.plan.costs.quantization import CODES, is_row_local, packed_shapes
from fsdpq.plan.shape import GroupShape, ModelShape, TensorShape
from fsdpq.recipe.precision import Dtype, precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import (
    DoraOptions,
    LlamaProOptions,
    LoraOptions,
    NoAdapterOptions,
)
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, NoQuantOptions

DTYPE_BYTES: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one number, by the names that recipes give dtypes."""

FP32_BYTES = 4


class HeldParameter(NamedTuple):
    """One Parameter of a group.

    Attributes:
        name: as `fsdpq.plan.shape.TensorShape` has it; of packed bytes ``NAME.codes``.
        use: what it is counted as.
        shape: of the whole.
        item_bytes: of one element as it is stored.
        is_adapter: it belongs to no checkpoint of the base.
        is_tied: it has a second name.
    """

    name: str
    use: Literal["codes", "scales", "plain", "trained"]
    shape: tuple[int, ...]
    item_bytes: int
    is_adapter: bool = False
    is_tied: bool = False

    @property
    def is_bytes(self) -> bool:
        """It is a byte tensor, which is never cast."""
        return self.use in ("codes", "scales")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.item_bytes


@dataclass(frozen=True)
class HeldGroup:
    """One FSDP group under a recipe.

    Attributes:
        parameters: base first.
        largest_matrix: see `fsdpq.plan.weights.GroupWeights`.
    """

    parameters: tuple[HeldParameter, ...]
    largest_matrix: int


@dataclass(frozen=True)
class Choice:
    """What a recipe says about every tensor.

    Attributes:
        quantization: its section.
        adapter: its section.
        shape: of the model.
        base_dtype: of frozen weights that are not quantized.
        trained_dtype: of trained weights.
        compiled: decoder layers are compiled.
    """

    quantization: BnbOptions | HqqOptions | NoQuantOptions
    adapter: LoraOptions | LlamaProOptions | NoAdapterOptions
    shape: ModelShape
    base_dtype: Dtype
    trained_dtype: Dtype
    compiled: bool = False

    @property
    def base_bytes(self) -> int:
        """Bytes of one frozen weight that is not quantized."""
        return DTYPE_BYTES[self.base_dtype]

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained weight."""
        return DTYPE_BYTES[self.trained_dtype]

    @property
    def names_single_layers(self) -> bool:
        """Whether two decoder layers of the same shape may be treated in two ways."""
        names = list(getattr(self.quantization, "modules_to_not_convert", ()))
        if isinstance(self.adapter, LoraOptions):
            targets = self.adapter.target_modules
            if isinstance(targets, str) and targets != "all-linear":
                return True
            names += [*targets, *self.adapter.modules_to_save]
        return any(part.isdigit() for name in names for part in name.split("."))

    def held(self, group: GroupShape, index: int = 0, *, is_new: bool = False) -> HeldGroup:
        """Returns what ``group`` becomes.

        Args:
            group: of the shape.
            index: number of the decoder layer; of other groups 0.
            is_new: it is a layer that ``llama_pro`` adds.
        """
        found: list[HeldParameter] = []
        added: list[HeldParameter] = []
        largest = 0
        in_layers = group.name == "layer"
        prefix = f"{self.shape.layers_prefix}{index}." if in_layers else ""
        for tensor in group.tensors:
            full_name = prefix + tensor.name
            trained = self._is_trained(tensor, full_name, is_new=is_new)
            if not trained and in_layers and self._is_quantized(tensor, full_name):
                found += self._packed(tensor)
                largest = max(largest, self._dequantized(tensor))
            else:
                found.append(self._plain(tensor, trained=trained))
            if tensor.kind == "linear" and not trained:
                added += self._adapter(tensor, full_name.removesuffix(".weight"))
        return HeldGroup((*found, *added), largest)

    def _is_trained(self, tensor: TensorShape, full_name: str, *, is_new: bool) -> bool:
        adapter = self.adapter
        match adapter:
            case LoraOptions():
                names = (full_name, tensor.tied_name) if tensor.tied_name else (full_name,)
                return any(
                    _is_inside(name.rpartition(".")[0], pattern)
                    for pattern in adapter.modules_to_save
                    for name in names
                )
            case LlamaProOptions():
                module = tensor.name.rpartition(".")[0]
                return is_new and module in self.shape.residual_linears
            case _:
                return True

    def _is_quantized(self, tensor: TensorShape, full_name: str) -> bool:
        options = self.quantization
        if isinstance(options, NoQuantOptions) or tensor.stays_plain:
            return False
        if tensor.kind == "experts":
            module = full_name.rpartition(".")[0]
        elif tensor.kind == "linear" and tensor.shape[0] > 1:
            module = full_name.removesuffix(".weight")
        else:
            return False
        below = module.removeprefix(self.shape.layers_prefix)
        return not any(matches_suffix(below, kept) for kept in options.modules_to_not_convert)

    def _packed(self, tensor: TensorShape) -> Iterator[HeldParameter]:
        *rows, columns = tensor.shape
        shapes = packed_shapes(self.quantization, math.prod(rows), columns)
        for name, shape in shapes.items():
            use = "codes" if name == CODES else "scales"
            yield HeldParameter(f"{tensor.name}.{name}", use, shape, 1)

    def _dequantized(self, tensor: TensorShape) -> int:
        """Returns the elements of the matrix that one product needs."""
        options = self.quantization
        if isinstance(options, NoQuantOptions):
            return 0
        whole = len(tensor.shape) == 3 and not is_row_local(options, tensor.shape[-1])
        return math.prod(tensor.shape) if whole else math.prod(tensor.shape[-2:])

    def _plain(self, tensor: TensorShape, *, trained: bool) -> HeldParameter:
        frozen_bytes = FP32_BYTES if tensor.is_fp32 else self.base_bytes
        return HeldParameter(
            tensor.name,
            "trained" if trained else "plain",
            tensor.shape,
            self.trained_bytes if trained else frozen_bytes,
            is_tied=bool(tensor.tied_name),
        )

    def _adapter(self, tensor: TensorShape, module: str) -> Iterator[HeldParameter]:
        """Yields what LoRA or DoRA puts around the linear layer ``module``."""
        adapter = self.adapter
        if not isinstance(adapter, LoraOptions) or not adapter.is_target(module):
            return
        name = tensor.name.removesuffix(".weight")
        (out_features, in_features), rank = tensor.shape, adapter.rank
        for part, shape in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
            yield HeldParameter(f"{name}.{part}", "trained", shape, self.trained_bytes, True)
        if isinstance(adapter, DoraOptions):
            yield HeldParameter(f"{name}.magnitude", "trained", (out_features,), FP32_BYTES, True)
            yield HeldParameter(f"{name}.base_norm", "plain", (out_features,), FP32_BYTES, True)


def choice_of(recipe: Recipe, shape: ModelShape) -> Choice:
    """Returns what a resolved recipe says about the tensors of ``shape``."""
    precision = precision_of(recipe)
    return Choice(
        recipe.quantization,
        recipe.adapter,
        shape,
        precision.base,
        precision.param,
        compiled=recipe.training.compile,
    )


def matches_suffix(name: str, suffix: str) -> bool:
    """Whether the last parts of a dotted name are ``suffix`` (``mlp.down_proj``)."""
    return name == suffix or name.endswith(f".{suffix}")


def _is_inside(module: str, pattern: str) -> bool:
    """Whether a module, or one that it is in, has a name that ends in ``pattern``."""
    return f".{pattern}." in f".{module}."
