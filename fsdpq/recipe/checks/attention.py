"""Rules about ``model.attn_implementation``: where it runs, and whether packed rows stay apart."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.checks.facts import card_of, precision_key, told_dtype
from fsdpq.recipe.root import Recipe

KEY = "model.attn_implementation"
HINT = "use `attn_implementation: sdpa`"


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


def check_flash_attention_installed(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``flash_attention_2`` without the package ``flash-attn``."""
    wanted = recipe.model.attn_implementation == "flash_attention_2"
    if wanted and recipe.launch.device != "cpu" and importlib.util.find_spec("flash_attn") is None:
        message = "`flash_attention_2` needs the package `flash-attn`, which is not installed"
        hint = "`pip install 'fsdpq[flash]'` (it compiles for a while), or "
        yield Problem(message, KEY, hint=hint + HINT)


def check_flex_attention_runs(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """``flex_attention`` on a CPU: it has no backward pass there."""
    on_cpu = recipe.launch.device == "cpu"
    if recipe.model.attn_implementation == "flex_attention" and on_cpu:
        message = "`flex_attention` needs a GPU, and `launch.device` is `cpu`"
        yield Problem(message, KEY, hint=HINT)


def check_architecture_has_attention(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """An attention code path that transformers refuses for the model's architecture."""
    card, chosen = card_of(recipe, base_dir), recipe.model.attn_implementation
    if card is not None and chosen in card.family.lacks_attention:
        message = f"`{card.model_type}` models do not run with `attn_implementation: {chosen}`"
        yield Problem(message, KEY, hint="write `attn_implementation: eager` in `model`")


def check_packed_rows_stay_apart(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Packing where one document would see another.

    transformers 5.23 keeps documents apart by their position ids: in the masks of ``sdpa``,
    ``eager`` and ``flex_attention`` for every architecture but Falcon, and in
    ``flash_attention_2`` for one row at a time (``_is_packed_sequence``).
    """
    if recipe.data.packing == "none":
        return
    training, card = recipe.training, card_of(recipe, base_dir)
    rows = training.micro_batch_size // training.layer_chunks
    if card is not None and not card.family.isolates_documents:
        message = f"`data.packing`: in `{card.model_type}` models packed rows would see each other"
        yield Problem(message, "data.packing", hint="use `packing: none`")
    elif recipe.model.attn_implementation == "flash_attention_2" and rows > 1:
        message = "`data.packing`: with `flash_attention_2` packed rows see each other unless a"
        hint = "use `training.micro_batch_size: 1` and a longer `seq_len`, or "
        message = f"{message} layer computes one sequence at a time, and here it computes {rows}"
        yield Problem(message, "data.packing", hint=hint + HINT)


CHECKS = (
    check_flash_attention_runs,
    check_flash_attention_installed,
    check_flex_attention_runs,
    check_architecture_has_attention,
    check_packed_rows_stay_apart,
)
