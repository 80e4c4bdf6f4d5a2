"""Makes a recipe small enough for a laptop: same settings, made-up weights and rows, few steps.

What decides how the pieces fit together stays as it is: quantizer, adapter, strategy, offload,
precision, checkpointing, packing, formats, optimizer, schedule. What decides how long it takes is
cut: model size, row length, batch, steps. What needs another machine is replaced, and named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LlamaProOptions
from fsdpq.recipe.sections.evaluation import EvaluationOptions

NUM_STEPS = 3
NUM_RANKS = 2
NUM_ROWS = 24
SEQ_LEN = 128
MICRO_BATCH_SIZE = 2
ACCUMULATION = 2
NUM_LAYERS = 4
"""Layers of the tiny model: enough for two groups of LLaMA-Pro and for every second one."""


@dataclass(frozen=True)
class Shrunk:
    """A recipe for a smoke run.

    Attributes:
        recipe: the small one.
        replaced: what could not stay as it is, one line each.
    """

    recipe: Recipe
    replaced: tuple[str, ...]


def shrink_recipe(recipe: Recipe) -> Shrunk:
    """Returns ``recipe`` with sizes cut and what this machine cannot do replaced."""
    replaced: list[str] = []
    changed: dict[str, Any] = {
        "name": f"{recipe.name[:90]}-smoke",
        "model": _shrink_model(recipe, replaced),
        "adapter": _shrink_adapter(recipe),
        "fsdp": recipe.fsdp.model_copy(update={"shard_size": None}),
        "data": recipe.data.model_copy(
            update={"seq_len": min(recipe.data.seq_len, SEQ_LEN), "max_rows": None}
        ),
        "lr_scheduler": _shrink_schedule(recipe),
        "training": _shrink_training(recipe, replaced),
        "checkpoint": recipe.checkpoint.model_copy(
            update={"interval": None if recipe.checkpoint.interval is None else 2}
        ),
        "evaluation": _shrink_evaluation(recipe, replaced),
        "metrics": _shrink_metrics(recipe, replaced),
        "launch": _shrink_launch(recipe, replaced),
    }
    small = recipe.model_copy(update=changed)
    return Shrunk(small, tuple(replaced))


def _shrink_model(recipe: Recipe, replaced: list[str]) -> Any:
    changed: dict[str, Any] = {"revision": None}
    if recipe.model.attn_implementation not in ("sdpa", "eager"):
        replaced.append(f"attention: `{recipe.model.attn_implementation}` by `sdpa`, on the CPU")
        changed["attn_implementation"] = "sdpa"
    if recipe.model.use_liger_kernel:
        replaced.append("kernels: Liger's by torch's own, on the CPU")
        changed["use_liger_kernel"] = False
    return recipe.model.model_copy(update=changed)


def _shrink_adapter(recipe: Recipe) -> Any:
    if isinstance(recipe.adapter, LlamaProOptions):
        changed = {"num_new_layers": NUM_LAYERS // 2, "expansion_rate": None}
        return recipe.adapter.model_copy(update=changed)
    return recipe.adapter


def _shrink_schedule(recipe: Recipe) -> Any:
    warmup = 1 if recipe.lr_scheduler.num_warmup_steps(1000) else None
    changed = {"warmup_steps": warmup, "warmup_ratio": None}
    return recipe.lr_scheduler.model_copy(update=changed)


def _shrink_training(recipe: Recipe, replaced: list[str]) -> Any:
    training = recipe.training
    if training.compile:
        replaced.append("compile: layers run as they are: compiling takes longer than the run")
    chunks = min(training.layer_chunks, MICRO_BATCH_SIZE)
    accumulates = (training.gradient_accumulation_steps or 2) > 1
    rows = MICRO_BATCH_SIZE * NUM_RANKS * (ACCUMULATION if accumulates else 1)
    changed = {
        "steps": NUM_STEPS,
        "epochs": None,
        "global_batch_size": rows,
        "gradient_accumulation_steps": None,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "layer_chunks": chunks,
        "compile": False,
        "eval_interval": None if training.eval_interval is None else 2,
    }
    return training.model_copy(update=changed)


def _shrink_evaluation(recipe: Recipe, replaced: list[str]) -> EvaluationOptions:
    if recipe.evaluation.tasks:
        replaced.append("evaluation: no task is run: their questions would be downloaded")
    return EvaluationOptions()


def _shrink_metrics(recipe: Recipe, replaced: list[str]) -> Any:
    metrics = recipe.metrics
    changed: dict[str, Any] = {"log_interval": 1}
    if metrics.sample_prompts:
        changed |= {"sample_prompts": metrics.sample_prompts[:1], "sample_max_new_tokens": 4}
    if "wandb" in metrics.sinks:
        replaced.append("metrics: nothing is sent to wandb")
        changed["sinks"] = tuple(sink for sink in metrics.sinks if sink != "wandb")
    if metrics.profile is not None:
        changed["profile"] = metrics.profile.model_copy(update={"start_step": 2, "num_steps": 1})
    return metrics.model_copy(update=changed)


def _shrink_launch(recipe: Recipe, replaced: list[str]) -> Any:
    launch, fields = recipe.launch, type(recipe.launch).model_fields
    if launch.scheduler != "local" or launch.max_nodes > 1:
        replaced.append(f"launch: {launch.nnodes} x {launch.scheduler} by this machine")
    changed = {
        "nproc_per_node": NUM_RANKS,
        "nnodes": 1,
        **{name: fields[name].default for name in ("join_timeout_s", "node_timeout_s")},
        "device": "cpu",
        "rdzv_endpoint": None,
        "scheduler": "local",
    }
    return launch.model_copy(update=changed)
