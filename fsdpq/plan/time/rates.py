"""How fast a GPU and its host do the work of a step: every constant, and what it was measured on.

One set of constants for all cards. It was fitted to one NVIDIA H200 (docs/benchmarks/gpu.md) and is
compared with what others measured on RTX 4090, RTX 3090 and A100 (docs/concepts/time.md): a card's
own numbers enter by its nominal rates only.
"""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.plan.hardware.machine import Gpu
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.time.work import Work
from fsdpq.plan.weights import Weights
from fsdpq.plan.workload import Workload
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import DoraOptions

PRODUCT_SHARE = 0.68
"""Of the nominal rate that products reach in a step. Alone, matrices of 7B and 70B reach 0.79 and
0.86 of it on an H200; those with adapters are narrow."""

ATTENTION_SHARE = 0.35
"""The same for flash attention, which spends its time on exponentials too."""

MEMORY_SHARE = 0.86
"""Of the nominal bandwidth: 2 x 2,056 of 4,800 GB/s."""

LAYER_BYTES = 100
"""Bytes that one forward of a layer passes over for each value of the residual stream: two norms in
fp32, two sums, transposed heads. Counted in transformers' operators."""

HEAD_BYTES = 18
"""The same for each value of queries and keys: rotary embedding."""

FEED_FORWARD_BYTES = 10
"""The same for each value inside the feed-forward: activation, product with the gate."""

ADAPTER_BYTES = 2
"""The same for each value that an adapter reads or writes."""

BACKWARD_PASSES = 2
"""What forward passes over, in backward."""

COMPILED_SHARE = 0.43
"""What `training.compile` leaves of these bytes: 11,650 against 9,790 tokens/s, 4 rows of 2,048."""

SCORE_BYTES = 24
"""Bytes that ``eager`` attention passes over for each pair of tokens and head."""

LOSS_BYTES = 30
"""The same for each logit."""

DEQUANTIZED_BYTES = 5.8
"""Bytes that one weight costs, as time at the memory's bandwidth: 0.33 ms for 235 million weights
of NF4 with double quantization on an H200, whose kernel moves 2.5 bytes."""

HQQ_DEQUANTIZED_BYTES = 48
"""The same for HQQ at 4 bits, which is made by operators of torch: 2.73 ms."""

HOST_DEQUANTIZE_S = 0.45e-3
"""Seconds that the host needs to start one dequantization and what belongs to it: one row of 2,048
tokens took 0.71 s over NF4 and 0.42 s over a bf16 base, and 20 dequantizations a layer differ."""

HOST_FORWARD_S, HOST_BACKWARD_S = 0.30e-3, 1.27e-3
"""The same for a product in forward, with all that a layer does beside it, and in backward: one row
of 2,048 tokens with and without checkpointing."""

HOST_DORA = 1.7
"""What DoRA makes of these: 1.21 s against 0.71 s."""

HOST_COMPILED = 0.86
"""What `training.compile` makes of these."""

OPTIMIZER_BYTES = 28
"""Bytes that AdamW passes over for a weight: weight, gradient, two means, read and written."""

HOST_OPTIMIZER_RATE = 1.0e9
"""Trained weights a second on the host: 0.2 s for LoRA r16 of 70B on 16 cores."""

HOST_PRODUCT_RATE = 1e12
"""Products of bf16 on the host that Muon's iterations reach, FLOP/s over all ranks: assumed."""

UNPINNED_BANDWIDTH = 8.7e9
"""Bytes/s to the device from memory that is not pinned, as pages of a file are."""

OVER_HOST_SHARE = 0.5
"""Of the bus, for a gather between GPUs without a link of their own: bytes go down and up again."""


@dataclass(frozen=True)
class ComputeTime:
    """Seconds that one rank computes in a step.

    Attributes:
        gpu_s: its kernels, forward and backward.
        host_s: what the host needs to start them.
        optimizer_s: the optimizer's step, wherever it runs.
    """

    gpu_s: float
    host_s: float
    optimizer_s: float

    @property
    def kernels_s(self) -> float:
        """Forward and backward: kernels and their starts run beside each other."""
        return max(self.gpu_s, self.host_s)

    @property
    def total_s(self) -> float:
        """And the optimizer's step after them."""
        return self.kernels_s + self.optimizer_s


def compute_time(
    work: Work, recipe: Recipe, shape: ModelShape, weights: Weights, workload: Workload, gpu: Gpu
) -> ComputeTime | None:
    """Returns how long one rank computes in a step.

    Args:
        work: of the step.
        recipe: resolved.
        shape: of the model.
        weights: of the run.
        workload: of the step.
        gpu: of the rank.

    Returns:
        None where the GPU is not known, or has no known rate for the dtype.
    """
    if gpu.bf16_flops is None or gpu.memory_bandwidth is None or not computes_fast(recipe, gpu):
        return None
    bandwidth, product_rate = gpu.memory_bandwidth * MEMORY_SHARE, gpu.bf16_flops * PRODUCT_SHARE
    products = (work.products + work.low_rank + work.head) / product_rate
    attention = work.attention / (gpu.bf16_flops * ATTENTION_SHARE)
    passed = _passed_bytes(work, recipe, shape, workload) / bandwidth
    host = (
        work.dequantizations * HOST_DEQUANTIZE_S
        + work.forward_linears * HOST_FORWARD_S
        + work.backward_linears * HOST_BACKWARD_S
    )
    host *= HOST_DORA if isinstance(recipe.adapter, DoraOptions) else 1.0
    host *= HOST_COMPILED if recipe.training.compile else 1.0
    return ComputeTime(
        gpu_s=products + attention + passed,
        host_s=host,
        optimizer_s=(
            _update_on_host_s(work, weights, workload)
            if updates_on_host(recipe)
            else weights.shard.num_trained * OPTIMIZER_BYTES / bandwidth
            + work.update / product_rate
        ),
    )


def computes_fast(recipe: Recipe, gpu: Gpu) -> bool:
    """Whether ``gpu.bf16_flops`` is the rate of this run: of 16 bits, of bf16 where it has that."""
    dtype = precision_of(recipe).compute
    return dtype == "fp16" or (dtype == "bf16" and gpu.has_bf16)


def _passed_bytes(work: Work, recipe: Recipe, shape: ModelShape, workload: Workload) -> float:
    """Returns the bytes that operations beside the products pass over."""
    tokens = workload.tokens
    inner = shape.moe_intermediate_size * shape.num_experts_per_tok or shape.intermediate_size
    heads = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    layer = LAYER_BYTES * shape.hidden_size + HEAD_BYTES * heads + FEED_FORWARD_BYTES * inner
    layer_passes = work.forward_layers + BACKWARD_PASSES * work.backward_layers
    passed = layer_passes * tokens * layer + work.adapter_values * ADAPTER_BYTES
    passed *= COMPILED_SHARE if recipe.training.compile else 1.0
    if recipe.model.attn_implementation == "eager":
        pairs = tokens * workload.seq_len * shape.num_attention_heads
        passed += layer_passes * pairs * SCORE_BYTES
    logits = workload.micro_batches * tokens * shape.vocab_size
    hqq = recipe.quantization.kind == "hqq"
    dequantized = work.dequantized * (HQQ_DEQUANTIZED_BYTES if hqq else DEQUANTIZED_BYTES)
    return passed + logits * LOSS_BYTES + dequantized


def updates_on_host(recipe: Recipe) -> bool:
    """Whether trained weights lie in host memory, where the optimizer's step is done then."""
    return recipe.fsdp.offload != "none" and recipe.fsdp.offload_trained


def _update_on_host_s(work: Work, weights: Weights, workload: Workload) -> float:
    """Returns the optimizer's seconds where the ranks of a machine share its cores."""
    own = weights.shard.num_trained / HOST_OPTIMIZER_RATE + work.update / HOST_PRODUCT_RATE
    return workload.num_local_ranks * own
