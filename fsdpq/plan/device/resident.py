"""What a rank holds on its device for a whole step: shards, states, gradients, a batch."""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.plan.costs.parameters import DTYPE_BYTES
from fsdpq.plan.device.build_layers import kernel_of, sizes_of
from fsdpq.plan.device.tape import Parts
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.weights import GroupWeights, Weights
from fsdpq.plan.workload import Workload
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe

ID_BYTES = 8
"""Of a token, of its place in the loss, of its target, of its position in its document."""


@dataclass(frozen=True)
class Resident:
    """The memory of a run that does not come and go with its layers."""

    recipe: Recipe
    shape: ModelShape
    weights: Weights
    work: Workload

    @property
    def on_gpu(self) -> bool:
        """Whether the device is not the host itself."""
        return self.recipe.launch.device == "cuda"

    @property
    def trained_is_here(self) -> bool:
        """Whether trained weights, their gradients and their states lie on the device."""
        fsdp = self.recipe.fsdp
        return fsdp.offload == "none" or not self.on_gpu or not fsdp.offload_trained

    @property
    def frozen_is_here(self) -> bool:
        """Whether the frozen shards do: not on the host, and not in a file."""
        offload = self.recipe.fsdp.offload
        return offload == "none" or (offload == "cpu" and not self.on_gpu)

    @property
    def reduces(self) -> bool:
        """Whether FSDP reduces gradients: one rank's own adapters are left alone."""
        return any(group.gathered and group.whole.trained for group in self.weights.groups)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier micro-batches are there from the start."""
        return self.work.micro_batches > 1

    def stored(self) -> Parts:
        """Returns the shards."""
        shard = self.weights.shard
        parts: Parts = {}
        if self.frozen_is_here:
            parts |= {"codes": shard.codes, "scales": shard.scales, "plain": shard.plain}
        if self.trained_is_here:
            parts["trained"] = shard.trained
        return parts

    def optimizer(self) -> Parts:
        """Returns the optimizer's states."""
        return {"optimizer": self.weights.shard.optimizer if self.trained_is_here else 0}

    def batch(self) -> Parts:
        """Returns a micro-batch."""
        packed = self.recipe.data.packing != "none"
        return {"layer_inputs": (4 if packed else 3) * ID_BYTES * self.work.tokens}

    def shared(self) -> Parts:
        """Returns what all layers share: positions as waves, a mask."""
        work, size = self.work, sizes_of(self.recipe).hidden
        packed = self.recipe.data.packing != "none"
        waves = 2 * (work.tokens if packed else work.seq_len) * self.shape.head_dim * size
        # ``eager`` adds its mask to scores; ``sdpa`` takes one of a byte for each pair.
        pairs = work.rows * work.seq_len**2
        if self.recipe.model.attn_implementation == "eager":
            return {"attention": waves + pairs * size}
        masked = kernel_of(self.recipe, self.shape) == "masked"
        return {"attention": waves + (pairs if masked else 0)}

    def shard_gradients(self, group: GroupWeights) -> int:
        """Returns the bytes of the gradients of one group as the optimizer takes them."""
        return group.shard.trained if self.trained_is_here else 0

    def gradients(self, group: GroupWeights) -> int:
        """Returns the bytes of the gradients of one group, once its backward is done."""
        if self.recipe.fsdp.no_sync and self.reduces and self.accumulates:
            return group.whole.num_trained * DTYPE_BYTES[precision_of(self.recipe).reduce]
        return self.shard_gradients(group)

    def gradients_above(self) -> int:
        """Returns the bytes of the gradients that are there when the layers' backward begins.

        Those of the head and of the last norm. An embedding's are made last; where it is the head
        too they are there, and wait for the lookup's.
        """
        tied = all(group.name != "head" for group in self.weights.groups)
        total = 0
        for group in self.weights.groups:
            if group.name in ("head", "root"):
                total += self.gradients(group)
            elif group.name == "embedding" and tied:
                total += group.whole.num_trained * sizes_of(self.recipe).weight
        return total

    def accumulated(self) -> Parts:
        """Returns the gradients of earlier micro-batches."""
        if not self.accumulates:
            return {}
        every = (self.gradients(group) * group.count for group in self.weights.groups)
        return {"gradients": sum(every)}

    def reduced(self) -> Parts:
        """Returns the gradients that the optimizer takes."""
        every = (self.shard_gradients(group) * group.count for group in self.weights.groups)
        return {"gradients": sum(every)}
