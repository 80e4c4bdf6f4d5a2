"""The one table of everything a recipe can choose.

A row names a section, a kind, its options (pydantic, torch-free), the path of its builder (a
string, so that reading the table imports no torch) and the packages it needs. There are no
decorators and no import-time side effects: this file shows every choice, and a recipe can name
nothing that is not in it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fsdpq.errors import MissingDependencyError
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import (
    DoraOptions,
    LlamaProOptions,
    LoraOptions,
    NoAdapterOptions,
)
from fsdpq.recipe.sections.lr_scheduler import (
    ConstantScheduleOptions,
    CosineScheduleOptions,
    LinearScheduleOptions,
    WsdScheduleOptions,
)
from fsdpq.recipe.sections.optimizer import (
    AdadeltaOptions,
    AdamOptions,
    AdamW8bitOptions,
    AdamWOptions,
    MuonOptions,
    SgdOptions,
)
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, NoQuantOptions


@dataclass(frozen=True)
class Row:
    """One choice.

    Attributes:
        section: section of the recipe (``quantization``).
        kind: the value of its ``kind``.
        options: the pydantic model of the section's fields.
        builder: ``package.module:name`` of what the worker calls with the options first.
        requires: importable names of packages beyond the core ones.
        summary: one line for ``fsdpq kinds``.
    """

    section: str
    kind: str
    options: type[Options]
    builder: str
    requires: tuple[str, ...]
    summary: str


ROWS: tuple[Row, ...] = (
    Row(
        "quantization", "bnb", BnbOptions, "fsdpq.quantization.bnb:BnbQuantizer",
        ("bitsandbytes",), "4-bit NF4 or FP4 by bitsandbytes, scales quantized too",
    ),
    Row(
        "quantization", "hqq", HqqOptions, "fsdpq.quantization.hqq:HqqQuantizer",
        ("hqq", "termcolor"), "8, 4, 3, 2 or 1 bits by hqq, no calibration",
    ),
    Row(
        "quantization", "none", NoQuantOptions, "fsdpq.quantization.none:NoQuantizer",
        (), "the base stays in model.dtype",
    ),
    Row(
        "adapter", "lora", LoraOptions, "fsdpq.adapter.lora:LoraAdapter",
        (), "low-rank matrices beside frozen linear layers",
    ),
    Row(
        "adapter", "dora", DoraOptions, "fsdpq.adapter.dora:DoraAdapter",
        (), "LoRA that trains each output row's magnitude apart",
    ),
    Row(
        "adapter", "llama_pro", LlamaProOptions, "fsdpq.adapter.llama_pro:LlamaProAdapter",
        (), "new decoder layers that start as identities",
    ),
    Row(
        "adapter", "none", NoAdapterOptions, "fsdpq.adapter.full:FullFinetuning",
        (), "full finetuning: every weight is trained",
    ),
    Row(
        "optimizer", "adamw", AdamWOptions, "fsdpq.optimizer.build:build_adamw",
        (), "AdamW with decoupled weight decay",
    ),
    Row(
        "optimizer", "adam", AdamOptions, "fsdpq.optimizer.build:build_adam",
        (), "Adam, weight decay added to the gradient",
    ),
    Row(
        "optimizer", "adamw_8bit", AdamW8bitOptions, "fsdpq.optimizer.adamw_8bit:build_adamw_8bit",
        ("bitsandbytes",), "AdamW with running means in 8 bits, by bitsandbytes",
    ),
    Row(
        "optimizer", "muon", MuonOptions, "fsdpq.optimizer.muon:build_muon",
        (), "momentum made orthogonal, matrix by matrix",
    ),
    Row(
        "optimizer", "sgd", SgdOptions, "fsdpq.optimizer.build:build_sgd",
        (), "stochastic gradient descent, with momentum",
    ),
    Row(
        "optimizer", "adadelta", AdadeltaOptions, "fsdpq.optimizer.build:build_adadelta",
        (), "Adadelta",
    ),
    Row(
        "lr_scheduler", "constant", ConstantScheduleOptions,
        "fsdpq.optimizer.build:build_constant_schedule",
        (), "warmup, then a constant learning rate",
    ),
    Row(
        "lr_scheduler", "linear", LinearScheduleOptions,
        "fsdpq.optimizer.build:build_linear_schedule",
        (), "warmup, then a straight line down",
    ),
    Row(
        "lr_scheduler", "cosine", CosineScheduleOptions,
        "fsdpq.optimizer.build:build_cosine_schedule",
        (), "warmup, then half a cosine down",
    ),
    Row(
        "lr_scheduler", "wsd", WsdScheduleOptions, "fsdpq.optimizer.build:build_wsd_schedule",
        (), "warmup, a stable phase, a short decay",
    ),
)  # fmt: skip


SINK_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Values of ``metrics.sinks`` -> the packages they need."""


def find_row(section: str, kind: str) -> Row:
    """Returns the row of ``kind`` in ``section``.

    Raises:
        KeyError: there is none; a validated recipe never gets here.
    """
    for row in ROWS:
        if (row.section, row.kind) == (section, kind):
            return row
    raise KeyError(f"no kind `{kind}` in section `{section}`")


def check_packages(recipe: Recipe, *, trains: bool = True) -> None:
    """Checks that every package that a recipe needs beyond the core ones is installed.

    Args:
        recipe: of the run.
        trains: False asks for what quantizing its base needs only.

    Raises:
        MissingDependencyError: names all that are missing, and who needs them.
    """
    missing: dict[str, str] = {}
    sections = dict.fromkeys(row.section for row in ROWS) if trains else ("quantization",)
    for section in sections:
        row = find_row(section, getattr(recipe, section).kind)
        who = f"`{section}: {{kind: {row.kind}}}`"
        missing |= {name: who for name in row.requires if not is_installed(name)}
    missing |= _missing_for_training(recipe) if trains else {}
    if missing:
        needs = ", ".join(f"{who} needs `{name}`" for name, who in missing.items())
        raise MissingDependencyError(
            f"packages are not installed: {needs}", hint=f"pip install {' '.join(missing)}"
        )


def _missing_for_training(recipe: Recipe) -> dict[str, str]:
    """Returns missing packages outside of the table, as pip calls them -> who needs them."""
    missing: dict[str, str] = {}
    if recipe.model.attn_implementation == "flash_attention_2" and not is_installed("flash_attn"):
        missing["flash-attn"] = "`attn_implementation: flash_attention_2`"
    if recipe.model.use_liger_kernel and not is_installed("liger_kernel"):
        missing["liger-kernel"] = "`use_liger_kernel: true`"
    if recipe.evaluation.tasks and not is_installed("lm_eval"):
        missing["lm-eval"] = "`evaluation.tasks`"
    for sink in recipe.metrics.sinks:
        if sink == "wandb" and recipe.metrics.wandb.mode == "disabled":
            continue
        if sink in SINK_PACKAGES and not is_installed(SINK_PACKAGES[sink]):
            missing[SINK_PACKAGES[sink]] = f"`{sink}` in `metrics.sinks`"
    return missing


def is_installed(package: str) -> bool:
    """Whether ``package`` can be imported."""
    return importlib.util.find_spec(package) is not None


def resolve_builder(section: str, options: Any) -> Callable[..., Any]:
    """Imports and returns the builder for ``options``.

    Worker half only; `check_packages` was asked before.
    """
    row = find_row(section, options.kind)
    module, name = row.builder.split(":")
    return getattr(importlib.import_module(module), name)
