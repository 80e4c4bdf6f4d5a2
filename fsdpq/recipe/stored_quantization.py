"""How a local checkpoint is quantized already, by its ``config.json``, and what a recipe may say.

Both halves ask: ``validate`` before a run, the worker before it loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from fsdpq.errors import Problem
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions, NoQuantOptions

UNQUANTIZED_HINT = "name the unquantized repository: fsdpq quantizes while it loads"


def read_stored_quantization(directory: Path) -> dict[str, Any] | None:
    """Returns ``quantization_config`` of a checkpoint; None where its weights are unquantized.

    A ``config.json`` that cannot be read counts as without one: whoever needs it says what is
    wrong with it.
    """
    try:
        config: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored_in(cast("dict[str, Any]", config)) if isinstance(config, dict) else None


def stored_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns ``quantization_config`` of a config.json's table; None where there is none."""
    stored: Any = config.get("quantization_config")
    return cast("dict[str, Any]", stored) if isinstance(stored, dict) else None


def is_bnb_4bit(stored: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is the one of bitsandbytes' 4-bit weights."""
    return bool(stored.get("load_in_4bit")) and method_of(stored) == "bitsandbytes"


def method_of(stored: Mapping[str, Any]) -> str:
    """Returns what quantized the weights (``bitsandbytes``, ``gptq``)."""
    flags = "load_in_4bit" in stored or "load_in_8bit" in stored
    return str(stored.get("quant_method") or ("bitsandbytes" if flags else "some method"))


def find_disagreements(
    stored: Mapping[str, Any], options: BnbOptions | HqqOptions | NoQuantOptions
) -> Iterator[Problem]:
    """Yields what keeps a base that is quantized already from being used under ``options``.

    The block size is in no ``config.json``: the loader compares it.

    Args:
        stored: what `read_stored_quantization` returned.
        options: the recipe's ``quantization``.
    """
    if not is_bnb_4bit(stored):
        method = method_of(stored)
        bits = " in 8 bits" if stored.get("load_in_8bit") else ""
        message = f"the weights of `model.name_or_path` are quantized already, by {method}{bits}:"
        message += " only 4-bit weights of bitsandbytes can be read as they are"
        yield Problem(message, "model.name_or_path", hint=UNQUANTIZED_HINT)
        return
    if not isinstance(options, BnbOptions):
        message = "the weights of `model.name_or_path` are quantized already, by bitsandbytes, and"
        message += f" `quantization.kind` is `{options.kind}`"
        hint = "use `quantization: {kind: bnb}`, or name the unquantized repository"
        yield Problem(message, "quantization.kind", hint=hint)
        return
    pairs = (
        ("quant_type", stored.get("bnb_4bit_quant_type", "fp4"), options.quant_type),
        ("double_quant", bool(stored.get("bnb_4bit_use_double_quant")), options.double_quant),
    )
    for field, found, told in pairs:
        if found != told:
            shown, said = (str(v).lower() if isinstance(v, bool) else v for v in (found, told))
            message = f"the weights of `model.name_or_path` are quantized already with `{field}:"
            message += f" {shown}`, the recipe says `{said}`"
            yield Problem(message, f"quantization.{field}", hint=f"use `{field}: {shown}`")
