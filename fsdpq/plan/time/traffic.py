"""Bytes that a step moves: over the host's bus, between GPUs, between machines, from the disk.

What FSDP2 gathers and reduces, and when (`fsdpq.fsdp.wrap`, torch 2.13): a decoder layer in
forward, and again in backward where its weights are freed in between; embedding, head and the last
norm in forward, and the first two in backward only where they are trained. Under offload a rank
copies its own shard to the device for each gather. Of a ring of ``n`` ranks each receives
``(n - 1) / n`` of what is gathered, and sends as much of what is reduced.

Tests count the collectives of real steps on two ranks and find the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.plan.costs.parameters import DTYPE_BYTES, choice_of
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.time.work import RECOMPUTED_STEP, layers_in_order, trains_embedding
from fsdpq.plan.weights import Weights
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.optimizer import MuonOptions

MIN_OFFLOADED_BYTES = 64 << 10
"""Smaller inputs of layers stay on the device (`fsdpq.fsdp.activations.MIN_BYTES`)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of rank 0 in one step.

    Attributes:
        gathered: unsharded bytes that come out of gathers over ranks.
        received: what of them comes from other ranks.
        reduced: bytes of gradients that go into reductions to shards, unsharded.
        summed: bytes of gradients that are summed over copies of the base.
        sent: what of both goes to other ranks.
        shards_to_device: own shards under ``fsdp.offload``, copied for gathers.
        gradients_to_host: reduced gradients under ``fsdp.offload``.
        activations: inputs of layers that ``fsdp.activation_offload`` copies, one way; as many
            come back.
        read: of the file under ``fsdp.offload: disk``, by all ranks of one machine.
        network: into one machine, from others.
        num_gathers: gathers of groups, one after another; those of Muon are not counted.
        num_reductions: reductions to shards.
        num_sums: sums over copies of the base.
    """

    gathered: int = 0
    received: int = 0
    reduced: int = 0
    summed: int = 0
    sent: int = 0
    shards_to_device: int = 0
    gradients_to_host: int = 0
    activations: int = 0
    read: int = 0
    network: int = 0
    num_gathers: int = 0
    num_reductions: int = 0
    num_sums: int = 0


def step_traffic(recipe: Recipe, shape: ModelShape, weights: Weights) -> Traffic:
    """Returns the bytes of an optimizer step of a resolved recipe."""
    workload, num_shards = workload_of(recipe), weights.num_shards
    backward = backward_of(recipe, shape)
    times = [count * workload.micro_batches for count in _gathers(recipe, weights, backward)]
    groups = list(zip(weights.groups, times, strict=True))
    copied = sum(group.gathered_bytes * count for group, count in groups)
    gathered = copied + _updates(recipe, shape, num_shards) if num_shards > 1 else 0
    gradients = _gradient_bytes(recipe, weights, workload)
    reduced = gradients if num_shards > 1 else 0
    learning = sum(group.count for group in weights.groups if group.shard.num_trained)
    num_reductions = learning * _times_reduced(recipe, workload)
    num_copies = workload.num_ranks // num_shards
    summed = gradients // num_shards if num_copies > 1 else 0
    is_gpu, offload = recipe.launch.device == "cuda", recipe.fsdp.offload
    frozen = sum(group.shard.frozen * count for group, count in groups)
    trained = sum(group.shard.trained * count for group, count in groups)
    moves_trained = is_gpu and offload != "none" and recipe.fsdp.offload_trained
    return Traffic(
        gathered=gathered,
        received=gathered * (num_shards - 1) // num_shards,
        reduced=reduced,
        summed=summed,
        sent=reduced * (num_shards - 1) // num_shards + 2 * summed * (num_copies - 1) // num_copies,
        shards_to_device=frozen * (is_gpu and offload != "none") + trained * moves_trained,
        gradients_to_host=weights.shard.trained * _times_reduced(recipe, workload) * moves_trained,
        activations=_activations(recipe, shape, workload, backward) if is_gpu else 0,
        read=workload.num_local_ranks * frozen if offload == "disk" else 0,
        network=_over_network(recipe, workload, num_shards, gathered + reduced, gradients),
        num_gathers=sum(times) if num_shards > 1 else 0,
        num_reductions=num_reductions if num_shards > 1 else 0,
        num_sums=num_reductions if num_copies > 1 else 0,
    )


@dataclass(frozen=True)
class Backward:
    """Which decoder layers backward runs over.

    Attributes:
        num_layers: all of them, added ones too.
        first: the first of them; layers before it hold nothing that is trained.
    """

    num_layers: int
    first: int


def backward_of(recipe: Recipe, shape: ModelShape) -> Backward:
    """Returns which decoder layers backward runs over under a resolved recipe."""
    choice = choice_of(recipe, shape)
    layers = list(layers_in_order(choice))
    learning = (index for index, layer in enumerate(layers) if layer.learns)
    return Backward(len(layers), 0 if trains_embedding(choice) else next(learning, len(layers)))


def _gathers(recipe: Recipe, weights: Weights, backward: Backward) -> list[int]:
    """Returns how many gathers of all groups of a kind a micro-batch needs."""
    keeps = recipe.fsdp.strategy in ("shard_grad_op", "hybrid_shard_grad_op")
    # Backward fetches one layer ahead, also the one before the last that it needs.
    not_needed = max(0, backward.first - 1)
    counts: list[int] = []
    for group in weights.groups:
        if not group.gathered:
            counts.append(0)
        elif group.name == "root":
            counts.append(1)  # stays until backward is over
        elif group.name != "layer":
            counts.append(2 if group.shard.num_trained else 1)
        else:
            below = 0 if group.shard.num_trained else min(group.count, not_needed)
            not_needed -= below
            counts.append(group.count if keeps else 2 * group.count - below)
    return counts


def _updates(recipe: Recipe, shape: ModelShape, num_shards: int) -> int:
    """Returns the bytes of updates that Muon gathers, in bf16."""
    if not isinstance(recipe.optimizer, MuonOptions):
        return 0
    layers = layers_in_order(choice_of(recipe, shape))
    matrices = (matrix for layer in layers for matrix in layer.trained_matrices)
    return sum(num_shards * -(-rows // num_shards) * columns * 2 for rows, columns in matrices)


def _times_reduced(recipe: Recipe, workload: Workload) -> int:
    return 1 if recipe.fsdp.no_sync else workload.micro_batches


def _gradient_bytes(recipe: Recipe, weights: Weights, workload: Workload) -> int:
    """Returns the bytes of gradients of one copy of the base, padded and whole, in a step."""
    item_bytes = DTYPE_BYTES[precision_of(recipe).reduce]
    whole = weights.num_shards * weights.shard.num_trained * item_bytes
    return whole * _times_reduced(recipe, workload)


def _activations(recipe: Recipe, shape: ModelShape, workload: Workload, backward: Backward) -> int:
    """Returns the bytes of layers' inputs that go to the host in a step, one way."""
    every = RECOMPUTED_STEP.get(recipe.fsdp.activation_checkpointing)
    token_bytes = shape.hidden_size * DTYPE_BYTES[precision_of(recipe).base]
    smallest = workload.rows // workload.layer_chunks * workload.seq_len * token_bytes
    if every is None or not recipe.fsdp.activation_offload or smallest < MIN_OFFLOADED_BYTES:
        return 0
    kept = len([i for i in range(backward.first, backward.num_layers) if i % every == 0])
    # Backward begins with the last of them: it stays on the device.
    return max(0, kept - 1) * workload.tokens * token_bytes * workload.micro_batches


def _over_network(
    recipe: Recipe, workload: Workload, num_shards: int, in_shards: int, gradients: int
) -> int:
    """Returns the bytes that come into one machine: a ring comes in once.

    Copies of a base that several machines share are summed in as many rings as ranks of one of them
    hold shards: each machine sees the rings of its own shards only.
    """
    if recipe.launch.max_nodes == 1:
        return 0
    num_copies = workload.num_ranks // num_shards
    sums = 2 * gradients * (num_copies - 1) // num_copies
    if num_shards <= workload.num_local_ranks:
        return sums
    own_sums = sums * workload.num_local_ranks // num_shards
    return in_shards * (num_shards - 1) // num_shards + own_sums
