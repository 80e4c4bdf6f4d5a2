"""What FSDP2 holds beside the shards: unsharded groups, buffers of collectives, gradients.

Read in torch 2.13, ``torch/distributed/fsdp/_fully_shard``:

- a gather fills one flat buffer, which is copied into the Parameters; in forward the buffer lives
  until the next group is copied out, in backward until it is copied out itself; while a group is
  copied out in forward, the buffer of the group before is still there (``wait_for_unshard`` has a
  name for it);
- in backward the group that comes next is gathered, into its flat buffer, before a layer starts;
- one rank alone copies its shards straight into the Parameters: no buffer, nothing ahead;
- gradients of a group are copied into one flat buffer that is reduced into a shard; the buffer
  lives until the next group is reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsdpq.plan.device.build_layers import PlannedLayer
from fsdpq.plan.device.tape import Parts
from fsdpq.plan.weights import GroupWeights, Weights


@dataclass(frozen=True)
class Gathers:
    """The groups of a run, as FSDP holds them.

    Attributes:
        layers: in order.
        weights: of all groups.
        has_buffers: several ranks share a copy: gathers go through flat buffers.
        keeps_gathered: layers stay unsharded from forward to backward.
        reduce_bytes: of one gradient while it is reduced.
    """

    layers: Sequence[PlannedLayer]
    weights: Weights
    has_buffers: bool
    keeps_gathered: bool
    reduce_bytes: int

    def group(self, name: str) -> GroupWeights | None:
        """Returns the group of embedding, head or root."""
        return next((group for group in self.weights.groups if group.name == name), None)

    @property
    def _always(self) -> int:
        """Bytes of the root group, which is never sharded again within a step."""
        root = self.group("root")
        return 0 if root is None else root.gathered_bytes

    @property
    def _tied(self) -> int:
        """Bytes of an embedding that is the head too: unsharded from its lookup to the loss."""
        if self.group("head") is not None:
            return 0
        embedding = self.group("embedding")
        return 0 if embedding is None else embedding.gathered_bytes

    def gathering_first(self) -> Parts:
        """Returns what is unsharded when the first layer was just gathered."""
        own, embedding = self.layers[0].weights.gathered_bytes, self.group("embedding")
        before = 0 if embedding is None else embedding.gathered_bytes
        return self._parts(own + self._tied, own + before if own else 0)

    def after_loss(self) -> Parts:
        """Returns what is unsharded once a frozen head has done its part of the loss."""
        kept = self._up_to(len(self.layers) - 1) if self.keeps_gathered else 0
        return self._parts(kept, 0)

    def in_forward(self, number: int) -> Parts:
        """Returns what is unsharded while a layer runs forward."""
        own = self.layers[number].weights.gathered_bytes
        return self._parts(self._up_to(number) + self._tied, own)

    def into_head(self) -> Parts:
        """Returns what is there while a head is copied out: the last layer's buffer still is.

        ``wait_for_unshard`` names it until it returns. Empty where nothing is gathered so.
        """
        head = self.group("head")
        if head is None or not self.has_buffers:
            return {}
        kept = self._up_to(len(self.layers) - 1) if self.keeps_gathered else 0
        flat = head.gathered_bytes + self.layers[-1].weights.gathered_bytes
        return self._parts(kept + head.gathered_bytes, flat)

    def in_loss(self) -> Parts:
        """Returns what is unsharded while the loss is computed."""
        head = self.group("head")
        own = self._tied if head is None else head.gathered_bytes
        kept = self._up_to(len(self.layers) - 1) if self.keeps_gathered else 0
        # A tied head is there since the lookup: the newest buffer is that of the last layer.
        flat = self.layers[-1].weights.gathered_bytes if head is None else own
        return self._parts(kept + own, flat)

    def in_backward(self, number: int) -> Parts:
        """Returns what is unsharded while a layer runs backward."""
        ahead = 0
        if self.has_buffers and number > 0 and not self.keeps_gathered:
            ahead = self.layers[number - 1].weights.gathered_bytes
        if self.has_buffers and number == 0:
            ahead = self._embedding_ahead
        return self._parts(self._up_to(number) + ahead + self._tied_and_trained, 0)

    def reduced_before(self, number: int) -> int:
        """Returns bytes of the flat buffer of the group that was reduced before a layer."""
        above = [layer.weights for layer in self.layers[number + 1 :]]
        head = self.group("head")
        reduced = (self.reduce_buffer(group) for group in [*above, *([head] if head else [])])
        return next((num_bytes for num_bytes in reduced if num_bytes), 0)

    def reduce_buffer(self, group: GroupWeights) -> int:
        """Returns bytes of the flat buffer of a group's gradients, 0 where it needs none."""
        if not group.gathered:
            return 0
        return group.shard.num_trained * self.weights.num_shards * self.reduce_bytes

    @property
    def _embedding_ahead(self) -> int:
        """Bytes of a trained embedding, which is gathered ahead while the first layer runs."""
        embedding = self.group("embedding")
        if embedding is None or not embedding.whole.trained or self._tied_and_trained:
            return 0
        return embedding.gathered_bytes

    @property
    def _tied_and_trained(self) -> int:
        """Bytes of a trained embedding that is the head too: unsharded until backward ends."""
        embedding = self.group("embedding")
        return self._tied if embedding is not None and embedding.whole.trained else 0

    def _up_to(self, number: int) -> int:
        if not self.keeps_gathered:
            return self.layers[number].weights.gathered_bytes
        return sum(layer.weights.gathered_bytes for layer in self.layers[: number + 1])

    def _parts(self, gathered: int, flat: int) -> Parts:
        parts: Parts = {"gathered": gathered + self._always}
        if self.has_buffers and flat:
            parts["communication"] = flat
        return parts
