"""Optimizers and schedules by the names of transformers, as recipes call them."""

from __future__ import annotations

from typing import Any

STATES_DIFFER = "its states are kept in {} there and not here: they are those of the adapter only"

OPTIMIZERS: dict[str, Any] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": ("adamw_8bit", STATES_DIFFER.format("pageable memory")),
    "ademamix_8bit": ("adamw_8bit", "AdamW has one mean of gradients, not two"),
    "muon": ("muon", "its learning rates are scaled to AdamW's"),
    **dict.fromkeys(
        ("paged_adamw", "paged_adamw_32bit"), ("adamw", STATES_DIFFER.format("pageable memory"))
    ),
    "adamw_torch_4bit": ("adamw", STATES_DIFFER.format("4 bits")),
    "sgd": "sgd",
}
NO_OPTIMIZER = "choose one of `fsdpq kinds optimizer`; without it the recipe takes adamw"

SCHEDULES: dict[str, Any] = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": (
        "wsd",
        "set `lr_scheduler.decay_steps`: a tenth of the steps by default",
    ),
    "cosine_with_restarts": ("cosine", "one half cosine, without restarts"),
}
NO_SCHEDULE = "choose one of `fsdpq kinds lr_scheduler`; without it the rate stays constant"
