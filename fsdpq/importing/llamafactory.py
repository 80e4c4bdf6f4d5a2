"""LLaMA-Factory's YAML, through release 0.9.5 (https://github.com/hiyouga/LLaMA-Factory).

Its datasets are names that ``dataset_info.json`` explains: see `llamafactory_datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsdpq.importing import known_keys
from fsdpq.importing.draft import Always, Choice, Draft, Lost, Part, Rule, Table, To, With
from fsdpq.importing.huggingface import (
    BY_ITSELF,
    DATA_LOADING,
    FSDP_CONFIG,
    REASONS,
    TRAINING,
    assemble_adapter,
    assemble_bits,
    assemble_report_to,
    assemble_training,
    read_eval_fraction,
)
from fsdpq.importing.llamafactory_datasets import assemble_data, read_template
from fsdpq.importing.values import boolean, names, number, text, whole

NAME = "llamafactory"
UNKNOWN = "LLaMA-Factory does not know it and refuses the file"

_ATTENTION: Mapping[str, Any] = {
    "auto": "sdpa",
    "sdpa": "sdpa",
    "disabled": "eager",
    "fa2": "flash_attention_2",
    "fa3": ("flash_attention_2", "version 2 is the one that fsdpq knows"),
    "flash_attention_2": "flash_attention_2",
}


def _read_stage(draft: Draft, key: str, value: Any) -> None:
    word = text(value)
    if word == "pt":
        draft.put("data.format", "text", key=key)
    if word in ("sft", "pt"):
        draft.note("built_in" if word == "sft" else "converted", key, "a recipe finetunes")
    else:
        why = "a recipe finetunes on answers; preference training is another program's job"
        draft.note("no_counterpart", key, why)


def _read_mask_history(draft: Draft, key: str, value: Any) -> None:
    draft.put("data.turns_to_train", "last" if boolean(value) else "all", key=key)
    draft.note("converted", key, target="data.turns_to_train")


def _read_no_shuffling(draft: Draft, key: str, value: Any) -> None:
    draft.put("data.shuffle", not boolean(value), key=key)
    draft.note("converted", key, target="data.shuffle")


def _read_targets(draft: Draft, key: str, value: Any) -> None:
    found: Any = "all-linear" if value == "all" else names(value)
    draft.put("adapter.target_modules", found, key=key)
    draft.note("converted", key, target="adapter.target_modules")


def _read_no_checkpointing(draft: Draft, key: str, value: Any) -> None:
    word = "none" if boolean(value) else "full"
    draft.put("fsdp.activation_checkpointing", word, key=key)
    draft.note("converted", key, target="fsdp.activation_checkpointing")


FSDP = Table(FSDP_CONFIG, (), "transformers drops it in silence", {}, strip="fsdp_")

RULES: Mapping[str, Rule] = {
    **TRAINING,
    "model_name_or_path": To("model.name_or_path", text),
    "model_revision": To("model.revision", text),
    "enable_liger_kernel": To("model.use_liger_kernel", boolean),
    "flash_attn": Choice("model.attn_implementation", _ATTENTION),
    "adapter_name_or_path": Lost("a new adapter is trained: its weights start anew"),
    "stage": With("data.format", _read_stage),
    "finetuning_type": Part("adapter.kind"),
    "use_llama_pro": Part("adapter.kind"),
    "freeze_trainable_layers": Part("adapter.num_new_layers"),
    "quantization_bit": Part("quantization.kind, quantization.nbits"),
    "quantization_method": Part("quantization.kind"),
    "quantization_type": Part("quantization.quant_type"),
    "double_quantization": Part("quantization.double_quant"),
    "lora_rank": To("adapter.rank", whole),
    "lora_alpha": To("adapter.alpha", number),
    "lora_dropout": To("adapter.dropout", number),
    "lora_target": With("adapter.target_modules", _read_targets),
    "use_rslora": To("adapter.use_rslora", boolean),
    "use_dora": Part("adapter.kind"),
    "additional_target": To("adapter.modules_to_save", names),
    "loraplus_lr_ratio": To("optimizer.lora_plus_ratio", number),
    "dataset": Part("data.dataset, data.path, data.format, data.columns, data.mixture"),
    "dataset_dir": Part("data.path"),
    "eval_dataset": Part("data.eval"),
    "mix_strategy": Part("data.mixture_stopping"),
    "interleave_probs": Part("data.mixture"),
    "streaming": To("data.streaming", boolean),
    "buffer_size": Part("data.stream_window"),
    "disable_shuffling": With("data.shuffle", _read_no_shuffling),
    "template": With("data.chat_template", read_template),
    "cutoff_len": To("data.seq_len", whole),
    "max_samples": Part("data.max_rows"),
    "train_on_prompt": To("data.train_on_prompt", boolean),
    "mask_history": With("data.turns_to_train", _read_mask_history),
    "packing": Part("data.packing"),
    "neat_packing": Part("data.packing"),
    "val_size": With("data.eval_fraction", read_eval_fraction),
    "pure_bf16": Part("fsdp.precision"),
    "moe_aux_loss_coef": To("training.router_aux_loss_coef", number),
    "disable_gradient_checkpointing": With("fsdp.activation_checkpointing", _read_no_checkpointing),
    "use_reentrant_gc": Always("checkpointing is never re-entrant"),
    "fsdp_config": FSDP,
    "upcast_layernorm": Lost("norms are in `model.dtype`"),
    "plot_loss": Always("the run's report draws the loss"),
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size",
         "tokenized_path", "data_shared_file_system", "ignore_pad_token_for_loss"),
        Always(DATA_LOADING),
    ),
    **dict.fromkeys(("cache_dir", "low_cpu_mem_usage", "use_fast_tokenizer"), Always(BY_ITSELF)),
}  # fmt: skip

TABLE = Table(
    RULES, known_keys.LLAMAFACTORY | known_keys.HF_TRAINING, UNKNOWN,
    {**REASONS, "pref_": "preference training is another program's job",
     "ray_": "ranks are started by torchrun", "swanlab_": "metrics do not go to swanlab",
     "use_galore": "see `fsdpq kinds optimizer`", "freeze_": "see `fsdpq kinds adapter`"},
)  # fmt: skip


def assemble(draft: Draft) -> None:
    """Fills what several keys say together, and LLaMA-Factory's defaults where they differ."""
    kind = str(draft.get("finetuning_type") or "lora")
    low_rank = kind == "lora"
    if kind not in ("lora", "full", "freeze"):
        draft.note("no_counterpart", "finetuning_type", f"no adapter is called `{kind}`")
    assemble_adapter(draft, low_rank=low_rank, use_dora="use_dora", key="finetuning_type")
    if kind == "freeze":
        _assemble_freeze(draft)
    _assemble_bits(draft)
    if low_rank:
        draft.default("adapter.rank", 8, "lora_rank")
        draft.default("adapter.alpha", 2 * draft.at("adapter.rank"), "lora_alpha")
    assemble_data(draft)
    _assemble_packing(draft)
    if draft.on("pure_bf16"):
        draft.drop("fsdp.precision.reduce")
        draft.forget("fsdp.precision.compute", "`pure_bf16` takes precedence")
        draft.put("fsdp.precision", "bf16", key="pure_bf16")
    assemble_training(draft)
    assemble_report_to(draft)
    for target, value, key in (
        ("data.seq_len", 2048, "cutoff_len"),
        ("training.micro_batch_size", 8, "per_device_train_batch_size"),
        ("training.gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        ("optimizer.kind", "adamw", "optim"),
        ("optimizer.lr", 5e-5, "learning_rate"),
        ("lr_scheduler.kind", "linear", "lr_scheduler_type"),
        ("training.seed", 42, "seed"),
    ):
        draft.default(target, value, key)
    if not draft.has("training.steps"):
        draft.default("training.epochs", 3.0, "num_train_epochs")


def _assemble_freeze(draft: Draft) -> None:
    layers = draft.read("freeze_trainable_layers", whole, 2)
    if draft.on("use_llama_pro") and layers > 0:
        draft.put("adapter.kind", "llama_pro", key="use_llama_pro")
        draft.put("adapter.num_new_layers", layers, key="freeze_trainable_layers")
        why = "fsdpq adds the new layers itself: name the model as it was before `llama_pro.py`"
        draft.note("assumed", "use_llama_pro", why, target="adapter.kind")
    else:
        why = "some layers cannot be left frozen; `adapter.kind: llama_pro` trains new ones"
        draft.note("no_counterpart", "finetuning_type", why)


def _assemble_bits(draft: Draft) -> None:
    bits = draft.read("quantization_bit", whole)
    method = str(draft.get("quantization_method") or "bnb").lower()
    if bits is not None and method == "hqq":
        draft.put("quantization.kind", "hqq", key="quantization_method")
        draft.put("quantization.nbits", bits, key="quantization_bit")
        why = "groups run along the other axis (`axis: 1`), so that shards stand on their own"
        draft.note("assumed", "quantization_method", why, target="quantization.kind")
        return
    if bits is not None and bits not in (4, 8):
        why = "bitsandbytes has 4 bits: for others set `quantization.kind: hqq`"
        draft.note("no_counterpart", "quantization_bit", why)
        bits = 4
    if method not in ("bnb", "bitsandbytes", "hqq") and bits is not None:
        why = "choose one of `fsdpq kinds quantization`"
        draft.note("no_counterpart", "quantization_method", why)
    assemble_bits(draft, bits=bits, key="quantization_bit")
    if bits == 4:
        quant_type = draft.read("quantization_type", text)
        if quant_type is not None:
            draft.put("quantization.quant_type", quant_type, key="quantization_type")
        double = draft.read("double_quantization", boolean)
        if double is not None:
            draft.put("quantization.double_quant", double, key="double_quantization")


def _assemble_packing(draft: Draft) -> None:
    if draft.on("neat_packing"):
        draft.put("data.packing", "best_fit", key="neat_packing")
    elif draft.on("packing"):
        draft.put("data.packing", "best_fit", key="packing")
        why = "no row sees another, as with `neat_packing`"
        draft.note("assumed", "packing", why, target="data.packing")
