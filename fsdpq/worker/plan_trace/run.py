"""The worker's own training step under fake tensors, for the memory that rank 0 would take.

Everything is the worker's: the meta model, the adapter, ``fully_shard``, the step, the optimizer.
Only tensors have no values. What looks at values is left out, and takes no memory worth a name:
initial values, the scaling of gradients, a loss scaler.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fsdpq.data.dealing.collate import MicroBatch, Step
from fsdpq.errors import PlanError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.buffers import allocate
from fsdpq.model.meta import count_parameters
from fsdpq.model.quantized_experts import QuantizedExperts
from fsdpq.plan.result import Moment, Phase, RankMemory
from fsdpq.plan.traced import Traced
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.protocols import DTYPES, Adapter
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.assemble import apply_adapter, build_model, shard_model
from fsdpq.worker.plan_trace import attention, unreal_gpu
from fsdpq.worker.plan_trace.tags import Tags
from fsdpq.worker.plan_trace.tracker import Tracker

STEP_PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


class _GpuDropout(TorchFunctionMode):
    """Drops as a GPU does: with a mask of one byte an element."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces ``functional.dropout``."""
        del types
        kwargs = kwargs or {}
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    del inplace
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def trace_step(
    recipe: Recipe,
    config_dir: Path,
    *,
    num_weights: int | None = None,
    trust_remote_code: bool = False,
) -> Traced:
    """Returns what rank 0 of a resolved recipe allocates in a step.

    Ranks: one process stands for rank 0; it joins a process group of its own.

    Args:
        recipe: resolved; its ``launch`` says how many ranks there are and on what.
        config_dir: holds the model's ``config.json``.
        num_weights: that the model must have, None where nobody knows.
        trust_remote_code: run Python code that the model brings.

    Raises:
        PlanError: a step of this recipe depends on values, or the model is another one.
    """
    started = time.perf_counter()
    device = torch.device("cpu")
    if recipe.launch.device != "cpu":
        device = unreal_gpu.register_unreal_gpu()
    attention.register_attention()
    traced, notes = traceable(recipe)
    workload = workload_of(recipe)
    with unreal_gpu.unreal_group(workload):
        model = build_sharded(
            traced, config_dir, device, num_weights=num_weights,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        tracker = track_step(traced, model, device)
    return _result(tracker, device, notes, time.perf_counter() - started)


def track_step(recipe: Recipe, model: CausalLM, device: torch.device) -> Tracker:
    """Returns what a step of a sharded model that is still on meta allocates on ``device``."""
    tags = Tags()
    tracker = Tracker(
        category=tags.category,
        node_made=tags.node_made,
        where=lambda: tags.where,
        round_on=unreal_gpu.NAME,
    )
    with ExitStack() as modes:
        modes.enter_context(torch.autograd.set_multithreading_enabled(False))
        if device.type != "cpu":
            modes.enter_context(_GpuDropout())
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        modes.enter_context(tracker)
        _step(recipe, model, tags, tracker, device=device)
    return tracker


def traceable(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Returns ``recipe`` without what fake tensors cannot do, and what that was."""
    notes: list[str] = []
    model, data, training = recipe.model, recipe.data, recipe.training
    if model.attn_implementation in ("flash_attention_2", "flex_attention"):
        notes.append(f"attention: torch's flash kernel instead of `{model.attn_implementation}`")
    elif model.dtype == "fp32" and recipe.launch.device != "cpu":
        notes.append("attention: torch's flash kernel, which does not take fp32 on a GPU")
    if model.use_liger_kernel:
        notes.append("kernels: torch's own instead of Liger's")
    if data.packing != "none":
        notes.append("packing: every row is one document")
    if training.compile:
        notes.append("compile: layers run as they are")
    kind = "eager" if model.attn_implementation == "eager" else attention.NAME
    changed = {"attn_implementation": kind, "use_liger_kernel": False}
    return recipe.model_copy(
        update={
            "model": model.model_copy(update=changed),
            "data": data.model_copy(update={"packing": "none"}),
            "training": training.model_copy(update={"compile": False}),
        }
    ), tuple(notes)


def build_sharded(
    recipe: Recipe,
    config_dir: Path,
    device: torch.device,
    *,
    num_weights: int | None,
    trust_remote_code: bool,
) -> CausalLM:
    """Returns the sharded model, on meta.

    Raises:
        PlanError: which experts see how many tokens depends on values, or the weights are others.
    """
    adapter: Adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    dtype = DTYPES[recipe.model.dtype]
    model = build_model(
        recipe, config_dir, adapter, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if any(isinstance(module, QuantizedExperts) for module in model.modules()):
        raise PlanError(
            "a mixture of experts cannot be traced: which expert sees how many tokens depends on "
            "values",
            hint="leave `--trace` out; `--measure` runs it for real on one GPU",
        )
    check_num_weights(model, num_weights)
    apply_adapter(model, adapter)
    shard_model(model, recipe, device, precision=precision_of(recipe))
    return model


def check_num_weights(model: CausalLM, num_weights: int | None) -> None:
    """Compares a model that was built from a shape with that shape.

    Raises:
        PlanError: transformers builds another model from the same sizes.
    """
    found, _ = count_parameters(model)
    num_layers = len(model.decoder_layers)
    is_expanded = len(set(model.layer_sources)) != num_layers
    if num_weights is None or is_expanded or found == num_weights:
        return
    raise PlanError(
        f"transformers builds a model of {found:,} weights from sizes that have {num_weights:,}",
        hint="give the directory of the model, or of its `config.json`, in `model.name_or_path`",
    )


def _step(
    recipe: Recipe,
    model: CausalLM,
    tags: Tags,
    tracker: Tracker,
    *,
    device: torch.device,
) -> None:
    fsdp, workload = recipe.fsdp, workload_of(recipe)
    shards = device if fsdp.offload == "none" else torch.device("cpu")
    allocate(
        model, shards, buffers=device, trained=None if fsdp.offload_trained else device
    )  # fmt: skip
    tags.watch(model, tracker)
    optimizer = _with_states(recipe, model, tags)
    parameters = [p for p in model.parameters() if p.requires_grad]
    tracker.begin_phase("forward")

    left = workload.micro_batches

    def on_phase(phase: str) -> None:
        nonlocal left
        tags.default = "recomputed"
        left -= phase == "backward"
        if left or phase == "forward":
            tracker.begin_phase("backward" if phase == "forward" else "forward")
            return
        for parameter in parameters:
            tracker.retag(parameter.grad, "gradients")
        tags.default, tags.where = "optimizer", "the optimizer's step"
        tracker.begin_phase("optimizer")

    train_step(
        model, full_step(workload), optimizer=optimizer, parameters=parameters,
        max_grad_norm=None, device=device,
        mode=StepMode(no_sync=fsdp.no_sync, on_phase=on_phase),
    )  # fmt: skip


def _with_states(recipe: Recipe, model: CausalLM, tags: Tags) -> torch.optim.Optimizer:
    """Returns the optimizer with its states, which a first step would make."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = resolve_builder("optimizer", recipe.optimizer)(recipe.optimizer, named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    tags.default = "optimizer"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tags.default = "recomputed"
    return optimizer


def full_step(workload: Workload) -> Step:
    """Returns a step of rank 0 whose rows are all as long as they may be."""
    shape, count = (workload.rows, workload.seq_len), workload.rows * (workload.seq_len - 1)
    index = torch.zeros(count, dtype=torch.int64)
    ids = torch.zeros(shape, dtype=torch.int64)
    batch = MicroBatch(ids, index, index.clone(), ids.bool(), workload.tokens)
    batches = [batch] * workload.micro_batches
    return Step(batches, workload.global_rows * (workload.seq_len - 1), workload.step_tokens)


def _result(
    tracker: Tracker, device: torch.device, notes: tuple[str, ...], seconds: float
) -> Traced:
    moments = tuple(
        Moment(phase, peak.where, dict(sorted(peak.parts.items())))
        for phase in STEP_PHASES
        if (peak := tracker.peaks.get((device.type, phase))) is not None
    )
    found = [tracker.peaks.get(("cpu", phase)) for phase in STEP_PHASES]
    host = max((p for p in found if p is not None), key=lambda p: p.total, default=None)
    parts: dict[str, int] = {} if host is None or device.type == "cpu" else {**host.parts}
    return Traced("trace", RankMemory(moments), parts, seconds, notes=notes)
