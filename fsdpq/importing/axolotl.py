"""axolotl's YAML, through release 0.19 (https://docs.axolotl.ai/docs/config-reference.html).

axolotl drops what it does not know: its config model ignores unknown keys at every level. Among
them are keys of FSDP1 that its own examples still carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fsdpq.importing import known_keys
from fsdpq.importing.axolotl_datasets import (
    DATASET,
    read_datasets,
    read_jinja,
    read_test_datasets,
    read_words,
)
from fsdpq.importing.draft import Always, Choice, Draft, Lost, Part, Rule, Table, To, With
from fsdpq.importing.huggingface import (
    ATTENTION,
    BY_ITSELF,
    COMMON,
    DATA_LOADING,
    FSDP_CONFIG,
    REASONS,
    STEPS_ONLY,
    assemble_adapter,
    assemble_bits,
    assemble_training,
    read_eval_fraction,
)
from fsdpq.importing.optimizers import NO_OPTIMIZER, NO_SCHEDULE, OPTIMIZERS, SCHEDULES
from fsdpq.importing.values import boolean, mapping, names, number, text, whole

NAME = "axolotl"
UNKNOWN = "axolotl does not know it and drops it in silence"


def _read_bits(draft: Draft, key: str, value: Any) -> None:
    given = {
        "bnb_4bit_quant_type": ("quant_type", text),
        "bnb_4bit_use_double_quant": ("double_quant", boolean),
    }
    for name, item in mapping(value).items():
        path = f"{key}.{name}"
        if name in given:
            field, reader = given[name]
            draft.put(f"quantization.{field}", reader(item), key=path)
            draft.note("converted", path, target=f"quantization.{field}")
        else:
            draft.note("built_in", path, "packed codes are stored and sharded as bytes")


def _read_mesh(draft: Draft, key: str, value: Any) -> None:
    if whole(value) > 1:
        draft.put("fsdp.shard_size", whole(value), key=key)
        draft.put("fsdp.strategy", "hybrid_full_shard", key=key)
    draft.note("converted", key, target="fsdp.shard_size, fsdp.strategy")


def _read_pad_token(draft: Draft, key: str, value: Any) -> None:
    for name in mapping(value):
        path = f"{key}.{name}"
        if name == "pad_token":
            draft.note("built_in", path, "padding is masked, whatever its token is")
        else:
            draft.note("no_counterpart", path, "the tokenizer's own special tokens are used")


def _read_curriculum(draft: Draft, key: str, value: Any) -> None:
    draft.put("data.shuffle", not boolean(value), key=key)
    draft.note("converted", key, target="data.shuffle")


def _attention_switch(word: str) -> With:
    def read(draft: Draft, key: str, value: Any) -> None:
        if boolean(value):
            draft.put("model.attn_implementation", word, key=key)
        draft.note("converted", key, target="model.attn_implementation")

    return With("model.attn_implementation", read)


def _read_compile(draft: Draft, key: str, value: Any) -> None:
    draft.put("training.compile", value == "auto" or boolean(value), key=key)
    draft.note("converted", key, target="training.compile")


def _read_liger(draft: Draft, key: str, value: Any) -> None:
    if boolean(value):
        draft.put("model.use_liger_kernel", True, key=key)
    draft.note("converted", key, target="model.use_liger_kernel")


_DEAD = ("sharding_strategy", "limit_all_gathers", "backward_prefetch", "forward_prefetch",
         "activation_checkpointing_offload")  # fmt: skip
FSDP = Table(
    {key: rule for key, rule in FSDP_CONFIG.items() if key not in _DEAD},
    known_keys.AXOLOTL_FSDP, UNKNOWN, {}, strip="fsdp_",
)  # fmt: skip

RULES: Mapping[str, Rule] = {
    **{key: rule for key, rule in COMMON.items() if key in known_keys.AXOLOTL},
    "base_model": To("model.name_or_path", text),
    "revision_of_model": To("model.revision", text),
    "model_revision": To("model.revision", text),
    "adapter": Part("adapter.kind, quantization.kind"),
    "load_in_4bit": Part("quantization.kind"),
    "load_in_8bit": Part("quantization.kind"),
    "bnb_config_kwargs": With("quantization.quant_type, quantization.double_quant", _read_bits),
    "lora_r": To("adapter.rank", whole),
    "lora_alpha": To("adapter.alpha", number),
    "lora_dropout": To("adapter.dropout", number),
    "lora_target_linear": Part("adapter.target_modules"),
    "lora_target_modules": Part("adapter.target_modules"),
    "lora_modules_to_save": To("adapter.modules_to_save", names),
    "loraplus_lr_ratio": To("optimizer.lora_plus_ratio", number),
    "peft_use_dora": Part("adapter.kind"),
    "peft_use_rslora": To("adapter.use_rslora", boolean),
    "lora_model_dir": Lost("a new adapter is trained: its weights start anew"),
    "datasets": With("data, data.mixture", read_datasets, DATASET),
    "test_datasets": With("data.eval", read_test_datasets),
    "val_set_size": With("data.eval_fraction", read_eval_fraction),
    "sequence_len": To("data.seq_len", whole),
    "excess_length_strategy": Choice(
        "data.truncation", {"drop": "drop", "truncate": "truncate_end", "raise": "error"}
    ),
    "sample_packing": Part("data.packing"),
    "train_on_inputs": To("data.train_on_prompt", boolean),
    "micro_batch_size": To("training.micro_batch_size", whole),
    "num_epochs": Part("training.epochs"),
    "optimizer": Choice("optimizer.kind", OPTIMIZERS, NO_OPTIMIZER),
    "lr_scheduler": Choice("lr_scheduler.kind", SCHEDULES, NO_SCHEDULE),
    "cosine_min_lr_ratio": To("lr_scheduler.min_lr_ratio", number),
    "float32": Part("model.dtype"),
    "bfloat16": Part("model.dtype"),
    "float16": Part("model.dtype"),
    "flash_attention": _attention_switch("flash_attention_2"),
    "sdp_attention": _attention_switch("sdpa"),
    "eager_attention": _attention_switch("eager"),
    "flex_attention": _attention_switch("flex_attention"),
    **dict.fromkeys(
        ("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_swiglu",
         "liger_glu_activation"),
        With("model.use_liger_kernel", _read_liger),
    ),
    **dict.fromkeys(
        ("liger_cross_entropy", "liger_fused_linear_cross_entropy"),
        Always("the loss is over tokens, in chunks"),
    ),
    "torch_compile": With("training.compile", _read_compile),
    "attn_implementation": Choice("model.attn_implementation", ATTENTION),
    "activation_offloading": To("fsdp.activation_offload", boolean),
    "fsdp_config": FSDP,
    "fsdp_version": Always("fsdpq shards with FSDP2"),
    "dp_shard_size": With("fsdp.shard_size, fsdp.strategy", _read_mesh),
    "use_wandb": Part("metrics.sinks"),
    "wandb_project": Part("metrics.wandb.project"),
    "wandb_entity": Part("metrics.wandb.entity"),
    "wandb_name": Part("metrics.wandb.name"),
    "wandb_mode": Part("metrics.wandb.mode"),
    "wandb_log_model": Part("metrics.wandb.log_adapter"),
    "wandb_run_id": Lost("a run of fsdpq is a new run there"),
    "use_tensorboard": Part("metrics.sinks"),
    "evals_per_epoch": Lost(STEPS_ONLY.format("training.eval_interval")),
    "auto_resume_from_checkpoints": Choice("checkpoint.resume", {"true": "auto", "false": "never"}),
    "saves_per_epoch": Lost(STEPS_ONLY.format("checkpoint.interval")),
    "batch_size": Lost("set `training.global_batch_size`: rows per step over all ranks"),
    "special_tokens": With("", _read_pad_token),
    "tokens": Lost("no tokens are added to the vocabulary"),
    "rl": Lost("a recipe finetunes on answers; preference training is another program's job"),
    "pretraining_dataset": Lost("rows are read whole: `data.format: text` trains on plain text"),
    "plugins": Lost("no code that a config names is imported"),
    "chat_template": With("data.chat_template", read_words),
    "chat_template_jinja": With("data.chat_template", read_jinja),
    "streaming": To("data.streaming", boolean),
    "curriculum_sampling": With("data.shuffle", _read_curriculum),
    "eot_tokens": Always("what the chat template puts after an answer is its end"),
    "default_system_message": Lost("write it into the rows: a column `system`"),
    "lora_fan_in_fan_out": Always("layers are linear"),
    "strict": Always("a recipe is always strict"),
    "pad_to_sequence_len": Always("rows of a micro-batch are padded to the longest"),
    "eval_sample_packing": Always("held-out rows are treated like the others"),
    **dict.fromkeys(
        ("model_type", "type_of_model", "tokenizer_type", "tokenizer_config", "base_model_config",
         "is_llama_derived_model", "is_mistral_derived_model", "is_falcon_derived_model",
         "is_qwen_derived_model"),
        Always("the model's own files say it"),
    ),
    **dict.fromkeys(
        ("dataset_prepared_path", "dataset_processes", "shuffle_merged_datasets"),
        Always(DATA_LOADING),
    ),
    "merge_lora": Part("export.merge, export.merge_onto"),
    "merge_method": Always("tensors are merged as they are read, a few rows at a time"),
    **dict.fromkeys(("ddp", "device_map", "gc_steps", "world_size"), Always(BY_ITSELF)),
}  # fmt: skip

TABLE = Table(
    RULES, known_keys.AXOLOTL, UNKNOWN,
    {**REASONS, "wandb_": "gradients and code are not logged",
     "sample_packing_": "best fit needs no settings",
     "tokenizer_": "the tokenizer is used as its files say"},
)  # fmt: skip


def assemble(draft: Draft) -> None:
    """Fills what several keys say together, and axolotl's defaults where they differ."""
    adapter = str(draft.get("adapter") or "")
    low_rank = adapter in ("lora", "qlora")
    if adapter and not low_rank:
        draft.note("no_counterpart", "adapter", f"no adapter is called `{adapter}`")
    assemble_adapter(draft, low_rank=low_rank, use_dora="peft_use_dora", key="adapter")
    _assemble_bits(draft, adapter)
    if low_rank:
        _assemble_targets(draft)
    if low_rank and draft.on("merge_lora"):
        draft.put("export.merge", True, key="merge_lora")
        if draft.at("quantization.kind") != "none":  # it loads the base anew, unquantized
            draft.put("export.merge_onto", "original", key="merge_lora")
    if draft.on("sample_packing"):
        draft.put("data.packing", "best_fit", key="sample_packing")
    assemble_training(draft, epochs="num_epochs")
    for key, dtype in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")):
        if draft.on(key):
            draft.put("model.dtype", dtype, key=key)
    _assemble_sinks(draft)
    draft.default("data.seq_len", 512, "sequence_len")
    draft.default("data.truncation", "drop", "excess_length_strategy")
    draft.default("training.micro_batch_size", 1, "micro_batch_size")
    draft.default("training.gradient_accumulation_steps", 1, "gradient_accumulation_steps")
    draft.default("lr_scheduler.kind", "cosine", "lr_scheduler")
    draft.default("fsdp.activation_checkpointing", "none", "gradient_checkpointing")
    if not draft.has("optimizer.kind"):
        draft.put("optimizer.kind", "adamw")


def _assemble_bits(draft: Draft, adapter: str) -> None:
    key = "load_in_4bit" if draft.on("load_in_4bit") else "load_in_8bit"
    bits = 4 if draft.on("load_in_4bit") else 8 if draft.on("load_in_8bit") else None
    if not adapter and bits is not None:
        draft.note("no_counterpart", key, "full finetuning is of weights in 16 or 32 bits")
        bits = None
    assemble_bits(draft, bits=bits, key=key)
    if bits != 4:
        for target in ("quantization.quant_type", "quantization.double_quant"):
            draft.forget(target, "it has no effect without `load_in_4bit`")


def _assemble_targets(draft: Draft) -> None:
    if draft.on("lora_target_linear") or draft.get("lora_target_modules") == "all-linear":
        key = "lora_target_linear" if draft.on("lora_target_linear") else "lora_target_modules"
        draft.put("adapter.target_modules", "all-linear", key=key)
        return
    found = draft.read("lora_target_modules", names, [])
    if found:
        draft.put("adapter.target_modules", cast("list[str]", found), key="lora_target_modules")


def _assemble_sinks(draft: Draft) -> None:
    sinks: list[str] = []
    if draft.on("wandb_project") or draft.on("use_wandb"):
        sinks.append("wandb")
        for name in ("project", "entity", "name", "mode"):
            value = draft.read(f"wandb_{name}", text) if draft.on(f"wandb_{name}") else None
            if value is not None:
                draft.put(f"metrics.wandb.{name}", value, key=f"wandb_{name}")
        if draft.on("wandb_log_model"):
            draft.put("metrics.wandb.log_adapter", True, key="wandb_log_model")
    if draft.on("use_tensorboard"):
        sinks.append("tensorboard")
    if sinks:
        key = "use_tensorboard" if sinks == ["tensorboard"] else "wandb_project"
        draft.put("metrics.sinks", ["jsonl", *sinks], key=key)
