"""The matrices of a decoder layer, in the order in which it multiplies by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from fsdpq.plan.costs.parameters import Choice, HeldParameter
from fsdpq.plan.shape import GroupShape, ModelShape, TensorShape
from fsdpq.recipe.sections.adapter import DoraOptions, LoraOptions

PARALLEL = frozenset({"cohere", "cohere2", "falcon", "gpt_neox", "gptj", "phi"})
"""Architectures whose feed-forward reads the layer's input and not what attention added to it."""


class Stage(IntEnum):
    """What a matrix reads."""

    INPUT = 0  # the layer's input: projections of queries, keys and values
    ATTENDED = 1  # what attention gives
    MIDDLE = 2  # the residual stream after attention: first matrices of the feed-forward
    LAST = 3  # what the feed-forward's first matrices give


@dataclass(frozen=True)
class Matrix:
    """One matrix, or the experts of a mixture that see a token.

    Attributes:
        stage: what it reads.
        out_features: rows.
        in_features: columns.
        copies: how many of them see a token.
        stacked: how many there are.
        trained: it is trained itself.
        quantized: it is dequantized for every product.
        rank: of the adapter beside it, 0 where there is none.
    """

    stage: Stage
    out_features: int
    in_features: int
    copies: int = 1
    stacked: int = 1
    trained: bool = False
    quantized: bool = False
    rank: int = 0

    @property
    def weights(self) -> int:
        """Weights that one token is multiplied by."""
        return self.copies * self.out_features * self.in_features

    @property
    def low_rank(self) -> int:
        """Weights of the adapter."""
        return self.rank * (self.out_features + self.in_features)

    @property
    def learns(self) -> bool:
        """What it gives has a gradient even where what it reads has none."""
        return self.trained or self.rank > 0


@dataclass(frozen=True)
class LayerMatrices:
    """The matrices of one decoder layer.

    Attributes:
        matrices: in order of their stages.
        trained_norms: stages whose input comes from a trained norm.
        ends_in_product: nothing behind the last matrix keeps a tensor for backward, so that a
            layer that is computed again stops before that product (`torch.utils.checkpoint`).
    """

    matrices: tuple[Matrix, ...]
    trained_norms: frozenset[Stage]
    ends_in_product: bool

    @property
    def learns(self) -> bool:
        """Something in it is trained."""
        return bool(self.trained_norms) or any(matrix.learns for matrix in self.matrices)

    @property
    def trained_matrices(self) -> Iterator[tuple[int, int]]:
        """Rows and columns of what is trained and has two dimensions."""
        for matrix in self.matrices:
            if matrix.trained and matrix.stacked == 1:
                yield matrix.out_features, matrix.in_features
            if matrix.rank:
                yield matrix.rank, matrix.in_features
                yield matrix.out_features, matrix.rank


def layer_matrices(
    choice: Choice, group: GroupShape, index: int = 0, *, is_new: bool = False
) -> LayerMatrices:
    """Returns the matrices of decoder layer ``index`` under a recipe.

    Args:
        choice: what the recipe says about every tensor.
        group: of the layer.
        index: its number.
        is_new: ``llama_pro`` adds it.
    """
    held = choice.held(group, index, is_new=is_new).parameters
    by_name: dict[str, list[HeldParameter]] = {}
    for parameter in held:
        by_name.setdefault(parameter.name, []).append(parameter)
    shape, names = choice.shape, frozenset(by_name)
    matrices = [
        _matrix(choice, tensor, names, by_name)
        for tensor in group.tensors
        if tensor.kind != "plain" and len(tensor.shape) > 1
    ]
    trained_norms = frozenset(
        Stage.INPUT if "input" in parameter.name or shape.model_type in PARALLEL else Stage.MIDDLE
        for parameter in held
        if parameter.use == "trained" and len(parameter.shape) == 1 and "norm" in parameter.name
    )
    return LayerMatrices(
        tuple(sorted(matrices, key=lambda matrix: matrix.stage)),
        trained_norms,
        _ends_in_product(choice, group),
    )


def _matrix(
    choice: Choice,
    tensor: TensorShape,
    names: frozenset[str],
    by_name: dict[str, list[HeldParameter]],
) -> Matrix:
    shape, adapter = choice.shape, choice.adapter
    module = tensor.name.removesuffix(".weight")
    plain = by_name.get(tensor.name)
    stacked = tensor.shape[0] if len(tensor.shape) == 3 else 1
    adapted = isinstance(adapter, LoraOptions) and f"{module}.lora_A" in names
    return Matrix(
        stage=_stage(tensor, shape),
        out_features=tensor.shape[-2],
        in_features=tensor.shape[-1],
        copies=shape.num_experts_per_tok if stacked > 1 else 1,
        stacked=stacked,
        trained=plain is not None and plain[0].use == "trained",
        quantized=plain is None,
        rank=adapter.rank if adapted and isinstance(adapter, LoraOptions) else 0,
    )


def _stage(tensor: TensorShape, shape: ModelShape) -> Stage:
    module = tensor.name.removesuffix(".weight")
    in_attention = "attn" in module or "attention" in module
    writes = module in shape.residual_linears or module.endswith("experts.down_proj")
    if in_attention:
        return Stage.ATTENDED if writes else Stage.INPUT
    if writes:
        return Stage.LAST
    return Stage.INPUT if shape.model_type in PARALLEL else Stage.MIDDLE


def _ends_in_product(choice: Choice, group: GroupShape) -> bool:
    if choice.compiled or isinstance(choice.adapter, DoraOptions):
        return False  # one Function each, which keeps its tensors when all of it is done
    names = [tensor.name for tensor in group.tensors]
    return not any(_is_behind(name) for name in names) and not _has_experts(group.tensors)


def _is_behind(name: str) -> bool:
    """Whether a norm reads what the feed-forward gives."""
    return "post_feedforward" in name or "post_mlp" in name


def _has_experts(tensors: Sequence[TensorShape]) -> bool:
    return any(tensor.kind == "experts" for tensor in tensors)
