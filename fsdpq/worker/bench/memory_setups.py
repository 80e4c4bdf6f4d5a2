"""What ``fsdpq bench memory`` measures: one `Setup` a process (or two), all of the same Llama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdpq.errors import UsageError
from fsdpq.registry import is_installed

LENGTH = 2048
"""Of the comparison by phase."""

NF4: dict[str, Any] = {"kind": "bnb"}
LORA: dict[str, Any] = {"kind": "lora", "rank": 16, "alpha": 32.0}
DORA = LORA | {"kind": "dora"}
Sections = dict[str, dict[str, Any]]
ALL, ALL_OF_ONE_RANK = "all", "all of one rank"


@dataclass(frozen=True)
class Setup:
    """One configuration.

    Attributes:
        name: for the table.
        sections: what differs from NF4 and LoRA with full checkpointing, by section of the recipe.
        lengths: steps are measured with rows of so many tokens.
        num_rows: of a micro-batch.
        num_ranks: processes.
        num_documents: packed into each row, 1 for none.
        stock: train with transformers, PEFT and bitsandbytes.
    """

    name: str
    sections: Sections = field(default_factory=dict)
    lengths: Sequence[int] = (LENGTH,)
    num_rows: int = 1
    num_ranks: int = 1
    num_documents: int = 1
    stock: bool = False


def list_setups(lengths: Sequence[int], *, compare: bool) -> list[Setup]:
    """Returns all setups.

    Args:
        lengths: of the rows; setups that are measured at one length have that nearest to `LENGTH`.
        compare: those of stock libraries too.
    """
    one = min(lengths, key=lambda length: abs(length - LENGTH))
    unquantized = {"quantization": {"kind": "none"}}
    trained = unquantized | {"adapter": {"kind": "none"}}

    def fsdp(**options: Any) -> Sections:
        return {"fsdp": options}

    def at_one(name: str, sections: Sections | None = None, num_ranks: int = 1) -> Setup:
        return Setup(name, sections or {}, (one,), num_ranks=num_ranks)

    def of_rows(name: str, sections: Sections | None = None) -> Setup:
        return Setup(name, sections or {}, (max(1, one // 4),), num_rows=4)

    new_layers = {"adapter": {"kind": "llama_pro", "num_new_layers": 2}}
    setups = [
        Setup("lora", lengths=lengths),
        Setup("dora", {"adapter": DORA}, lengths),
        Setup("lora, packed", lengths=lengths, num_documents=8),
        at_one("lora, eager attention", {"model": {"attn_implementation": "eager"}}),
        at_one("lora, hqq 4 bits", {"quantization": {"kind": "hqq", "nbits": 4}}),
        at_one("lora, bf16 base", unquantized),
        at_one("llama_pro, 2 new layers", new_layers),
        at_one("full finetuning", trained),
        at_one("lora, checkpointing selective", fsdp(activation_checkpointing="selective")),
        at_one("lora, checkpointing none", fsdp(activation_checkpointing="none")),
        at_one("lora, activation_offload", fsdp(activation_offload=True)),
        at_one("lora, offload cpu", fsdp(offload="cpu")),
        at_one("lora, offload disk", fsdp(offload="disk")),
        of_rows("lora, 4 rows"),
        of_rows("lora, 4 rows, layer_chunks 4", {"training": {"layer_chunks": 4}}),
        at_one("lora, 2 ranks", num_ranks=2),
        at_one("full finetuning, 2 ranks", trained, 2),
    ]
    if compare:
        setups += [
            Setup("PEFT lora", {"adapter": LORA}, lengths, stock=True),
            Setup("PEFT dora", {"adapter": DORA}, (one,), stock=True),
        ]
    return setups


def lacking(setup: Setup) -> str:
    """Returns why a setup cannot be measured here, empty where it can."""
    uses_hqq = setup.sections.get("quantization", {}).get("kind") == "hqq"
    missing = uses_hqq and not all(map(is_installed, ("hqq", "termcolor")))
    return "hqq is not installed (`pip install 'fsdpq[hqq]'`)" if missing else ""


def choose_setups(text: str, setups: Sequence[Setup]) -> list[Setup]:
    """Returns the setups that ``text`` names: all, or names separated by semicolons.

    Those of stock libraries stay where any of the same method is chosen.

    Raises:
        UsageError: there is none of that name.
    """
    if text == ALL:
        return list(setups)
    if text == ALL_OF_ONE_RANK:
        return [setup for setup in setups if setup.num_ranks == 1]
    names = [name.strip() for name in text.split(";")]
    known = {setup.name: setup for setup in setups}
    for name in names:
        if name not in known:
            hint = "there are `" + "`, `".join(known) + "`, separated by `;`"
            raise UsageError(f"`memory.setups`: there is no `{name}`", hint)
    names += [name for name in known if name.removeprefix("PEFT ") in names and name not in names]
    return [setup for name, setup in known.items() if name in names]
