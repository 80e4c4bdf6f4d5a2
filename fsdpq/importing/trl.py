"""TRL's YAML for ``trl sft``, through release 1.16 (https://huggingface.co/docs/trl/clis).

A key that the parser does not know is passed on to ``accelerate launch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fsdpq.importing import known_keys
from fsdpq.importing.accelerate import assemble_ranks
from fsdpq.importing.draft import Always, Choice, Draft, Lost, Part, Rule, Table, To, With
from fsdpq.importing.huggingface import (
    ATTENTION,
    DATA_LOADING,
    FSDP_CONFIG,
    REASONS,
    TRAINING,
    assemble_adapter,
    assemble_bits,
    assemble_report_to,
    assemble_training,
)
from fsdpq.importing.sources import add_columns, read_dataset, read_files, read_sources
from fsdpq.importing.values import boolean, mapping, names, number, text, whole

NAME = "trl"
UNKNOWN = "TRL does not know it and passes it on to `accelerate launch`"

_DTYPES: Mapping[str, Any] = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "auto": "auto",
    "bf16": "bf16", "fp16": "fp16", "fp32": "fp32",
}  # fmt: skip


def _read_targets(draft: Draft, key: str, value: Any) -> None:
    found: Any = names(value)
    found = "all-linear" if found == ["all-linear"] else found
    draft.put("adapter.target_modules", found, key=key)
    draft.note("converted", key, target="adapter.target_modules")


def _read_text_field(draft: Draft, key: str, value: Any) -> None:
    draft.put("data.format", "text", key=key)
    add_columns(draft, {"text": text(value)}, key=key)
    draft.note("converted", key, target="data.format, data.columns")


def _read_mixture(draft: Draft, key: str, value: Any) -> None:
    entries = cast("list[Any]", value) if isinstance(value, list) else [value]
    read_sources(draft, key, entries, lambda at, entry: MIXTURE.apply(draft, at, mapping(entry)))


def _read_template_path(draft: Draft, key: str, value: Any) -> None:
    if text(value).endswith(".jinja"):
        draft.put("data.chat_template", text(value), key=key)
        draft.note("converted", key, target="data.chat_template")
    else:
        why = "name the file with that tokenizer's template: `chat_template: file.jinja`"
        draft.note("no_counterpart", key, why)


def _read_fraction(draft: Draft, key: str, value: Any) -> None:
    draft.put("data.weight", number(value), key=key)
    draft.note("converted", key, target="data.weight")


MIXTURE = Table(
    {
        "path": With("data.dataset, data.path", read_dataset),
        "name": To("data.config", text),
        "split": To("data.split", text),
        "data_files": With("data.path", read_files),
        "data_dir": Lost("name the files in `data.path`"),
        "columns": Always("columns that the format does not name are not used"),
        "fraction": With("data.mixture", _read_fraction),
    },
    ("name", "path", "split", "data_dir", "data_files", "columns", "fraction"),
    "TRL does not know it and refuses the file", {},
)  # fmt: skip

RULES: Mapping[str, Rule] = {
    **TRAINING,
    "model_name_or_path": To("model.name_or_path", text),
    "model_revision": To("model.revision", text),
    "dtype": Choice("model.dtype", _DTYPES),
    "torch_dtype": Choice("model.dtype", _DTYPES),
    "attn_implementation": Choice("model.attn_implementation", ATTENTION),
    "use_peft": Part("adapter.kind"),
    "load_in_4bit": Part("quantization.kind"),
    "load_in_8bit": Part("quantization.kind"),
    "bnb_4bit_quant_type": To("quantization.quant_type", text),
    "use_bnb_nested_quant": To("quantization.double_quant", boolean),
    "bnb_4bit_quant_storage": Always("packed codes are stored and sharded as bytes"),
    "lora_r": To("adapter.rank", whole),
    "lora_alpha": To("adapter.alpha", number),
    "lora_dropout": To("adapter.dropout", number),
    "lora_target_modules": With("adapter.target_modules", _read_targets),
    "lora_modules_to_save": To("adapter.modules_to_save", names),
    "lora_task_type": Always("a recipe trains a causal language model"),
    "use_rslora": To("adapter.use_rslora", boolean),
    "use_dora": Part("adapter.kind"),
    "dataset_name": With("data.dataset, data.path", read_dataset),
    "dataset_config": To("data.config", text),
    "dataset_streaming": To("data.streaming", boolean),
    "streaming": To("data.streaming", boolean),
    "dataset_train_split": To("data.split", text),
    "dataset_test_split": Part("data.eval"),
    "dataset_text_field": With("data.format, data.columns", _read_text_field),
    "datasets": With("data, data.mixture", _read_mixture, MIXTURE),
    "test_split_size": To("data.eval_fraction", number),
    "max_length": To("data.seq_len", whole),
    "max_seq_length": To("data.seq_len", whole),
    "truncation_mode": Choice(
        "data.truncation", {"keep_start": "truncate_end", "keep_end": "truncate_start"}
    ),
    "packing": Part("data.packing"),
    "packing_strategy": Part("data.packing"),
    "assistant_only_loss": Part("data.train_on_prompt"),
    "completion_only_loss": Part("data.train_on_prompt"),
    "router_aux_loss_coef": To("training.router_aux_loss_coef", number),
    "activation_offloading": To("fsdp.activation_offload", boolean),
    "loss_type": Always("the loss is over tokens, in chunks"),
    "padding_free": Always("`data.packing` leaves out the padding"),
    "eval_packing": Always("held-out rows are treated like the others"),
    "fsdp_config": Table(FSDP_CONFIG, (), "transformers drops it in silence", {}, strip="fsdp_"),
    "accelerate_config": Lost("give that file with `--accelerate`"),
    "num_processes": Part("launch.nproc_per_node"),
    "num_machines": Part("launch.nnodes"),
    "env": Lost("a recipe sets no environment variables"),
    "chat_template_path": With("data.chat_template", _read_template_path),
    "shuffle_dataset": Always("the order of rows is drawn anew every epoch: `data.shuffle`"),
    "dataset_num_proc": Always(DATA_LOADING),
}  # fmt: skip

TABLE = Table(
    RULES, known_keys.TRL | known_keys.HF_TRAINING | known_keys.ACCELERATE, UNKNOWN, dict(REASONS)
)


def assemble(draft: Draft) -> None:
    """Fills what several keys say together, and TRL's defaults where they differ."""
    low_rank = draft.on("use_peft")
    assemble_adapter(draft, low_rank=low_rank, use_dora="use_dora", key="use_peft")
    _assemble_bits(draft)
    if low_rank:
        draft.default("adapter.dropout", 0.05, "lora_dropout")
        if not draft.has("adapter.target_modules"):
            draft.put("adapter.target_modules", ["q_proj", "v_proj"])
            why = "the modules that PEFT takes for Llama and Mistral: see to those of your model"
            draft.note("assumed", "lora_target_modules", why, target="adapter.target_modules")
    _assemble_data(draft)
    assemble_ranks(draft)
    assemble_training(draft)
    assemble_report_to(draft)
    for target, value, key in (
        ("data.seq_len", 1024, "max_length"),
        ("training.micro_batch_size", 8, "per_device_train_batch_size"),
        ("training.gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        ("fsdp.activation_checkpointing", "full", "gradient_checkpointing"),
        ("optimizer.kind", "adamw", "optim"),
        ("optimizer.lr", 2e-5, "learning_rate"),
        ("lr_scheduler.kind", "linear", "lr_scheduler_type"),
        ("metrics.log_interval", 10, "logging_steps"),
        ("training.seed", 42, "seed"),
    ):
        draft.default(target, value, key)
    if not draft.has("training.steps"):
        draft.default("training.epochs", 3.0, "num_train_epochs")


def _assemble_bits(draft: Draft) -> None:
    bits = 4 if draft.on("load_in_4bit") else 8 if draft.on("load_in_8bit") else None
    key = "load_in_8bit" if bits == 8 else "load_in_4bit"
    if bits is not None and not draft.on("use_peft"):
        draft.note("no_counterpart", key, "full finetuning is of weights in 16 or 32 bits")
        bits = None
    assemble_bits(draft, bits=bits, key=key)
    if bits == 4:
        draft.default("quantization.double_quant", False, "use_bnb_nested_quant")
    else:
        for target in ("quantization.quant_type", "quantization.double_quant"):
            draft.forget(target, "it has no effect without `load_in_4bit`")


def _assemble_data(draft: Draft) -> None:
    if draft.on("packing"):
        draft.put("data.packing", "best_fit", key="packing")
        if str(draft.get("packing_strategy") or "bfd") == "wrapped":
            why = "rows are not cut to fill a sequence: they are fitted in whole"
            draft.note("assumed", "packing_strategy", why, target="data.packing")
    _assemble_eval(draft)
    key = "assistant_only_loss" if draft.on("assistant_only_loss") else "completion_only_loss"
    if draft.on(key):
        draft.put("data.train_on_prompt", False, key=key)
    elif draft.at("data.format") != "text":
        draft.put("data.train_on_prompt", True)
        why = "TRL trains whole conversations by default; `false` where rows have a `completion`"
        draft.note("assumed", "assistant_only_loss", why, target="data.train_on_prompt")


def _assemble_eval(draft: Draft) -> None:
    """Takes the test split for evaluation where the config evaluates at all."""
    evaluates = str(draft.get("eval_strategy") or "no") != "no"
    source = draft.at("data.dataset")
    if not evaluates or source is None or draft.has("data.eval_fraction"):
        return
    split = draft.read("dataset_test_split", text, "test")
    found: dict[str, Any] = {"dataset": source, "split": split}
    for name in ("config", "format", "columns"):
        if draft.has(f"data.{name}"):
            found[name] = draft.at(f"data.{name}")
    draft.put("data.eval", found, key="dataset_test_split")
    if draft.get("dataset_test_split") is None:
        why = "TRL evaluates on the split `test`"
        draft.note("assumed", "eval_strategy", why, target="data.eval")
