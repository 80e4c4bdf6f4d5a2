"""The moments of a run at which memory may be at its most."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fsdpq.plan.costs.parameters import DTYPE_BYTES
from fsdpq.plan.device.build_layers import PlannedLayer, build_layers, sizes_of
from fsdpq.plan.device.gathers import Gathers
from fsdpq.plan.device.load import init_bytes, load_bytes
from fsdpq.plan.device.loss import Loss, loss_passes
from fsdpq.plan.device.overhead import WORKSPACE_BYTES, overhead
from fsdpq.plan.device.resident import Resident
from fsdpq.plan.device.tape import Parts, joined, times
from fsdpq.plan.device.update import step_bytes
from fsdpq.plan.result import Category, Moment, Phase, RankMemory
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.weights import Weights
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe

NORMED = 4
"""Hidden states that the last norm leaves in bf16: its input, a copy in fp32, its output."""

INPUTS_ON_THE_WAY = 2
"""Inputs of layers on the device where ``fsdp.activation_offload`` keeps them on the host: one in
use, and one that is copied (`fsdpq.fsdp.activations`)."""


def plan_device_memory(recipe: Recipe, shape: ModelShape, weights: Weights) -> RankMemory:
    """Returns the memory of rank 0 on its device, on a CPU that of the process.

    Every row is ``data.seq_len`` long, and micro-batches are full.

    Args:
        recipe: resolved (`fsdpq.launch.machine.resolve`).
        shape: of the model.
        weights: of ``fsdpq.plan.weights.plan_weights`` for both.
    """
    work = workload_of(recipe)
    fsdp = recipe.fsdp
    resident = Resident(recipe, shape, weights, work)
    layers = build_layers(recipe, shape, weights, work)
    gathers = Gathers(
        layers,
        weights,
        has_buffers=weights.num_shards > 1,
        keeps_gathered=fsdp.strategy in ("shard_grad_op", "hybrid_shard_grad_op"),
        reduce_bytes=DTYPE_BYTES[precision_of(recipe).reduce],
    )
    return RankMemory(tuple(_Run(recipe, shape, work, layers, resident, gathers).moments()))


@dataclass(frozen=True)
class _Run:
    """A run as its moments need it."""

    recipe: Recipe
    shape: ModelShape
    work: Workload
    layers: tuple[PlannedLayer, ...]
    resident: Resident
    gathers: Gathers

    def moments(self) -> Iterator[Moment]:
        """Yields the moments in the order of a run."""
        recipe, shape, resident = self.recipe, self.shape, self.resident
        weights = resident.weights
        stored = resident.stored()
        load: Parts = {"load": load_bytes(recipe, shape, weights)}
        yield self._moment("load", "loading the largest matrix", stored, load)
        init: Parts = {"load": init_bytes(recipe, shape, weights)}
        yield self._moment("init", "making the adapter", stored, init)
        if self.gathers.has_buffers:
            here: Parts = {"layer_inputs": self._hidden_bytes}
            gathered = self.gathers.gathering_first()
            yield self._moment("forward", "gathering layer 1", self._steady, here, gathered)
        spans = self._spans()
        for number in sorted({last for _, last in spans}):
            yield self._forward(number)
        yield from self._loss()
        # Above the last layer nothing was reduced, and below the first nothing is fetched.
        numbers = {n for first, last in spans for n in (first, min(first + 1, last), last)}
        for number in sorted(numbers, reverse=True):
            yield self._backward(number)
        yield from self._embedding()
        update: Parts = {"optimizer": 0}
        if resident.trained_is_here:
            update["optimizer"] = step_bytes(recipe, weights)
        name = "the optimizer's step"
        yield self._moment("optimizer", name, self._between, resident.reduced(), update)

    def _spans(self) -> list[tuple[int, int]]:
        """Returns the first and the last layer of each kind."""
        found: dict[tuple[int, bool], tuple[int, int]] = {}
        for number, layer in enumerate(self.layers):
            key = (id(layer.passes), layer.recomputed)
            found[key] = (found.get(key, (number, number))[0], number)
        return list(found.values())

    def _moment(self, phase: Phase, name: str, *parts: Mapping[Category, int]) -> Moment:
        total = joined(*parts)
        if self.resident.on_gpu:
            total |= {"workspace": WORKSPACE_BYTES if phase not in ("load", "init") else 0}
            total |= overhead(total)
        return Moment(phase, name, {category: n for category, n in total.items() if n})

    @functools.cached_property
    def _between(self) -> Parts:
        """What is held throughout a step."""
        resident = self.resident
        return joined(resident.stored(), resident.optimizer(), resident.batch())

    @functools.cached_property
    def _steady(self) -> Parts:
        """What is held throughout forward and backward."""
        return joined(self._between, self.resident.shared(), self.resident.accumulated())

    @property
    def _hidden_bytes(self) -> int:
        """Bytes of the residual stream of a micro-batch."""
        return self.work.tokens * self.shape.hidden_size * sizes_of(self.recipe).hidden

    @property
    def _inputs_leave(self) -> bool:
        return self.recipe.fsdp.activation_offload and self.resident.on_gpu

    def _kept(self, last: int, *, at_most: int) -> Parts:
        """Returns what layers up to ``last`` keep between forward and backward.

        Args:
            last: number of a layer.
            at_most: inputs of recomputed layers that are here where they go to the host.
        """
        inputs, beside = 0, 0
        graphs: dict[int, tuple[Parts, int]] = {}
        for layer in self.layers[: last + 1]:
            if layer.is_trained and layer.recomputed:
                inputs += 1
            elif layer.is_trained:
                before = graphs.get(id(layer.passes), (layer.passes.kept, 0))[1]
                graphs[id(layer.passes)] = (layer.passes.kept, before + 1)
                beside += layer.keeps_input
        chunks = self.work.layer_chunks
        kept = joined(*(times(parts, chunks * count) for parts, count in graphs.values()))
        if self._inputs_leave:
            inputs = min(inputs, at_most)
        return joined(kept, {"layer_inputs": (inputs + beside) * self._hidden_bytes})

    @functools.cached_property
    def _gradients_from(self) -> list[int]:
        """For every layer, bytes of the gradients of it and all above; then those above all."""
        above = self.resident.gradients_above()
        from_last = (self.resident.gradients(layer.weights) for layer in reversed(self.layers))
        return [*itertools.accumulate(from_last, initial=above)][::-1]

    def _forward(self, number: int) -> Moment:
        layer = self.layers[number]
        keeps = layer.is_trained and not layer.recomputed
        own = joined(layer.passes.graph if keeps else layer.passes.plain)
        chunks = self.work.layer_chunks
        if chunks > 1:
            # Outputs of the chunks before; all of them are joined at the end.
            outputs = self._hidden_bytes - self._hidden_bytes // chunks
            own = joined(own, {"recomputed": outputs})
            joining: Parts = {"recomputed": 2 * self._hidden_bytes}
            own = max(own, joining, key=lambda parts: sum(parts.values()))
        before = self._kept(number - 1, at_most=0)
        here: Parts = {"layer_inputs": self._hidden_bytes}
        gathered = self.gathers.in_forward(number)
        name = f"forward of layer {number + 1}"
        return self._moment("forward", name, self._steady, before, here, own, gathered)

    def _loss(self) -> Iterator[Moment]:
        loss = self._loss_sizes()
        forward, backward = loss_passes(loss)
        kept = self._kept(len(self.layers) - 1, at_most=INPUTS_ON_THE_WAY)
        if copying := self.gathers.into_head():
            normed: Parts = {"recomputed": NORMED * self._hidden_bytes}
            name = "gathering the head"
            yield self._moment("forward", name, self._steady, kept, normed, copying)
        gathered = self.gathers.in_loss()
        yield self._moment("forward", "the loss", self._steady, kept, forward, gathered)
        if not loss.trained_bytes:
            gathered = self.gathers.after_loss()
        name = "backward of the loss"
        yield self._moment("backward", name, self._steady, kept, backward, gathered)

    def _loss_sizes(self) -> Loss:
        sizes = sizes_of(self.recipe)
        head = self.gathers.group("head") or self.gathers.group("embedding")
        trained = head is not None and head.whole.trained > 0
        elements = self.shape.vocab_size * self.shape.hidden_size
        return Loss(
            tokens=self.work.tokens,
            rows=self.work.rows,
            hidden_size=self.shape.hidden_size,
            vocab_size=self.shape.vocab_size,
            element=sizes.hidden,
            softcap=self.shape.softcap,
            trained_bytes=elements * sizes.weight if trained else 0,
            on_cpu=not self.resident.on_gpu,
            norm=self.layers[-1].norm,
        )

    def _backward(self, number: int) -> Moment:
        layer, hidden = self.layers[number], self._hidden_bytes
        own = joined(layer.passes.again if layer.recomputed else layer.passes.backward)
        if layer.recomputed or layer.keeps_input:
            own = joined(own, {"layer_inputs": hidden})
        chunks = self.work.layer_chunks
        if chunks > 1:
            # The gradient of all outputs, and those of the inputs of chunks that are done.
            own = joined(own, {"recomputed": 2 * (hidden - hidden // chunks)})
        before = self._kept(number - 1, at_most=INPUTS_ON_THE_WAY - 1)
        done: Parts = {"communication": self.gathers.reduced_before(number)}
        if not self.resident.accumulates:
            done["gradients"] = self._gradients_from[number + 1]
        elif not layer.weights.gathered:
            own["gradients"] = 0  # added to those of earlier micro-batches, one by one
        gathered = self.gathers.in_backward(number)
        name = f"backward of layer {number + 1}"
        return self._moment("backward", name, self._steady, before, own, done, gathered)

    def _embedding(self) -> Iterator[Moment]:
        """Yields the backward of a trained embedding: its gradient is whole, then reduced."""
        embedding, head = self.gathers.group("embedding"), self.gathers.group("head")
        if embedding is None or not embedding.whole.trained:
            return
        gradient = embedding.whole.num_trained * sizes_of(self.recipe).weight
        buffer = self.gathers.reduce_buffer(embedding)
        # That of a head that is the embedding too is there; the lookup's is added to it.
        own = gradient + buffer if head is not None else max(gradient, buffer)
        parts: Parts = {"gradients": own, "recomputed": self._hidden_bytes}
        if not self.resident.accumulates:
            parts["gradients"] += self._gradients_from[0]
        gathered: Parts = {"gathered": embedding.gathered_bytes}
        yield self._moment("backward", "backward of the embedding", self._steady, parts, gathered)
