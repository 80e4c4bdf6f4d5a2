"""What the FSDP groups of a run store: bytes over all ranks, and those of rank 0.

Rank 0 has as many rows as any rank: FSDP2 gives every rank ``ceil(rows / shards)`` rows of a tensor
until there are none left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fsdpq.plan.shape import GroupName


@dataclass(frozen=True)
class Stored:
    """Bytes as they lie between uses.

    Attributes:
        codes: quantized weights.
        scales: what is stored beside codes: absmax, scales, zero points, nested ones.
        plain: frozen weights that are not quantized.
        trained: trained weights: adapters, or weights of the base.
        num_trained: elements of ``trained``.
    """

    codes: int = 0
    scales: int = 0
    plain: int = 0
    trained: int = 0
    num_trained: int = 0

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
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Stored(*(mine + theirs for mine, theirs in pairs))

    def __mul__(self, count: int) -> Stored:
        """Returns the bytes of ``count`` such groups."""
        return Stored(*(count * value for value in dataclasses.astuple(self)))


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
    """

    name: GroupName
    count: int
    whole: Stored
    shard: Stored
    largest_matrix: int
    gathered: bool


@dataclass(frozen=True)
class Weights:
    """All weights of a run.

    Attributes:
        groups: in the order of `fsdpq.plan.shape.ModelShape.groups`; new layers of ``llama_pro``
            are groups of their own.
        num_shards: ranks that share one copy of the base.
    """

    groups: tuple[GroupWeights, ...]
    num_shards: int

    @property
    def layers(self) -> Iterator[GroupWeights]:
        """The groups of decoder layers, each with its count."""
        return (group for group in self.groups if group.name == "layer")

    @property
    def whole(self) -> Stored:
        """One copy of the model."""
        return sum((group.whole * group.count for group in self.groups), Stored())

    @property
    def shard(self) -> Stored:
        """What rank 0 stores."""
        return sum((group.shard * group.count for group in self.groups), Stored())
