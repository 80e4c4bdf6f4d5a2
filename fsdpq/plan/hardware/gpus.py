"""GPUs by the names that people give them: ``2x24GiB``, ``RTX 4090``, ``8xA100-80GB``.

A card of which only the memory is known (``24GiB``) can be planned for in bytes, not in seconds.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping

from fsdpq.errors import UsageError
from fsdpq.plan.hardware.gpu_cards import CARDS, Card
from fsdpq.plan.hardware.machine import GIB, Gpu

MAX_GPUS = 1024
"""Of one machine; more is a typing mistake."""

MAX_GIB = 2048.0
"""Memory of one GPU; more is a typing mistake."""

SIZE_TOLERANCE = 0.12
"""Between the size on the box and the memory that CUDA finds."""

EXAMPLES = "write it like `2x24GiB`, `1xRTX4090` or `8xA100-80GB`"

_COUNT_FIRST = re.compile(r"(\d+)\s*[x\u00d7*]\s*(\S.*)", re.IGNORECASE)
_COUNT_LAST = re.compile(r"(\S.*?)\s*(?:[\u00d7*]|\bx)\s*(\d+)", re.IGNORECASE)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*g(?:i?b)?", re.IGNORECASE)
_GIGABYTES = re.compile(r"(?<=\d)\s*gi?b?\b", re.IGNORECASE)
_GEFORCE_S = re.compile(r"\b[2-5]0[5-9]0( ?ti)? ?s\b")
"""Short for Super: ``4070TiS``."""

_UNSAID = (
    "nvidia", "geforce", "tesla", "quadro", "generation", "blackwell", "workstation edition",
    "server edition", "hbm3e", "hbm3", "hbm2e", "hbm2", "sxm5", "sxm4", "sxm2", "sxm", "rtx",
)  # fmt: skip
"""Words that tell no two cards of the table apart."""


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Returns the GPUs of one machine that ``text`` names, all of a kind.

    ``2x24GiB``, ``24GB`` (a card sold as one of 24 GB has 24 GiB), ``2x RTX 3090``, ``rtx4090``,
    ``4090 x2``, ``8xA100-80GB``, and names as ``nvidia-smi`` gives them. Several kinds, apart by
    commas, are refused: ranks are alike.

    Raises:
        UsageError: nothing is known by this name, or it names several kinds.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError("`--gpus` names no GPU", hint=EXAMPLES)
    gpus = [gpu for part in parts for gpu in _parse_part(part)]
    kinds = list(dict.fromkeys(gpu.name for gpu in gpus))
    if len(kinds) > 1:
        raise UsageError(
            f"`{text}` names GPUs of {len(kinds)} kinds, and every rank needs the same memory",
            hint="plan for the smallest: name that one as often as there are GPUs",
        )
    if len(gpus) > MAX_GPUS:
        raise UsageError(f"`{text}` is more than {MAX_GPUS} GPUs in one machine", hint=EXAMPLES)
    return tuple(gpus)


def _parse_part(part: str) -> list[Gpu]:
    count, name = 1, part
    if found := _COUNT_FIRST.fullmatch(part):
        count, name = int(found[1]), found[2]
        if count > MAX_GPUS and name.isdigit():  # 4090 x2
            count, name = int(name), found[1]
    elif found := _COUNT_LAST.fullmatch(part):
        count, name = int(found[2]), found[1]
    if not 1 <= count <= MAX_GPUS:
        raise UsageError(f"`{part}` is {count} GPUs", hint=f"between 1 and {MAX_GPUS}: {EXAMPLES}")
    return [_parse_one(name)] * count


def _parse_one(name: str) -> Gpu:
    if found := _MEMORY.fullmatch(name):
        return unnamed_gpu(float(found[1]))
    if (gpu := find_gpu(name)) is not None:
        return gpu
    key = normalize(name)
    variants = [card.name for card in CARDS if normalize(card.name).startswith(f"{key} ")]
    if variants:
        listed = ", ".join(f"`{variant}`" for variant in variants)
        raise UsageError(f"there is more than one `{name}`", hint=f"say which: {listed}")
    close = difflib.get_close_matches(key, list(_cards_by_name()), n=1, cutoff=0.7)
    if close:
        hint = f"did you mean `{_cards_by_name()[close[0]].name}`? Memory alone will do: `24GiB`"
    else:
        hint = EXAMPLES
    raise UsageError(f"`{name}` is no GPU that fsdpq knows", hint=hint)


def unnamed_gpu(gib: float) -> Gpu:
    """Returns a GPU of which only the memory is known.

    Raises:
        UsageError: no GPU has that much.
    """
    if not 0 < gib <= MAX_GIB:
        raise UsageError(f"`{gib:g}GiB` is no GPU's memory", hint=EXAMPLES)
    return Gpu(name=f"{gib:g} GiB GPU", memory_bytes=int(gib * GIB))


def find_gpu(name: str) -> Gpu | None:
    """Returns the card of this name, also as ``nvidia-smi`` gives it; None where none is known."""
    card = find_gpu_card(name)
    return None if card is None else card.gpu


def find_gpu_card(name: str) -> Card | None:
    """Returns the row of the table for a card's name, None where there is none.

    A size beside a name that needs none (``RTX 5090 32GB``) must be about what the card has.
    """
    key = normalize(name)
    if (card := _cards_by_name().get(key)) is not None:
        return card
    plain, _, size = key.rpartition(" ")
    card = _cards_by_name().get(plain) if _is_size(size) else None
    return card if card and abs(float(size[:-2]) / card.gib - 1) < SIZE_TOLERANCE else None


def normalize(name: str) -> str:
    """Returns what two spellings of one card have in common: ``RTX-4070Ti`` is ``4070 ti``."""
    text = re.sub(r"[\s_\-/()]+", " ", name.lower())
    for word in _UNSAID:
        text = text.replace(word, " ")
    text = _GIGABYTES.sub("gb", text)
    text = re.sub(r"(?<=\d)(ti|super|ada|pcie|nvl)", r" \1", text)
    text = re.sub(r"(?<=ti)(super|\d)", r" \1", text)
    text = re.sub(r"(?<=[\di])\s*s\b", " super", text) if _GEFORCE_S.search(text) else text
    text = re.sub(r"\bpro(?=\d)", "pro ", text)
    words = text.split()
    # The size comes last, wherever it was said.
    return " ".join([w for w in words if not _is_size(w)] + [w for w in words if _is_size(w)])


def _is_size(word: str) -> bool:
    return re.fullmatch(r"\d+gb", word) is not None


@functools.cache
def _cards_by_name() -> Mapping[str, Card]:
    return {normalize(name): card for card in CARDS for name in (card.name, *card.also)}
