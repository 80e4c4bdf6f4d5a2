"""What the components of the worker half look like to each other.

Components never import one another; `fsdpq.worker` builds them through the registry and passes
them on under these protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fsdpq.dist import Shard, own_shard

BASE = "base"
"""Attribute under which an adapter keeps the layer that it wraps."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names in recipes, and what torch calls them."""

RowReader = Callable[[int, int], Tensor]
"""``read(start, stop)`` returns rows ``[start, stop)`` of one checkpoint matrix, with shape
``(stop - start, in_features)``, in ``model.dtype`` on the rank's device."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a product of ``x`` is computed in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Quantizer(Protocol):
    """Packs the matrices of frozen linear layers into sharded byte tensors, and back."""

    modules_to_not_convert: tuple[str, ...]

    def packed_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the byte tensors of one ``(out_features, in_features)`` matrix.

        Empty when the matrix stays as it is.
        """
        ...

    def quantize_shards(
        self, read: RowReader, shape: tuple[int, int], shards: Mapping[str, Shard]
    ) -> None:
        """Fills this rank's shards of one matrix, bit-identical to the whole tensor's result.

        Ranks: all (collective).

        Args:
            read: reads rows of the matrix.
            shape: ``(out_features, in_features)``.
            shards: one `Shard` per name of `packed_shapes`.
        """
        ...

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """Returns the whole matrix with shape ``shape`` from whole byte tensors."""
        ...

    def dequantize_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns rows ``[start, stop)`` of what `dequantize` returns: one expert of a stack."""
        ...


class Adapter(Protocol):
    """Decides what is trained; a method of finetuning is one of these.

    The worker calls the methods in the order in which they stand here. A method that a kind does
    not need keeps the default: nothing added to the model, nothing of it trained.
    """

    trains_base: bool = False
    """Whether weights of the base are trained. They are masters in ``master_dtype``, cast to
    ``model.dtype`` where they are gathered, and the run leaves a whole model instead of an
    adapter."""

    def layer_sources(self, num_layers: int) -> tuple[int, ...]:
        """Returns, for every decoder layer of the trained model, the base's layer it starts from.

        Raises:
            RecipeError: the recipe does not fit ``num_layers``.
        """
        return tuple(range(num_layers))

    def unfreeze_base(
        self,
        hf: nn.Module,
        layers: nn.ModuleList,
        *,
        sources: Sequence[int],
        master_dtype: torch.dtype,
    ) -> None:
        """Makes those weights of the base trainable that are to be, in place.

        Called on meta before any layer is quantized; what is trained is not quantized.

        Args:
            hf: the transformers model, frozen.
            layers: its decoder layers.
            sources: what `layer_sources` returned.
            master_dtype: of trained weights.
        """
        del hf, layers, sources, master_dtype

    def apply_adapter(
        self, layers: nn.ModuleList, *, is_linear: Callable[[nn.Module], bool], prefix: str
    ) -> None:
        """Wraps linear layers inside the decoder layers in place, on meta.

        A wrapper is an `AdaptedLayer`. ``prefix`` stands before a layer's number in the names of
        transformers (``model.layers.``).
        """
        del layers, is_linear, prefix

    def init_adapter(
        self, model: nn.Module, *, seed: int, dtype: torch.dtype, device: torch.device
    ) -> str:
        """Fills what no checkpoint holds, after the base is sharded and loaded.

        The values depend on ``seed``, the base and the parameter's name, not on rank or world size.

        Ranks: all (collective).

        Args:
            model: the sharded model.
            seed: of the recipe.
            dtype: in which the base computes.
            device: on which the base computes.

        Returns:
            What must be the same on all ranks, such as a hash of the initial values.
        """
        del model, seed, dtype, device
        return ""


class Losses(NamedTuple):
    """Losses of a micro-batch of a mixture; a tuple, so that FSDP finds the tensors in it.

    Attributes:
        tokens: sum of the token losses, in nats. Scalar.
        router: the load-balancing loss of the routers, without a coefficient. Scalar.
    """

    tokens: Tensor
    router: Tensor


class AdaptedLayer(Protocol):
    """A linear layer with something trained beside it, kept under `BASE`.

    Parameters of the wrapper itself are the adapter's, those below `BASE` the base's.
    """

    base: nn.Module
    """The layer that is wrapped."""

    fp32_names: tuple[str, ...]
    """The wrapper's trained Parameters that stay fp32 where others are trained in 16 bits."""

    peft_names: Mapping[str, str]
    """The wrapper's trained Parameters -> what PEFT's files call them after the layer's name."""

    initial: Mapping[str, Tensor]
    """Where the base was changed by the wrapper's first values: this rank's rows of those, by the
    names of its Parameters; else empty."""

    def restore_initial(self, initial: Mapping[str, Tensor]) -> None:
        """Makes the base what it was left as by other first values: those of a checkpoint.

        Ranks: all (collective).

        Args:
            initial: this rank's rows, by the names of `initial`.
        """
        ...


class Piece(NamedTuple):
    """What this rank holds of a tensor that a checkpoint keeps.

    Attributes:
        rows: its rows, ``(rows, ...)``; loading writes into them. A scalar is its own row.
        shape: of the whole tensor.
        start: row of the whole that the first of them is.
    """

    rows: Tensor
    shape: tuple[int, ...]
    start: int = 0


def own_piece(tensor: Tensor) -> Piece:
    """Returns this rank's rows of a tensor that FSDP2 sharded; of a plain tensor all rows."""
    shard = own_shard(tensor)
    return Piece(shard.rows, tuple(tensor.shape), shard.start)


class MetricSink(Protocol):
    """Takes rows of metrics on rank 0."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row; must not raise for reasons outside this machine."""
        ...
