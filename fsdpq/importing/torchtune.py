"""torchtune's YAML, through release 0.7, its last (https://github.com/pytorch/torchtune).

Its ``_component_`` paths say what it would import and call. Here they are words in closed tables:
nothing is imported. Its recipes read the top-level keys that they know and never look at others;
an unknown argument of a component is an error there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsdpq.importing import known_keys
from fsdpq.importing.draft import Always, Choice, Draft, Lost, Part, Rule, Table, To, With
from fsdpq.importing.huggingface import BY_ITSELF, DATA_LOADING, read_offload
from fsdpq.importing.torchtune_components import MODELS, OPTIMIZERS
from fsdpq.importing.torchtune_datasets import DATASET, read_datasets, read_validation
from fsdpq.importing.values import boolean, is_off, mapping, names, number, numbers, text, whole

NAME = "torchtune"
UNKNOWN = "torchtune's recipes never look at it"
_REFUSED = "the component does not know it: torchtune stops with a TypeError"
_OTHER_RECIPE = "distillation and preference training are another program's job"
_FUSED = ("phi3", "phi4")

_SPLIT_NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_FUSED_NAMES = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "output_proj": "o_proj",
}


def _read_model(draft: Draft, key: str, value: Any) -> None:
    name = text(value).removeprefix("torchtune.models.").rpartition(".")[2]
    bare = name.removeprefix("qlora_").removeprefix("lora_")
    if bare not in MODELS:
        why = "no such model is known here: set `model.name_or_path`"
        draft.note("no_counterpart", key, why)
    else:
        draft.note("converted", key, target="quantization.kind, adapter.kind")


def _read_compile(draft: Draft, key: str, value: Any) -> None:
    parts = mapping(value) if isinstance(value, dict) else {"model": value}
    draft.put("training.compile", boolean(parts.get("model", False)), key=key)
    draft.note("converted", key, target="training.compile")


def _read_clip(draft: Draft, key: str, value: Any) -> None:
    draft.put("training.max_grad_norm", number(value), key=key)
    draft.note("converted", key, target="training.max_grad_norm")


def _read_reshard(draft: Draft, key: str, value: Any) -> None:
    strategy = "full_shard" if boolean(value) else "shard_grad_op"
    draft.put("fsdp.strategy", strategy, key=key)
    draft.note("converted", key, target="fsdp.strategy")


def _read_log_dir(draft: Draft, key: str, value: Any) -> None:
    word = text(value).rpartition(".")[2]
    sink = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}.get(word)
    if sink:
        draft.put("metrics.sinks", ["jsonl", sink], key=key)
        draft.note("converted", key, target="metrics.sinks")
    elif word in ("DiskLogger", "StdoutLogger"):
        draft.note("built_in", key, "metrics go to the run's `metrics.jsonl` and to the screen")
    else:
        draft.note("no_counterpart", key, f"metrics do not go to `{word}`")


def _read_loss(draft: Draft, key: str, value: Any) -> None:
    word = text(value).rpartition(".")[2]
    if word in ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss"):
        draft.note("built_in", key, "the loss is cross-entropy over tokens, in chunks")
    else:
        draft.note("no_counterpart", key, "the loss is cross-entropy over the answers' tokens")


def _read_dead_section(draft: Draft, key: str, value: Any) -> None:
    for name in mapping(value):
        guess = f"{key}_{name}"
        hint = f"; did you mean `{guess}`?" if guess in known_keys.TORCHTUNE else ""
        draft.note("dropped", f"{key}.{name}", UNKNOWN + hint)


def _table(rules: Mapping[str, Rule], lost: str = "", why: str = "") -> Table:
    """Returns the table of a component; for the names in ``lost`` there is nothing here."""
    return Table(rules, lost.split(), _REFUSED, {"": why} if why else {})


def _no_need(known: str, why: str) -> dict[str, Rule]:
    return dict.fromkeys(known.split(), Always(why))


MODEL = _table({
    "_component_": With("quantization.kind, adapter.kind", _read_model),
    "lora_attn_modules": Part("adapter.target_modules"),
    "apply_lora_to_mlp": Part("adapter.target_modules"),
    "apply_lora_to_output": Lost("adapters sit inside the decoder layers only"),
    "lora_rank": To("adapter.rank", whole),
    "lora_alpha": To("adapter.alpha", number),
    "lora_dropout": To("adapter.dropout", number),
    "use_dora": Part("adapter.kind"),
    "quantize_base": Part("quantization.kind"),
}, "decoder_trainable encoder_trainable fusion_trainable image_size", "models are text only",
)  # fmt: skip

TOKENIZER = _table(
    {
        "_component_": Always("the model's own tokenizer is used"),
        "max_seq_len": To("data.seq_len", whole),
        **_no_need("path merges_file vocab_path merges_path", "the model's own tokenizer is used"),
    },
    "special_tokens_path prompt_template truncation_type image_size",
    "the model's own tokenizer is used as its files say",
)

OPTIMIZER = _table({
    "_component_": Choice("optimizer.kind", OPTIMIZERS, "see `fsdpq kinds optimizer`"),
    "lr": To("optimizer.lr", number),
    "weight_decay": To("optimizer.weight_decay", number),
    "eps": To("optimizer.eps", number),
    "momentum": To("optimizer.momentum", number),
    "nesterov": To("optimizer.nesterov", boolean),
    "betas": To("optimizer.betas", numbers),
    "fused": Always("how a step is computed does not change it"),
    "foreach": Always("how a step is computed does not change it"),
}, "amsgrad maximize", "see `fsdpq kinds optimizer`")  # fmt: skip

_COSINE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
SCHEDULE = _table({
    "_component_": Choice(
        "lr_scheduler.kind",
        {_COSINE: "cosine", _COSINE.replace("training", "modules"): "cosine"},
        "see `fsdpq kinds lr_scheduler`",
    ),
    "num_warmup_steps": To("lr_scheduler.warmup_steps", whole),
}, "num_cycles", "one half cosine, without restarts")  # fmt: skip

METRICS = _table({
    "_component_": With("metrics.sinks", _read_log_dir),
    "project": To("metrics.wandb.project", text),
    "entity": To("metrics.wandb.entity", text),
    "group": To("metrics.wandb.group", text),
    "name": To("metrics.wandb.name", text),
    "job_type": To("metrics.wandb.job_type", text),
    "tags": To("metrics.wandb.tags", names),
    "mode": To("metrics.wandb.mode", text),
    **_no_need("log_dir filename organize_logs", "metrics go to the run directory"),
})  # fmt: skip

PROFILER = _table({
    "_component_": Always("`metrics.profile` is torch's profiler"),
    "enabled": Part("metrics.profile"),
    "wait_steps": Part("metrics.profile"),
    "warmup_steps": Part("metrics.profile"),
    "active_steps": Part("metrics.profile"),
    **_no_need(
        "output_dir cpu cuda profile_memory with_stack record_shapes with_flops num_cycles",
        "one trace a rank is written to the run directory",
    ),
})  # fmt: skip

CHECKPOINTER = _table({
    "_component_": Always("weights are read from safetensors of the hub's format"),
    "checkpoint_dir": Part("model.name_or_path"),
    "checkpoint_files": Always("the index of the model says which files it has"),
    "adapter_checkpoint": Lost("a new adapter is trained: its weights start anew"),
    "recipe_checkpoint": Lost("a run goes on by its directory, not by its recipe"),
    "keep_last_n_checkpoints": To("checkpoint.keep_last", whole),
    **_no_need("output_dir model_type safe_serialization", BY_ITSELF),
})  # fmt: skip

RULES: Mapping[str, Rule] = {
    "model": MODEL,
    "tokenizer": TOKENIZER,
    "checkpointer": CHECKPOINTER,
    "dataset": With("data, data.mixture", read_datasets, DATASET),
    "dataset_val": With("data.eval", read_validation),
    "optimizer": OPTIMIZER,
    "lr_scheduler": SCHEDULE,
    "loss": With("", lambda draft, key, value: LOSS.apply(draft, key, _component(value))),
    "metric_logger": METRICS,
    "profiler": PROFILER,
    "batch_size": To("training.micro_batch_size", whole),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", whole),
    "epochs": Part("training.epochs"),
    "max_steps_per_epoch": Part("training.steps"),
    "clip_grad_norm": With("training.max_grad_norm", _read_clip),
    "seed": To("training.seed", whole),
    "fsdp_cpu_offload": With("fsdp.offload", read_offload),
    "fsdp_reshard_after_forward": With("fsdp.strategy", _read_reshard),
    "custom_sharded_layers": Always("embedding and head are groups of their own"),
    "dtype": Choice("fsdp.precision", {"bf16": "bf16", "fp32": "fp32"}, "see `model.dtype: fp16`"),
    "enable_activation_checkpointing": Part("fsdp.activation_checkpointing"),
    "ac_mode": Part("fsdp.activation_checkpointing"),
    "enable_activation_offloading": To("fsdp.activation_offload", boolean),
    "device": Choice("launch.device", {"cuda": "cuda", "cpu": "cpu"}, "devices are cuda and cpu"),
    "log_every_n_steps": To("metrics.log_interval", whole),
    "log_peak_memory_stats": To("metrics.log_memory", boolean),
    "save_adapter_weights_only": Part("export.merge"),
    "resume_from_checkpoint": Lost("a run goes on by its directory, not by its recipe"),
    "optimizer_in_bwd": Lost("the optimizer steps once a step, after the backward pass"),
    "compile": With("training.compile", _read_compile),
    "run_val_every_n_steps": Part("training.eval_interval"),
    "shuffle": Part("data.shuffle"),
    "output_dir": Always("runs go to `runs/<name>-<hash>`, or to `--run-dir`"),
    "collate_fn": Always(DATA_LOADING),
    "low_cpu_ram": Always(BY_ITSELF),
    "fsdp": With("", _read_dead_section),
}
LOSS = _table(
    {"_component_": With("", _read_loss), "num_output_chunks": Always("the loss is in chunks")},
    "ignore_index label_smoothing beta epsilon",
)

TABLE = Table(
    RULES, known_keys.TORCHTUNE, UNKNOWN,
    {"tensor_parallel": "ranks share rows, not matrices",
     "ac_option": "`selective` is every second layer", "quantizer": "weights are quantized once",
     "kd_": _OTHER_RECIPE, "teacher_": _OTHER_RECIPE, "ref_": _OTHER_RECIPE},
)  # fmt: skip


def _component(value: Any) -> Any:
    return {"_component_": value} if isinstance(value, str) else value


def assemble(draft: Draft) -> None:
    """Fills what several keys say together, and torchtune's defaults where they differ."""
    component = str(draft.get("model._component_") or "").removeprefix("torchtune.models.")
    family, _, name = component.rpartition(".")
    low_rank = name.startswith(("lora_", "qlora_"))
    is_quantized = name.startswith("qlora_") or (low_rank and draft.on("model.quantize_base"))
    draft.put("quantization.kind", "bnb" if is_quantized else "none", key="model._component_")
    _assemble_adapter(draft, family, low_rank=low_rank)
    _assemble_model(draft, MODELS.get(name.removeprefix("qlora_").removeprefix("lora_"), ""))
    _assemble_data(draft)
    _assemble_steps(draft)
    _assemble_checkpointing(draft)
    if low_rank and not draft.on("save_adapter_weights_only"):
        draft.put("export.merge", True, key="save_adapter_weights_only")
    if draft.on("profiler.enabled"):
        skipped = draft.read("profiler.wait_steps", whole, 5) + draft.read(
            "profiler.warmup_steps", whole, 3
        )
        steps = {
            "start_step": skipped + 1,
            "num_steps": draft.read("profiler.active_steps", whole, 2),
        }
        draft.put("metrics.profile", steps, key="profiler.enabled")
    if draft.at("optimizer.kind") in (None, "adamw"):
        draft.put("optimizer.kind", "adamw")
        draft.default("optimizer.weight_decay", 0.01, "optimizer.weight_decay")
    if draft.on("lr_scheduler") and not draft.has("lr_scheduler.kind"):
        draft.drop("lr_scheduler")
    if "wandb" in (draft.at("metrics.sinks") or ()):
        draft.default("metrics.wandb.project", "torchtune", "metric_logger.project")


def _assemble_adapter(draft: Draft, family: str, *, low_rank: bool) -> None:
    if not low_rank:
        for target in [target for target in draft.origins if target.startswith("adapter.")]:
            draft.forget(target, "it has no effect on full finetuning")
        draft.put("adapter.kind", "none", key="model._component_")
        return
    kind, key = (
        ("dora", "model.use_dora") if draft.on("model.use_dora") else ("lora", "model._component_")
    )
    draft.put("adapter.kind", kind, key=key)
    draft.default("adapter.rank", 8, "model.lora_rank")
    draft.default("adapter.alpha", 16, "model.lora_alpha")
    is_fused = family.startswith(_FUSED)
    spelling = _FUSED_NAMES if is_fused else _SPLIT_NAMES
    found = [spelling.get(name, name) for name in draft.read("model.lora_attn_modules", names, [])]
    if draft.on("model.apply_lora_to_mlp"):
        found += (
            ["gate_up_proj", "down_proj"] if is_fused else ["gate_proj", "up_proj", "down_proj"]
        )
    found = list(dict.fromkeys(found))
    if len(found) == (4 if is_fused else 7):
        draft.put("adapter.target_modules", "all-linear", key="model.lora_attn_modules")
    elif found:
        draft.put("adapter.target_modules", found, key="model.lora_attn_modules")
    if is_fused and "qkv_proj" in found:
        why = "`qkv_proj` is one matrix in transformers: its adapter covers all three"
        draft.note("assumed", "model.lora_attn_modules", why, target="adapter.target_modules")


def _assemble_model(draft: Draft, repository: str) -> None:
    place = draft.get("checkpointer.checkpoint_dir")
    reads_hub_format = "HFCheckpointer" in str(draft.get("checkpointer._component_"))
    if isinstance(place, str) and reads_hub_format and "${" not in place:
        draft.put("model.name_or_path", place, key="checkpointer.checkpoint_dir")
        if repository:
            why = f"the directory that `tune download` wrote; on the hub: `{repository}`"
            draft.note("assumed", "checkpointer.checkpoint_dir", why, target="model.name_or_path")
    elif repository:
        draft.put("model.name_or_path", repository, key="model._component_")
        why = f"its files are not in the hub's format: `{repository}` is the same model there"
        draft.note("assumed", "checkpointer.checkpoint_dir", why, target="model.name_or_path")


def _assemble_data(draft: Draft) -> None:
    if draft.get("tokenizer.max_seq_len") is None:
        draft.put("data.seq_len", 2048)
        why = "torchtune cuts no rows then: 2048 tokens are assumed"
        draft.note("assumed", "tokenizer.max_seq_len", why, target="data.seq_len")
    if draft.get("shuffle") is not None and is_off(draft.get("shuffle")):
        draft.put("data.shuffle", False, key="shuffle")


def _assemble_steps(draft: Draft) -> None:
    epochs = draft.read("epochs", whole, 1)
    per_epoch = draft.read("max_steps_per_epoch", whole)
    if per_epoch:
        draft.put("training.steps", epochs * per_epoch, key="max_steps_per_epoch")
        if epochs > 1:
            why = "so many steps in one go, not the first ones of each epoch again"
            draft.note("assumed", "max_steps_per_epoch", why, target="training.steps")
            draft.note("converted", "epochs", target="training.steps")
        else:
            draft.note("built_in", "epochs", "`training.steps` says how long")
    else:
        draft.put("training.epochs", epochs, key="epochs")
    interval = draft.read("run_val_every_n_steps", whole)
    if interval and draft.has("data.eval"):
        draft.put("training.eval_interval", interval, key="run_val_every_n_steps")
    draft.default("training.gradient_accumulation_steps", 1, "gradient_accumulation_steps")
    if "training.max_grad_norm" not in draft.origins:
        draft.default("training.max_grad_norm", None, "clip_grad_norm")


def _assemble_checkpointing(draft: Draft) -> None:
    target = "fsdp.activation_checkpointing"
    if draft.get("ac_mode") is not None:
        mode = str(draft.get("ac_mode")).lower()
        draft.put(
            target, {"full": "full", "selective": "selective"}.get(mode, "none"), key="ac_mode"
        )
    elif draft.on("enable_activation_checkpointing"):
        draft.put(target, "full", key="enable_activation_checkpointing")
    else:
        key = "enable_activation_checkpointing"
        draft.put(target, "none", key=key if draft.get(key) is not None else "")
