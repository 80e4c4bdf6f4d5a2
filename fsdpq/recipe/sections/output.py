"""``export`` and ``metrics``: what a run leaves behind, what it measures and where that goes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fsdpq.recipe.options import Options


class ExportOptions(Options):
    """What a finished run leaves behind."""

    format: Literal["auto", "peft", "transformers", "delta"] = "auto"
    """``peft`` is ``adapter_config.json`` and ``adapter_model.safetensors``, for low-rank adapters;
    ``transformers`` is a whole model, for ``llama_pro`` and full finetuning; ``delta`` is only what
    ``llama_pro`` trained, and which base it belongs to; ``auto`` is ``peft`` or ``transformers``,
    as fits ``adapter.kind``."""

    verify: bool = True
    """Load what was written with stock transformers and PEFT before the run counts as finished, and
    compare logits on fixed prompts with those of the trained model. One decoder layer at a time is
    dequantized."""

    merge: bool = False
    """Also write the base model with what was trained merged into its weights, into ``merged/`` of
    the run directory, with a receipt; ``fsdpq merge`` does it later."""

    merge_onto: Literal["dequantized", "original"] = "dequantized"
    """Which weights of the base: the quantized ones that were trained over, dequantized, give the
    trained model; the ``original`` ones of the checkpoint give another."""

    merge_requantize: Literal["nf4", "hqq"] | None = None
    """Quantize the merged weights: ``nf4`` is bitsandbytes' 4-bit format, which transformers loads,
    ``hqq`` a quantized base of fsdpq's own; null writes the merged weights themselves."""

    merge_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Of the weights of the merged model; null is that of the base."""


class WandbOptions(Options):
    """Weights & Biases; needs ``wandb`` in ``metrics.sinks``.

    A process of its own sends the run: nothing but the end of the run waits for the service.
    """

    project: str | None = Field(default=None, min_length=1, max_length=128)
    """Project that the run appears in; the sink needs it."""

    entity: str | None = Field(default=None, min_length=1)
    """User or team that owns the project; null is your default."""

    group: str | None = Field(default=None, min_length=1)
    """Runs of one group are shown together; a sweep is a group."""

    job_type: str | None = Field(default=None, min_length=1, max_length=64)
    """What kind of run it is, within its group."""

    name: str | None = Field(default=None, min_length=1, max_length=128)
    """Name of the run there; null is the name of the run directory."""

    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Labels of the run."""

    mode: Literal["online", "offline", "disabled"] = "online"
    """``offline`` writes files that ``wandb sync`` sends later; ``disabled`` does nothing. The
    variable ``WANDB_MODE`` can ask for less than the recipe, never for more."""

    log_adapter: bool = False
    """Upload what the run exported, an adapter or a whole model, as an artifact, once it is
    verified. ``finish_timeout_s`` has to leave time for that."""

    finish_timeout_s: float = Field(default=60.0, gt=0, le=86400)
    """How long the end of the run waits for what is left to be sent, in seconds; ``wandb sync``
    sends the rest."""


class ProfileOptions(Options):
    """torch's profiler: one trace a rank in ``profile/`` of the run directory."""

    start_step: int = Field(default=3, ge=1)
    """First step that is traced, counted from 1; the ones before warm up."""

    num_steps: int = Field(default=2, ge=1, le=100)
    """Steps that are traced."""


class MetricsOptions(Options):
    """What is measured and shown."""

    log_interval: int = Field(default=1, ge=1)
    """Steps between two lines of metrics. In between fsdpq reads nothing from the device, except
    with fp16, where each step asks whether its gradients overflowed."""

    sinks: tuple[Literal["jsonl", "tensorboard", "wandb"], ...] = ("jsonl",)
    """Where metrics go; ``metrics.jsonl`` is always written. ``tensorboard`` and ``wandb`` need the
    package of that name."""

    wandb: WandbOptions = WandbOptions.model_construct()
    """Settings of the sink ``wandb``."""

    log_memory: bool = False
    """Write memory by phase for every step to ``metrics.jsonl``: after forward, backward and
    optimizer. Without it that is done for the first two steps, beside the start, sharding, load and
    the initial values; the report compares them with the plan."""

    profile: ProfileOptions | None = None
    """Trace some steps; null traces none."""

    sample_prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Prompts answered (greedily) before and after training."""

    sample_max_new_tokens: int = Field(default=48, ge=1)
    """Longest answer in tokens."""
