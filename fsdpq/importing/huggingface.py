"""Training arguments and FSDP settings that axolotl, LLaMA-Factory and TRL share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsdpq.importing.draft import Always, Choice, Draft, Lost, Part, Rule, To, With
from fsdpq.importing.optimizers import NO_OPTIMIZER, NO_SCHEDULE, OPTIMIZERS, SCHEDULES
from fsdpq.importing.values import (
    boolean,
    mapping,
    names,
    number,
    text,
    whole,
)

BY_ITSELF = "fsdpq loads, wraps and saves in one way, which needs no setting"
DATA_LOADING = "rows are tokenized ahead and dealt out by fsdpq's own loader"
STEPS_ONLY = "it counts steps: set `{}`"

ATTENTION: dict[str, Any] = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": ("flash_attention_2", "version 2 is the one that fsdpq knows"),
    "flex_attention": "flex_attention",
}

STRATEGIES: dict[str, str] = {
    "full_shard": "full_shard",
    "shard_grad_op": "shard_grad_op",
    "no_shard": "ddp",
    "hybrid_shard": "hybrid_full_shard",
    "hybrid_shard_zero2": "hybrid_shard_grad_op",
    "1": "full_shard",
    "2": "shard_grad_op",
    "3": "ddp",
    "4": "hybrid_full_shard",
    "5": "hybrid_shard_grad_op",
    "true": "full_shard",
    "false": "shard_grad_op",
}


def read_fsdp_words(draft: Draft, key: str, value: Any) -> None:
    """Reads ``fsdp: full_shard auto_wrap offload``, a string or a list."""
    words = names(value.replace(" ", ",") if isinstance(value, str) else value)
    unknown: list[str] = []
    for word in words:
        if word == "offload":
            draft.put("fsdp.offload", "cpu", key=key)
        elif word in STRATEGIES and word.isidentifier() and word not in ("true", "false"):
            draft.put("fsdp.strategy", STRATEGIES[word], key=key)
        elif word != "auto_wrap":
            unknown.append(word)
    draft.note("converted", key, target="fsdp.strategy")
    if unknown:
        draft.note("no_counterpart", key, f"`{unknown[0]}` is no way of sharding here")


def read_checkpointing(draft: Draft, key: str, value: Any) -> None:
    """Reads a switch of activation checkpointing; one that is on wins over others."""
    target = "fsdp.activation_checkpointing"
    if str(value).lower() in ("unsloth", "offload", "offload_disk"):
        draft.put(target, "full", key=key)
        draft.put("fsdp.activation_offload", True, key=key)
        draft.note("converted", key, target=f"{target}, fsdp.activation_offload")
        return
    if boolean(value) or not draft.has(target):
        draft.put(target, "full" if boolean(value) else "none", key=key)
    draft.note("converted", key, target=target)


def read_fsdp_checkpointing(draft: Draft, key: str, value: Any) -> None:
    """Reads FSDP's own switch of activation checkpointing, beside which the trainer has another."""
    if boolean(value):
        draft.put("fsdp.activation_checkpointing", "full", key=key)
        draft.note("converted", key, target="fsdp.activation_checkpointing")
    else:
        draft.note("built_in", key, "asks for nothing")


def read_policy(draft: Draft, key: str, value: Any) -> None:
    """Reads the dtype that FSDP gathers weights and sums gradients in."""
    word = str(value).lower()
    if isinstance(draft.at("fsdp.precision"), str):
        draft.note("dropped", key, "all is in the dtype of `fsdp.precision`")
    elif word in ("bf16", "fp16"):
        draft.put("fsdp.precision.compute", word, key=key)
        if word == "bf16":
            draft.put("fsdp.precision.reduce", word, key=key)
        draft.note("converted", key, target="fsdp.precision")
    elif word == "fp32":
        draft.note("built_in", key, "gradients are summed in fp32")
    else:
        draft.note("no_counterpart", key, "write a mapping: see `fsdpq kinds fsdp`, `precision`")


def read_offload(draft: Draft, key: str, value: Any) -> None:
    """Reads a switch of parameter offload."""
    if boolean(value):
        draft.put("fsdp.offload", "cpu", key=key)
    draft.note("converted", key, target="fsdp.offload")


def read_grad_norm(draft: Draft, key: str, value: Any) -> None:
    """Reads a clipping norm, of which 0 means no clipping."""
    draft.put("training.max_grad_norm", number(value) or None, key=key)
    draft.note("converted", key, target="training.max_grad_norm")


def read_log_interval(draft: Draft, key: str, value: Any) -> None:
    """Reads steps between log lines; a share of all steps has no counterpart."""
    if 0 < number(value) < 1:
        draft.note("no_counterpart", key, STEPS_ONLY.format("metrics.log_interval"))
        return
    draft.put("metrics.log_interval", whole(value), key=key)
    draft.note("converted", key, target="metrics.log_interval")


def read_schedule_kwargs(draft: Draft, key: str, value: Any) -> None:
    """Reads ``min_lr_rate``; other arguments of a schedule have no counterpart."""
    for name, item in mapping(value).items():
        path = f"{key}.{name}"
        if name == "min_lr_rate":
            draft.put("lr_scheduler.min_lr_ratio", number(item), key=path)
            draft.note("converted", path, target="lr_scheduler.min_lr_ratio")
        else:
            why = "the schedules have `min_lr_ratio` and a warmup: see `fsdpq kinds lr_scheduler`"
            draft.note("no_counterpart", path, why)


FSDP_CONFIG: Mapping[str, Rule] = {
    "fsdp_version": Always("fsdpq shards with FSDP2"),
    "version": Always("fsdpq shards with FSDP2"),
    "sharding_strategy": Choice("fsdp.strategy", STRATEGIES),
    "reshard_after_forward": Choice("fsdp.strategy", STRATEGIES),
    "offload_params": With("fsdp.offload", read_offload),
    "activation_checkpointing": With("fsdp.activation_checkpointing", read_fsdp_checkpointing),
    "activation_checkpointing_offload": To("fsdp.activation_offload", boolean),
    "auto_wrap_policy": Always("decoder layers are found by structure"),
    "transformer_layer_cls_to_wrap": Always("decoder layers are found by structure"),
    "min_num_params": Always("decoder layers are found by structure"),
    "mixed_precision_policy": With("fsdp.precision", read_policy),
    **dict.fromkeys(
        (
            "sync_module_states", "cpu_ram_efficient_loading", "cpu_offload_pin_memory",
            "use_orig_params", "state_dict_type", "final_state_dict_type", "limit_all_gathers",
            "backward_prefetch", "forward_prefetch",
        ),
        Always(BY_ITSELF),
    ),
}  # fmt: skip
"""Keys of ``fsdp_config``, without the prefix ``fsdp_``."""

COMMON: Mapping[str, Rule] = {
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", whole),
    "learning_rate": To("optimizer.lr", number),
    "weight_decay": To("optimizer.weight_decay", number),
    "adam_beta1": Part("optimizer.betas"),
    "adam_beta2": Part("optimizer.betas"),
    "adam_epsilon": To("optimizer.eps", number),
    "max_grad_norm": With("training.max_grad_norm", read_grad_norm),
    "lr_scheduler_kwargs": With("lr_scheduler.min_lr_ratio", read_schedule_kwargs),
    "warmup_steps": Part("lr_scheduler.warmup_steps, lr_scheduler.warmup_ratio"),
    "warmup_ratio": Part("lr_scheduler.warmup_ratio"),
    "max_steps": Part("training.steps"),
    "seed": To("training.seed", whole),
    "bf16": Part("model.dtype"),
    "fp16": Part("model.dtype"),
    "gradient_checkpointing": With("fsdp.activation_checkpointing", read_checkpointing),
    "gradient_checkpointing_kwargs": Always("checkpointing is never re-entrant"),
    "logging_steps": With("metrics.log_interval", read_log_interval),
    "eval_steps": Part("training.eval_interval"),
    "eval_strategy": Part("training.eval_interval"),
    "evaluation_strategy": Part("training.eval_interval"),
    "save_steps": Part("checkpoint.interval"),
    "save_strategy": Part("checkpoint.interval"),
    "save_total_limit": To("checkpoint.keep_last", whole),
    "fsdp": With("fsdp.strategy, fsdp.offload", read_fsdp_words),
    "trust_remote_code": Lost("code out of a model's repository is not run for a recipe"),
    "resume_from_checkpoint": Lost("a run goes on by its directory, not by its recipe"),
    "deepspeed": Lost("`fsdp.strategy: full_shard` shards as its stage 3 does"),
    "torch_compile": To("training.compile", boolean),
    **dict.fromkeys(
        ("torch_compile_backend", "torch_compile_mode"),
        Lost("layers are compiled by inductor, in its default mode"),
    ),
    "output_dir": Always("runs go to `runs/<name>-<hash>`, or to `--run-dir`"),
    **dict.fromkeys(
        (
            "local_rank", "ddp_timeout", "ddp_find_unused_parameters", "ddp_backend",
            "save_safetensors", "load_best_model_at_end", "overwrite_output_dir", "logging_dir",
        ),
        Always(BY_ITSELF),
    ),
}  # fmt: skip
"""Keys that mean the same in axolotl, LLaMA-Factory and TRL."""

REASONS: Mapping[str, str] = {
    "dataloader_": DATA_LOADING,
    "dataset_num": DATA_LOADING,
    "preprocessing_": DATA_LOADING,
    "hub_": "no recipe uploads: `fsdpq push RUN --to USER/NAME` does, when the run is finished",
    "push_": "no recipe uploads: `fsdpq push RUN --to USER/NAME` does, when the run is finished",
    "vllm": "the recipe trains, it does not serve",
    "per_device_eval": "evaluation takes `training.micro_batch_size` rows at a time",
    "eval_batch": "evaluation takes `training.micro_batch_size` rows at a time",
    "group_by_length": "rows are dealt out in a shuffled order: pack them with `data.packing`",
    "neftune": "no noise is added to embeddings",
    "early_stopping": "a run has its length from the recipe: `training.steps`",
    "tf32": "matrix products in fp32 stay in fp32",
}
"""Prefix of a key without a rule -> why there is no counterpart."""

TRAINING: Mapping[str, Rule] = {
    **COMMON,
    "per_device_train_batch_size": To("training.micro_batch_size", whole),
    "num_train_epochs": Part("training.epochs"),
    "lr_scheduler_type": Choice("lr_scheduler.kind", SCHEDULES, NO_SCHEDULE),
    "optim": Choice("optimizer.kind", OPTIMIZERS, NO_OPTIMIZER),
    "activation_checkpointing": With("fsdp.activation_checkpointing", read_checkpointing),
    "report_to": Part("metrics.sinks"),
    "run_name": Part("metrics.wandb.name"),
    "project": Part("metrics.wandb.project"),
    "do_train": Always("`fsdpq train` trains"),
    "do_eval": Always("rows of `data.eval_fraction` are evaluated before and after training"),
    "use_cpu": Part("launch.device"),
    "use_liger_kernel": To("model.use_liger_kernel", boolean),
    "liger_kernel_config": Lost("norms, rotary embedding and feed-forwards run Liger's kernels"),
    "include_num_input_tokens_seen": Always("tokens are counted"),
}
"""Training arguments under the names that transformers gives them."""


def assemble_training(draft: Draft, *, epochs: str = "num_train_epochs") -> None:
    """Fills what several training arguments say together; ``epochs`` is the key of that name."""
    _assemble_duration(draft, epochs)
    _assemble_warmup(draft)
    _assemble_dtype(draft)
    _assemble_eval(draft)
    _assemble_saves(draft)
    beta1, beta2 = draft.read("adam_beta1", number, 0.9), draft.read("adam_beta2", number, 0.999)
    if (beta1, beta2) != (0.9, 0.999):
        key = "adam_beta1" if draft.get("adam_beta1") is not None else "adam_beta2"
        draft.put("optimizer.betas", [beta1, beta2], key=key)


def _assemble_duration(draft: Draft, epochs_key: str) -> None:
    steps = draft.read("max_steps", whole, -1)
    epochs = draft.read(epochs_key, number)
    if steps > 0:
        draft.put("training.steps", steps, key="max_steps")
        if epochs is not None:
            draft.note("dropped", epochs_key, "`max_steps` takes precedence")
    elif epochs is not None:
        draft.put("training.epochs", epochs, key=epochs_key)


def _assemble_warmup(draft: Draft) -> None:
    steps, ratio = draft.read("warmup_steps", number, 0), draft.read("warmup_ratio", number, 0)
    if steps >= 1:
        draft.put("lr_scheduler.warmup_steps", int(steps), key="warmup_steps")
        if ratio:
            draft.note("dropped", "warmup_ratio", "`warmup_steps` takes precedence")
    elif steps > 0:
        draft.put("lr_scheduler.warmup_ratio", steps, key="warmup_steps")
    elif ratio:
        draft.put("lr_scheduler.warmup_ratio", ratio, key="warmup_ratio")


def _assemble_dtype(draft: Draft) -> None:
    if draft.on("fp16"):
        draft.put("model.dtype", "fp16", key="fp16")
    elif str(draft.get("bf16")).lower() in ("true", "full", "yes"):
        draft.put("model.dtype", "bf16", key="bf16")


def _assemble_eval(draft: Draft) -> None:
    strategy_key = "eval_strategy" if draft.get("eval_strategy") else "evaluation_strategy"
    strategy = str(draft.get(strategy_key) or "steps")
    steps = draft.read("eval_steps", number)
    if strategy == "epoch":
        draft.note("no_counterpart", strategy_key, STEPS_ONLY.format("training.eval_interval"))
    if steps is None or strategy != "steps":
        return
    if steps < 1:
        draft.note("no_counterpart", "eval_steps", STEPS_ONLY.format("training.eval_interval"))
    elif not (draft.at("data.eval_fraction") or draft.at("data.eval")):
        why = "there are no rows for evaluation: `data.eval_fraction` is 0"
        draft.note("no_counterpart", "eval_steps", why)
    else:
        draft.put("training.eval_interval", whole(steps), key="eval_steps")


def _assemble_saves(draft: Draft) -> None:
    strategy = str(draft.get("save_strategy") or "steps")
    steps = draft.read("save_steps", number)
    if strategy == "no":
        draft.put("checkpoint.interval_minutes", None, key="save_strategy")
    if strategy == "best" and draft.at("training.eval_interval"):
        draft.put("checkpoint.keep_best", True, key="save_strategy")
    if strategy == "epoch":
        draft.note("no_counterpart", "save_strategy", STEPS_ONLY.format("checkpoint.interval"))
    if steps is None or strategy != "steps":
        return
    if steps < 1:
        draft.note("no_counterpart", "save_steps", STEPS_ONLY.format("checkpoint.interval"))
    else:
        draft.put("checkpoint.interval", int(steps), key="save_steps")


def assemble_report_to(draft: Draft) -> None:
    """Fills ``metrics.sinks`` and ``metrics.wandb``."""
    wanted: list[str] = []
    if draft.on("report_to"):
        wanted = draft.read("report_to", names, wanted)
    sinks = [word for word in wanted if word in ("tensorboard", "wandb")]
    others = [word for word in wanted if word not in sinks]
    if sinks:
        draft.put("metrics.sinks", ["jsonl", *sinks], key="report_to")
    if others:
        draft.note("no_counterpart", "report_to", f"metrics do not go to `{others[0]}`")
    if "wandb" not in sinks:
        return
    project, name = draft.read("project", text), draft.read("run_name", text)
    if project is not None:
        draft.put("metrics.wandb.project", project, key="project")
    draft.default("metrics.wandb.project", "huggingface")
    if name is not None:
        draft.put("metrics.wandb.name", name, key="run_name")


def assemble_adapter(draft: Draft, *, low_rank: bool, use_dora: str, key: str) -> None:
    """Sets ``adapter.kind``; without low-rank adapters their settings are taken out again."""
    if low_rank:
        kind = "dora" if draft.on(use_dora) else "lora"
        draft.put("adapter.kind", kind, key=use_dora if kind == "dora" else key)
        return
    for target in [target for target in draft.origins if target.startswith("adapter.")]:
        draft.forget(target, "it has no effect on full finetuning")
    draft.put("adapter.kind", "none", key=key if draft.get(key) is not None else "")


def assemble_bits(draft: Draft, *, bits: int | None, key: str) -> None:
    """Sets ``quantization.kind`` for bases in 4 or 8 bits by bitsandbytes, or unquantized."""
    if bits == 4:
        draft.put("quantization.kind", "bnb", key=key)
    elif bits == 8:
        draft.put("quantization.kind", "hqq", key=key)
        draft.put("quantization.nbits", 8, key=key)
        why = "8 bits by hqq: bitsandbytes' LLM.int8() is not here"
        draft.note("assumed", key, why, target="quantization.kind")
    else:
        draft.put("quantization.kind", "none")


def read_eval_fraction(draft: Draft, key: str, value: Any) -> None:
    """Takes a share of held-out rows; a number of rows has no counterpart."""
    share = number(value)
    if share >= 1:
        draft.note("no_counterpart", key, "`data.eval_fraction` is a share of the rows, below 1")
        return
    draft.put("data.eval_fraction", share, key=key)
    draft.note("converted", key, target="data.eval_fraction")
