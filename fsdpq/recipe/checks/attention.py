"""Rules about ``model.attn_implementation``: where it runs, and whether packed rows stay apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, precision_key, told_dtype
from fsdpq.recipe.root import Recipe

KEY = "model.attn_implementation"
HINT = "use `attn_implementation: sdpa`"

MAX_FLASH_HEAD_DIM = 256
"""https://github.com/Dao-AILab/flash-attention#nvidia-cuda-support"""


def check_flash_attention_runs(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``flash_attention_2`` on a CPU, or in fp32: its kernels take fp16 and bf16 on GPUs."""
    if recipe.model.attn_implementation != "flash_attention_2":
        return
    if recipe.launch.device == "cpu":
        message = "`flash_attention_2` needs a GPU, and `launch.device` is `cpu`"
        yield Problem(message, KEY, hint=HINT)
    elif told_dtype(recipe) == "fp32":
        source = "model.dtype" if recipe.model.dtype == "fp32" else precision_key(recipe, "compute")
        message = f"`flash_attention_2` computes in bf16 or fp16, and `{source}` is `fp32`"
        yield Problem(message, KEY, hint=f"{HINT}, or compute in bf16")


def check_flash_attention_head_size(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """``flash_attention_2`` for a model with heads of more than 256 values."""
    card = card_of(recipe, base_dir)
    if recipe.model.attn_implementation != "flash_attention_2" or card is None:
        return
    if card.head_dim > MAX_FLASH_HEAD_DIM:
        message = f"`flash_attention_2` computes heads of at most {MAX_FLASH_HEAD_DIM} values, and "
        yield Problem(f"{message}the model has {card.head_dim}", KEY, hint=HINT)


def check_flex_attention_runs(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``flex_attention`` on a CPU: it has no backward pass there (torch 2.13)."""
    on_cpu = recipe.launch.device == "cpu"
    if recipe.model.attn_implementation == "flex_attention" and on_cpu:
        message = "`flex_attention` cannot be trained on a CPU, and `launch.device` is `cpu`"
        yield Problem(message, KEY, hint=HINT)


def check_architecture_has_attention(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """An attention code path that transformers refuses for the model's architecture."""
    card, chosen = card_of(recipe, base_dir), recipe.model.attn_implementation
    if card is not None and chosen in card.family.lacks_attention:
        message = f"`{card.model_type}` models do not run with `attn_implementation: {chosen}`"
        yield Problem(message, KEY, hint="write `attn_implementation: eager` in `model`")


def check_flex_attention_runs_whole(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``flex_attention`` with ``layer_chunks``: its block mask is of all rows (torch 2.13)."""
    chunks = recipe.training.layer_chunks
    if recipe.model.attn_implementation == "flex_attention" and chunks > 1:
        message = "`flex_attention` computes all rows at once, and `training.layer_chunks` is "
        hint = f"use `training.layer_chunks: 1`, or {HINT[4:]}"
        yield Problem(f"{message}{chunks}", KEY, hint=hint)


def check_packed_rows_stay_apart(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Packing where one document would see another.

    Documents are kept apart by their position ids, in the masks of ``sdpa``, ``eager`` and
    ``flex_attention``, for every architecture with a model card. ``flash_attention_2`` is told
    where documents begin in a micro-batch, or finds it out for one row (``_is_packed_sequence``);
    Falcon's layers do not tell it.
    """
    if recipe.data.packing == "none" or recipe.model.attn_implementation != "flash_attention_2":
        return
    training, card = recipe.training, card_of(recipe, base_dir)
    rows = -(-training.micro_batch_size // training.layer_chunks)
    if card is not None and not card.family.isolates_documents:
        message = f"`data.packing`: with `flash_attention_2` packed rows of `{card.model_type}` "
        yield Problem(f"{message}models would see each other", "data.packing", hint=HINT)
    elif training.layer_chunks > 1 and rows > 1:
        message = "`data.packing`: with `flash_attention_2` packed rows see each other unless a"
        message = f"{message} chunk of a layer is one sequence, and here it is {rows}"
        hint = f"use `training.layer_chunks: {training.micro_batch_size}` or `1`, or {HINT[4:]}"
        yield Problem(message, "data.packing", hint=hint)


CHECKS = (
    check_flash_attention_runs,
    check_flash_attention_head_size,
    check_flex_attention_runs,
    check_flex_attention_runs_whole,
    check_architecture_has_attention,
    check_packed_rows_stay_apart,
)
