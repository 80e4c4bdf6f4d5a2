"""The command line of fsdp_qlora's ``train.py`` (https://github.com/AnswerDotAI/fsdp_qlora).

All 54 arguments of its last version, with its defaults and with what it does behind them: Adam's
constants, the warmup of a tenth, the floor of the cosine, which flags it ignores when.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fsdpq.importing import known_keys
from fsdpq.importing.draft import Always, Choice, Draft, Lost, Part, Rule, Table, To, With
from fsdpq.importing.huggingface import BY_ITSELF, read_offload
from fsdpq.importing.values import boolean, names, number, text, whole

NAME = "fsdp_qlora"
UNKNOWN = "train.py does not know it and refuses the command"

TRAIN_TYPES: Mapping[str, tuple[str, str]] = {
    "full": ("none", "none"),
    "lora": ("none", "lora"),
    "custom_lora": ("none", "lora"),
    "qlora": ("bnb", "lora"),
    "custom_qlora": ("bnb", "lora"),
    "hqq_lora": ("hqq", "lora"),
    "bnb_dora": ("bnb", "dora"),
    "hqq_dora": ("hqq", "dora"),
    "bnb_llama_pro": ("bnb", "llama_pro"),
    "hqq_llama_pro": ("hqq", "llama_pro"),
}
"""Train type -> kind of quantization, kind of adapter."""

DATASETS: Mapping[str, tuple[str, str, str, bool]] = {
    "alpaca": ("yahma/alpaca-cleaned", "train", "alpaca", False),
    "alpaca_sample": ("yahma/alpaca-cleaned", "train", "alpaca", True),
    "dummy": ("", "train", "dummy", True),
    "guanaco": ("timdettmers/openassistant-guanaco", "train", "guanaco", False),
    "sql": ("knowrohit07/know_sql", "validation", "qna", False),
    "orca_math": ("microsoft/orca-math-word-problems-200k", "train", "qna_no_ctx", True),
}
"""Dataset -> repository, split, format, and whether ``dataset_samples`` is looked at."""

_PRECISIONS = ("fp32", "bf16", "fp16_autocast", "bf16_autocast", "bf16_buffers_autocast")
_PRECISION_WORDS: Mapping[str, Any] = {
    **{word: word for word in _PRECISIONS},
    **{f"mp_{word}": (word, "its name before `mp_` was dropped") for word in _PRECISIONS},
}
_LLAMA_LAYERS = ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]
_EXPANDED = re.compile(r"blk_exp-(\d+)-(\d+)")
_ADAM = ("adamw", "fused_adamw")


def _read_world_size(draft: Draft, key: str, value: Any) -> None:
    ranks = whole(value)
    draft.put("launch.nproc_per_node", "auto" if ranks == -1 else ranks, key=key)
    draft.note("converted", key, target="launch.nproc_per_node")


def _read_checkpointing(draft: Draft, key: str, value: Any) -> None:
    word = "full" if boolean(value) else "none"
    draft.put("fsdp.activation_checkpointing", word, key=key)
    draft.note("converted", key, target="fsdp.activation_checkpointing")


def _read_max_steps(draft: Draft, key: str, value: Any) -> None:
    if whole(value) < 0:
        draft.note("built_in", key, "asks for nothing")
        return
    accumulation = draft.read("gradient_accumulation_steps", whole, 1)
    steps = max(1, whole(value) // max(1, accumulation))
    draft.put("training.steps", steps * draft.read("num_epochs", whole, 1), key=key)
    why = "it counts micro-batches of an epoch there, optimizer steps of the run here"
    draft.note("assumed", key, why, target="training.steps")


class _If:
    """Reports a flag that ``train.py`` ignores unless another one has some value."""

    def __init__(self, rule: Rule, other: str, words: tuple[str, ...], default: str) -> None:
        self.rule, self.other, self.words, self.default = rule, other, words, default

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return self.rule.summary

    def apply(self, draft: Draft, key: str, value: Any) -> None:
        """Applies the rule, or says that the flag had no effect."""
        chosen = str(draft.get(self.other) or self.default).lower()
        if chosen in self.words:
            self.rule.apply(draft, key, value)
        else:
            shown = " or ".join(f"`{word}`" for word in self.words[:3])
            draft.note("dropped", key, f"train.py ignores it: `--{self.other}` is not {shown}")


def _profiling(rule: Rule) -> _If:
    return _If(rule, "profile", ("true", "1", "yes"), "false")


def _wandb(target: str) -> _If:
    return _If(To(target, text), "log_to", ("wandb",), "tqdm")


_LOW_RANK = tuple(word for word, (_, adapter) in TRAIN_TYPES.items() if adapter in ("lora", "dora"))
_HQQ = tuple(word for word, (quantizer, _) in TRAIN_TYPES.items() if quantizer == "hqq")
_PRO = ("bnb_llama_pro", "hqq_llama_pro")

RULES: Mapping[str, Rule] = {
    "world_size": With("launch.nproc_per_node", _read_world_size),
    "train_type": Part("quantization.kind, adapter.kind"),
    "llama_pro_path": _If(Part("adapter.num_new_layers"), "train_type", _PRO, "qlora"),
    "batch_size": To("training.micro_batch_size", whole),
    "context_length": To("data.seq_len", whole),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", whole),
    "num_epochs": Part("training.epochs, training.steps"),
    "dataset": Part("data.dataset, data.split, data.format"),
    "dataset_samples": Part("data.max_rows"),
    "sharding_strategy": To("fsdp.strategy", text),
    "use_gradient_checkpointing": With("fsdp.activation_checkpointing", _read_checkpointing),
    "reentrant_checkpointing": Always("checkpointing is never re-entrant, and keeps no weights"),
    "use_cpu_offload": With("fsdp.offload", read_offload),
    "use_activation_cpu_offload": To("fsdp.activation_offload", boolean),
    "low_memory": Always("no rank ever holds the model, whatever its size"),
    "no_sync": Part("fsdp.no_sync"),
    "precision": Choice("fsdp.precision", _PRECISION_WORDS),
    "model_name": To("model.name_or_path", text),
    "save_model": Always("a finished run always leaves its adapter or model"),
    "output_dir": Always("runs go to `runs/<name>-<hash>`, or to `--run-dir`"),
    "lora_rank": _If(To("adapter.rank", whole), "train_type", _LOW_RANK, "qlora"),
    "lora_alpha": _If(Part("adapter.alpha"), "train_type", _LOW_RANK, "qlora"),
    "lora_dropout": _If(Part("adapter.dropout"), "train_type", _LOW_RANK, "qlora"),
    "lora_target_modules": _If(Part("adapter.target_modules"), "train_type", _LOW_RANK, "qlora"),
    "verbose": Always("the run's logs are always written"),
    "lr": To("optimizer.lr", number),
    "apply_gradient_clipping": Part("training.max_grad_norm"),
    "grad_norm": _If(
        Part("training.max_grad_norm"), "apply_gradient_clipping", ("true", "1", "yes"), "false"
    ),
    "wd": _If(To("optimizer.weight_decay", number), "optimizer", _ADAM, "adamw"),
    "profile_memory": To("metrics.log_memory", boolean),
    "optimizer": Choice("optimizer.kind", {
        "adamw": "adamw", "adam": "adam", "sgd": "sgd", "adadelta": "adadelta",
        "fused_adamw": "adamw", "fused_adam": "adam",
    }),
    "lr_scheduler": Part("lr_scheduler.kind"),
    "loading_workers": Always(BY_ITSELF),
    "log_to": Part("metrics.sinks"),
    "master_addr": Part("launch.rdzv_endpoint"),
    "master_port": Part("launch.rdzv_endpoint"),
    "seed": To("training.seed", whole),
    "project_name": _wandb("metrics.wandb.project"),
    "name": _wandb("metrics.wandb.name"),
    "group": _wandb("metrics.wandb.group"),
    "entity": _wandb("metrics.wandb.entity"),
    "n_bits": _If(To("quantization.nbits", whole), "train_type", _HQQ, "qlora"),
    "profile": Part("metrics.profile"),
    "profiling_output": _profiling(Always("traces go to `profile/` of the run directory")),
    "with_stack": _profiling(Lost("traces are without stacks")),
    "with_shapes": _profiling(Lost("traces are without shapes")),
    "export_trace": _profiling(Always("a trace is always written")),
    "export_memory_timeline": _profiling(Lost("`metrics.log_memory` logs memory by phase")),
    "wait_steps": _profiling(Part("metrics.profile")),
    "warmup_steps": _profiling(Part("metrics.profile")),
    "active_steps": _profiling(Part("metrics.profile")),
    "repeat": _profiling(Lost("one stretch of steps is traced")),
    "profiling_frequency": _profiling(Lost("one stretch of steps is traced")),
    "max_steps": With("training.steps", _read_max_steps),
}  # fmt: skip

TABLE = Table(RULES, known_keys.FSDP_QLORA, UNKNOWN, {})


def assemble(draft: Draft) -> None:
    """Fills what several flags say together, and train.py's defaults."""
    word = str(draft.get("train_type") or "qlora")
    if word not in TRAIN_TYPES:
        known = ", ".join(TRAIN_TYPES)
        draft.note("unusable", "train_type", f"`--train_type` must be one of {known}")
    quantizer, adapter = TRAIN_TYPES.get(word, TRAIN_TYPES["qlora"])
    draft.put("quantization.kind", quantizer, key="train_type")
    draft.put("adapter.kind", adapter, key="train_type")
    draft.default("model.name_or_path", "meta-llama/Llama-2-7b-hf", "model_name")
    if quantizer == "hqq":
        draft.put("quantization.group_size", 64)
        why = "groups run along the other axis (`axis: 1`), and scales and zeros stay exact"
        draft.note("assumed", "train_type", why, target="quantization.kind")
    if adapter in ("lora", "dora"):
        _assemble_low_rank(draft, is_dora=adapter == "dora")
    if adapter == "llama_pro":
        _assemble_llama_pro(draft)
    _assemble_data(draft)
    _assemble_fsdp(draft)
    _assemble_optimizer(draft)
    _assemble_metrics(draft)
    for target, value, key in (
        ("data.seq_len", 512, "context_length"),
        ("training.micro_batch_size", 1, "batch_size"),
        ("training.gradient_accumulation_steps", 1, "gradient_accumulation_steps"),
        ("training.seed", 42, "seed"),
    ):
        draft.default(target, value, key)
    if not draft.has("training.steps"):
        draft.put("training.epochs", draft.read("num_epochs", whole, 1), key="num_epochs")


def _assemble_low_rank(draft: Draft, *, is_dora: bool) -> None:
    draft.default("adapter.rank", 64, "lora_rank")
    if is_dora:
        draft.put("adapter.alpha", draft.at("adapter.rank"))
        for key in ("lora_alpha", "lora_dropout"):
            if draft.get(key) is not None:
                why = "train.py ignores it with DoRA: `alpha` equal to `rank` is its factor, 1"
                draft.note("dropped", key, why)
    else:
        alpha, dropout = draft.read("lora_alpha", number), draft.read("lora_dropout", number)
        if alpha is not None:
            draft.put("adapter.alpha", alpha, key="lora_alpha")
        if dropout is not None:
            draft.put("adapter.dropout", dropout, key="lora_dropout")
        draft.default("adapter.alpha", 16, "lora_alpha")
        draft.default("adapter.dropout", 0.1, "lora_dropout")
    targets = str(draft.get("lora_target_modules") or "all")
    found = _LLAMA_LAYERS if targets == "all" else names(targets)
    if targets.lower() == "default":
        found = ["q_proj", "v_proj"]
        why = "the modules that PEFT takes for Llama and Mistral"
        draft.note("assumed", "lora_target_modules", why, target="adapter.target_modules")
    if draft.get("lora_target_modules") is not None:
        draft.put("adapter.target_modules", found, key="lora_target_modules")
    draft.default("adapter.target_modules", found, "lora_target_modules")


def _assemble_llama_pro(draft: Draft) -> None:
    found = _EXPANDED.search(str(draft.get("llama_pro_path") or ""))
    if found and int(found[2]) > int(found[1]):
        new = int(found[2]) - int(found[1])
        draft.put("adapter.num_new_layers", new, key="llama_pro_path")
        why = "fsdpq adds the new layers itself: no expanded files are needed"
        draft.note("assumed", "llama_pro_path", why, target="adapter.num_new_layers")
    else:
        draft.put("adapter.expansion_rate", 0.1)
        why = "its name does not say how many layers were added: a tenth is assumed"
        draft.note("assumed", "llama_pro_path", why, target="adapter.expansion_rate")


def _assemble_data(draft: Draft) -> None:
    word = str(draft.get("dataset") or "alpaca_sample")
    if word not in DATASETS:
        draft.note("unusable", "dataset", f"`--dataset` must be one of {', '.join(DATASETS)}")
        word = "alpaca_sample"
    repository, split, format_, is_sampled = DATASETS[word]
    draft.put("data.format", format_, key="dataset")
    if repository:
        draft.put("data.dataset", repository, key="dataset")
    if split != "train":
        draft.put("data.split", split, key="dataset")
    samples = draft.read("dataset_samples", whole)
    if samples is not None and is_sampled:
        draft.put("data.max_rows", samples, key="dataset_samples")
    elif samples is not None:
        draft.note("dropped", "dataset_samples", f"train.py ignores it with `--dataset {word}`")
    elif is_sampled:
        draft.default("data.max_rows", 512, "dataset_samples")


def _assemble_fsdp(draft: Draft) -> None:
    accumulates = draft.read("gradient_accumulation_steps", whole, 1) > 1
    if draft.get("use_cpu_offload") is None:
        draft.default("fsdp.offload", "cpu", "use_cpu_offload")
    draft.default("fsdp.precision", "bf16", "precision")
    if accumulates and draft.at("fsdp.offload") == "cpu":
        why = "train.py sets it by itself with `--use_cpu_offload` and accumulation"
        draft.put("fsdp.no_sync", True, key="no_sync")
        draft.note("assumed", "no_sync", why, target="fsdp.no_sync")
    elif draft.on("no_sync") and accumulates:
        draft.put("fsdp.no_sync", draft.read("no_sync", boolean, False), key="no_sync")
    elif draft.read("no_sync", boolean, False):
        draft.note("dropped", "no_sync", "train.py switches it off without accumulation")
    address = str(draft.get("master_addr") or "localhost")
    if address not in ("localhost", "127.0.0.1"):
        port = draft.get("master_port") or "12355"
        draft.put("launch.rdzv_endpoint", f"{address}:{port}", key="master_addr")


def _assemble_optimizer(draft: Draft) -> None:
    draft.default("optimizer.kind", "adamw", "optimizer")
    draft.default("optimizer.lr", 1e-5, "lr")
    if draft.at("optimizer.kind") == "adamw":
        draft.default("optimizer.betas", [0.9, 0.95])
        draft.default("optimizer.eps", 1e-5)
        draft.default("optimizer.weight_decay", 0.1, "wd")
    clips = draft.read("apply_gradient_clipping", boolean, False)
    norm = draft.read("grad_norm", number, 0.3) if clips else None
    draft.put(
        "training.max_grad_norm", norm, key="grad_norm" if clips else "apply_gradient_clipping"
    )
    word = str(draft.get("lr_scheduler") or "constant")
    if word not in ("constant", "linear", "cosine"):
        draft.note(
            "unusable", "lr_scheduler", "`--lr_scheduler` must be constant, linear or cosine"
        )
        word = "constant"
    draft.put("lr_scheduler.kind", word, key="lr_scheduler")
    if word != "constant":
        draft.default("lr_scheduler.warmup_ratio", 0.1)
    if word == "cosine":
        draft.default("lr_scheduler.min_lr_ratio", 0.1)


def _assemble_metrics(draft: Draft) -> None:
    if str(draft.get("log_to")) == "wandb":
        draft.put("metrics.sinks", ["jsonl", "wandb"], key="log_to")
        draft.default("metrics.wandb.project", "fsdp_qlora", "project_name")
    if draft.read("profile", boolean, False):
        repeat = draft.read("repeat", whole, 0)
        warmup, active = draft.read("warmup_steps", whole, 1), draft.read("active_steps", whole, 2)
        cycle = draft.read("profiling_frequency", whole, 10)
        wait = draft.read("wait_steps", whole, 0) if repeat else cycle - warmup - active
        steps = {"start_step": max(1, wait + warmup + 1), "num_steps": active}
        draft.put("metrics.profile", steps, key="profile")
        draft.note(
            "assumed",
            "profile",
            "in optimizer steps, where train.py counts micro-batches",
            target="metrics.profile",
        )
