"""What the FSDP groups of a run store: bytes over all ranks, and those of rank 0.

Rank 0 has as many rows as any rank: FSDP2 gives every rank ``ceil(rows / shards)`` rows of a tensor
until there are none left.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fsdpq.plan.costs.expansion import layer_sources
from fsdpq.plan.costs.optimizer import state_bytes
from fsdpq.plan.costs.parameters import Choice, HeldGroup, HeldParameter, choice_of
from fsdpq.plan.costs.pinned import pinned_bytes
from fsdpq.plan.shape import GroupName, GroupShape, ModelShape
from fsdpq.plan.sharding import Sharding, sharding_of
from fsdpq.recipe.precision import Dtype, precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import DoraOptions, LlamaProOptions, LoraOptions
from fsdpq.recipe.sections.optimizer import OptimizerOptions


@dataclass(frozen=True)
class Stored:
    """Bytes as they lie between uses.

    Attributes:
        codes: quantized weights.
        scales: what is stored beside codes: absmax, scales, zero points, nested ones.
        plain: frozen weights that are not quantized.
        trained: trained weights: adapters, or weights of the base.
        num_trained: elements of ``trained``.
        optimizer: bytes of the optimizer's states of ``trained``; in no sum.
        num_trained_tensors: Parameters that are trained.
        frozen_pinned: what is not trained, in pinned host memory; in no sum.
        trained_pinned: what is trained, in pinned host memory; in no sum.
    """

    codes: int = 0
    scales: int = 0
    plain: int = 0
    trained: int = 0
    num_trained: int = 0
    optimizer: int = 0
    num_trained_tensors: int = 0
    frozen_pinned: int = 0
    trained_pinned: int = 0

    @property
    def frozen(self) -> int:
        """Bytes that are not trained."""
        return self.codes + self.scales + self.plain

    @property
    def total(self) -> int:
        """All bytes."""
        return self.frozen + self.trained

    def __add__(self, other: Stored) -> Stored:
        """Returns the sums."""
        # `dataclasses.astuple` copies: a plan adds some hundred of these.
        return Stored(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, count: int) -> Stored:
        """Returns the bytes of ``count`` such groups."""
        return Stored(*(count * value for value in vars(self).values()))


@dataclass(frozen=True)
class GroupWeights:
    """One FSDP group.

    Attributes:
        name: which.
        count: how many of the same there are.
        whole: one of them over all ranks of a copy.
        shard: one of them on rank 0.
        largest_matrix: elements of the largest matrix that is dequantized for a product, 0 where
            nothing is quantized. Experts are dequantized one stack's expert at a time.
        gathered: FSDP gathers it; where one rank has all rows on its device, nothing is gathered.
        gathered_bytes: of one of them while it is unsharded, as FSDP allocates it: padded, trained
            weights of the base in ``model.dtype``; 0 where nothing is gathered. With ``ddp`` only
            trained and tied weights are.
        index: which of `fsdpq.plan.shape.ModelShape.groups` it is.
        is_new: ``llama_pro`` added these layers.
    """

    name: GroupName
    count: int
    whole: Stored
    shard: Stored
    largest_matrix: int
    gathered: bool
    gathered_bytes: int = 0
    index: int = 0
    is_new: bool = False


@dataclass(frozen=True)
class Weights:
    """All weights of a run.

    Attributes:
        groups: in the order of `fsdpq.plan.shape.ModelShape.groups`; new layers of ``llama_pro``
            are groups of their own, and so are layers that an adapter treats in another way.
        num_shards: ranks that share one copy of the base.
    """

    groups: tuple[GroupWeights, ...]
    num_shards: int

    @property
    def layers(self) -> Iterator[GroupWeights]:
        """The groups of decoder layers, each with its count."""
        return (group for group in self.groups if group.name == "layer")

    @property
    def num_groups(self) -> int:
        """FSDP groups, as a run reports them."""
        apart = sum(group.gathered for group in self.groups if group.name in ("embedding", "head"))
        return sum(group.count for group in self.layers) + apart + 1

    @property
    def whole(self) -> Stored:
        """One copy of the model."""
        return sum((group.whole * group.count for group in self.groups), Stored())

    @property
    def shard(self) -> Stored:
        """What rank 0 stores."""
        return sum((group.shard * group.count for group in self.groups), Stored())


def plan_weights(recipe: Recipe, shape: ModelShape) -> Weights:
    """Returns what every FSDP group stores under a resolved recipe, exact to the byte.

    Raises:
        CheckpointError: the quantization does not fit a matrix of the model.
        RecipeError: new layers cannot be spread evenly over the model's.
    """
    precision = precision_of(recipe)
    counting = _Counting(
        choice_of(recipe, shape), recipe.optimizer, sharding_of(recipe), precision.reduce
    )
    return _count(counting)


@functools.lru_cache(maxsize=256)
def _count(counting: _Counting) -> Weights:
    """Returns all weights; edits of a recipe that change none of them ask again and again."""
    groups: list[GroupWeights] = []
    for index, group in enumerate(counting.choice.shape.groups):
        for held, count, is_new in _variants(counting.choice, group):
            groups.append(counting.weights(group, held, index=index, count=count, is_new=is_new))
    return Weights(tuple(groups), counting.sharding.num_shards)


def _variants(choice: Choice, group: GroupShape) -> Iterator[tuple[HeldGroup, int, bool]]:
    """Yields what a group becomes, how many do so, and whether they are new layers."""
    adapter = choice.adapter
    if group.name != "layer":
        yield choice.held(group), 1, False
        return
    indices = choice.shape.layer_indices(group)
    if choice.names_single_layers:
        kinds: dict[HeldGroup, int] = {}
        for index in indices:
            held = choice.held(group, index)
            kinds[held] = kinds.get(held, 0) + 1
        yield from ((held, count, False) for held, count in kinds.items())
    else:
        yield choice.held(group, indices[0]), group.count, False
    if isinstance(adapter, LlamaProOptions):
        sources = layer_sources(adapter, choice.shape.num_layers)
        num_new = sum(sources.count(index) - 1 for index in indices)
        if num_new:
            yield choice.held(group, indices[0], is_new=True), num_new, True


@dataclass(frozen=True)
class _Counting:
    """Counts the bytes of groups, over all ranks and on rank 0.

    Attributes:
        choice: what the recipe says of every tensor.
        optimizer: its section.
        sharding: how tensors are dealt.
        reduce: dtype in which gradients are summed.
    """

    choice: Choice
    optimizer: OptimizerOptions
    sharding: Sharding
    reduce: Dtype

    def weights(
        self, group: GroupShape, held: HeldGroup, *, index: int, count: int, is_new: bool
    ) -> GroupWeights:
        num_shards, in_layers = self.sharding.num_shards, group.name == "layer"
        gathered = [each for each in held.parameters if not self._is_whole(each)]
        return GroupWeights(
            name=group.name,
            count=count,
            whole=self._stored(held.parameters, 1, in_layers=in_layers),
            shard=self._stored(held.parameters, num_shards, in_layers=in_layers),
            largest_matrix=held.largest_matrix,
            gathered=bool(gathered),
            gathered_bytes=self._gathered_bytes(gathered),
            index=index,
            is_new=is_new,
        )

    def _is_whole(self, parameter: HeldParameter) -> bool:
        """Whether FSDP leaves it alone: see `fsdpq.fsdp.wrap.whole_parameters`."""
        if not self.sharding.is_whole or parameter.is_tied:
            return False
        return parameter.use != "trained" or self._trained_is_whole()

    def _trained_is_whole(self) -> bool:
        adapter = self.choice.adapter
        if not isinstance(adapter, LoraOptions) or adapter.modules_to_save:
            return False
        dtypes = {self.choice.trained_dtype}
        if isinstance(adapter, DoraOptions):
            dtypes.add("fp32")  # magnitudes, whatever the others are
        return self.sharding.num_ranks == 1 and dtypes == {self.reduce}

    def _gathered_bytes(self, parameters: Iterable[HeldParameter]) -> int:
        """Returns the bytes of unsharded Parameters as FSDP allocates them.

        Each rank sends as many rows as the first has. In a group that trains weights of the base,
        all that is no byte tensor is cast to ``model.dtype``.
        """
        found = list(parameters)
        casts = any(each.use == "trained" and not each.is_adapter for each in found)
        num_shards = self.sharding.num_shards
        return sum(
            num_shards
            * -(-each.shape[0] // num_shards)
            * math.prod(each.shape[1:])
            * (self.choice.base_bytes if casts and not each.is_bytes else each.item_bytes)
            for each in found
        )

    def _stored(
        self, parameters: Iterable[HeldParameter], num_shards: int, *, in_layers: bool
    ) -> Stored:
        """Returns the bytes of the first of ``num_shards`` ranks."""
        totals = {"codes": 0, "scales": 0, "plain": 0, "trained": 0}
        pinned = {"frozen": 0, "trained": 0}
        num_trained, optimizer, num_tensors = 0, 0, 0
        for each in parameters:
            rows = -(-each.shape[0] // num_shards)
            totals[each.use] += rows * each.row_bytes
            kind = "trained" if each.use == "trained" else "frozen"
            pinned[kind] += pinned_bytes(rows * each.row_bytes)
            if each.use == "trained":
                num_tensors += 1
                num_trained += rows * math.prod(each.shape[1:])
                optimizer += state_bytes(
                    self.optimizer,
                    each.shape,
                    num_rows=rows,
                    item_bytes=each.item_bytes,
                    in_layers=in_layers,
                )
        return Stored(
            **totals,
            num_trained=num_trained,
            optimizer=optimizer,
            num_trained_tensors=num_tensors,
            frozen_pinned=pinned["frozen"],
            trained_pinned=pinned["trained"],
        )
