"""TRL's YAML for ``trl sft``, through release 1.16 (https://huggingface.co/docs/trl/clis).

A key that the parser does not know is passed on to ``accelerate launch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fsdpq.importing import known_keys
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
    read_hub_dataset,
)
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
    note = "" if text(value) == "text" else f"rename the column `{text(value)}` to `text`"
    draft.note("assumed" if note else "converted", key, note, target="data.format")


def _read_mixture(draft: Draft, key: str, value: Any) -> None:
    rows = cast("list[Any]", value) if isinstance(value, list) else [value]
    for index, entry in enumerate(rows):
        place = f"{key}.{index}"
        if index:
            why = "a recipe has one dataset: write the rows into one file (`data.path`)"
            draft.note("no_counterpart", place, why)
        else:
            MIXTURE.apply(draft, place, mapping(entry))


MIXTURE = Table(
    {"path": With("data.dataset, data.path", read_hub_dataset), "split": To("data.split", text)},
    ("name", "data_dir", "data_files", "columns", "fraction"),
    "TRL does not know it and refuses the file",
    {"": "fetch the file of rows and name it in `data.path`"},
)

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
    "dataset_name": With("data.dataset, data.path", read_hub_dataset),
    "dataset_config": Lost("subsets cannot be chosen: fetch the file and name it in `data.path`"),
    "dataset_train_split": To("data.split", text),
    "dataset_test_split": Lost("rows are held out of the training data: `data.eval_fraction`"),
    "dataset_text_field": With("data.format", _read_text_field),
    "datasets": With("data", _read_mixture),
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
    "num_processes": To("launch.nproc_per_node", whole),
    "num_machines": To("launch.nnodes", whole),
    "env": Lost("a recipe sets no environment variables"),
    "chat_template_path": Lost("the tokenizer's own chat template renders `messages`"),
    **dict.fromkeys(("dataset_num_proc", "shuffle_dataset"), Always(DATA_LOADING)),
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
    if not draft.has("data.format"):
        draft.put("data.format", "messages")
        why = "TRL looks at the columns: `messages` is assumed; else `prompt_completion` or `text`"
        draft.note("assumed", "dataset_name", why, target="data.format")
    key = "assistant_only_loss" if draft.on("assistant_only_loss") else "completion_only_loss"
    if draft.on(key):
        draft.put("data.train_on_prompt", False, key=key)
    else:
        draft.default("data.train_on_prompt", True, "assistant_only_loss")
