"""Rules about ``checkpoint``, ``export`` and ``metrics``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import has_no_effect, is_default
from fsdpq.recipe.checks.quantization import repeated
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.output import WandbOptions


def check_export_fits_adapter(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``export.format`` that cannot hold what ``adapter.kind`` trains."""
    low_rank, kind = recipe.adapter.kind in ("lora", "dora"), recipe.adapter.kind
    if recipe.export.format == "peft" and not low_rank:
        message = f"`export.format: peft` holds low-rank adapters, and `adapter.kind` is `{kind}`"
        yield Problem(message, "export.format", hint="use `format: transformers`")
    if recipe.export.format == "transformers" and low_rank:
        message = "`export.format: transformers` holds a whole model, and `adapter.kind` is"
        hint = "use `format: peft`, and `merge: true` for a whole model beside it"
        yield Problem(f"{message} `{kind}`", "export.format", hint=hint)
    if recipe.export.format == "delta" and kind != "llama_pro":
        message = "`export.format: delta` holds trained projections of new layers, and"
        hint = f"use `format: {'peft' if low_rank else 'transformers'}`"
        yield Problem(f"{message} `adapter.kind` is `{kind}`", "export.format", hint=hint)


def check_merge_has_adapter(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``export.merge`` where the run leaves a whole model anyway."""
    kind = recipe.adapter.kind
    if kind not in ("lora", "dora") and recipe.export.format != "delta":
        reason = f"with `adapter.kind: {kind}`: the whole model is written anyway"
        yield from has_no_effect(recipe, "export", "merge", reason)


def check_merge_settings_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """How to merge, without ``export.merge``, or with nothing to choose from."""
    if not recipe.export.merge:
        hint = "add `merge: true` to `export`, or delete it"
        for field in ("merge_onto", "merge_requantize", "merge_dtype"):
            yield from has_no_effect(recipe, "export", field, "without `export.merge`", hint)
    elif recipe.quantization.kind == "none":
        reason = "with `quantization.kind: none`: there are only the original weights"
        yield from has_no_effect(recipe, "export", "merge_onto", reason)


def check_keep_last_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``checkpoint.keep_last`` without checkpoints."""
    checkpoint = recipe.checkpoint
    if not saves_checkpoints(recipe) and not checkpoint.keep_best:
        hint = "add `interval: 100` to `checkpoint`, or delete `keep_last`"
        reason = "without `checkpoint.interval`"
        yield from has_no_effect(recipe, "checkpoint", "keep_last", reason, hint)


def check_best_is_evaluated(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``checkpoint.keep_best`` without evaluations during training."""
    if recipe.training.eval_interval is None:
        hint = "add `eval_interval: 100` to `training`, or delete `keep_best`"
        reason = "without `training.eval_interval`"
        yield from has_no_effect(recipe, "checkpoint", "keep_best", reason, hint)


def saves_checkpoints(recipe: Recipe) -> bool:
    """Whether checkpoints are saved by steps or by time."""
    return recipe.checkpoint.interval is not None or recipe.checkpoint.interval_minutes is not None


def check_sinks_differ(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A sink of metrics that is listed twice."""
    yield from repeated(recipe.metrics.sinks, "metrics.sinks")


def check_wandb_has_project(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """The sink ``wandb`` without a project, unless its mode is ``disabled``."""
    wandb = recipe.metrics.wandb
    if "wandb" in recipe.metrics.sinks and wandb.project is None and wandb.mode != "disabled":
        message = "the sink `wandb` needs `metrics.wandb.project`"
        hint = "add `wandb: {project: my-project}` to `metrics`"
        yield Problem(message, "metrics.sinks", hint=hint)


def check_wandb_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Settings of ``wandb`` without the sink."""
    if "wandb" in recipe.metrics.sinks:
        return
    for field in WandbOptions.model_fields:
        if not is_default(recipe.metrics.wandb, field):
            key = f"metrics.wandb.{field}"
            message = f"`{key}` has no effect: `wandb` is not in `metrics.sinks`"
            yield Problem(message, key, hint="add it to `metrics.sinks`, or delete `wandb`")


def check_profile_ends(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A profile of steps that the run does not have."""
    profile, steps = recipe.metrics.profile, recipe.training.steps
    if profile is None or steps is None:
        return
    last = profile.start_step + profile.num_steps - 1
    if last > steps:
        message = f"`metrics.profile` traces steps {profile.start_step} to {last}, and the run has"
        hint = "lower `start_step` or `num_steps`, or raise `training.steps`"
        yield Problem(f"{message} {steps}", "metrics.profile", hint=hint)


def check_sample_length_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """A length of samples without a prompt."""
    if not recipe.metrics.sample_prompts:
        hint = "add a prompt to `metrics.sample_prompts`, or delete it"
        field = "sample_max_new_tokens"
        yield from has_no_effect(recipe, "metrics", field, "without `sample_prompts`", hint)


def note_restarts_from_zero(recipe: Recipe, _base_dir: Path) -> Iterator[str]:
    """Restarts without checkpoints: each begins at the first step."""
    if recipe.launch.max_restarts and not saves_checkpoints(recipe):
        yield "without `checkpoint.interval` each of `launch.max_restarts` begins at step 1"


CHECKS = (
    check_export_fits_adapter,
    check_merge_has_adapter,
    check_merge_settings_used,
    check_keep_last_used,
    check_best_is_evaluated,
    check_sinks_differ,
    check_wandb_has_project,
    check_wandb_used,
    check_profile_ends,
    check_sample_length_used,
)
NOTICES = (note_restarts_from_zero,)
