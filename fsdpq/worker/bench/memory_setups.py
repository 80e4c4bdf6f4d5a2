"""What ``fsdpq bench memory`` measures: one `Setup` a process (or two), all of the same Llama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdpq.errors import UsageError

LENGTH = 2048
"""Of the comparison by phase."""

NF4: dict[str, Any] = {"kind": "bnb"}
LORA: dict[str, Any] = {"kind": "lora", "rank": 16, "alpha": 32.0}
DORA = LORA | {"kind": "dora"}
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
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
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
    rows = {"lengths": (max(1, one // 4),), "num_rows": 4}

    def fsdp(**options: Any) -> dict[str, dict[str, Any]]:
        return {"fsdp": options}

    alone = {"lengths": (one,)}
    setups = [
        Setup("lora", lengths=lengths),
        Setup("dora", {"adapter": DORA}, lengths),
        Setup("lora, packed", lengths=lengths, num_documents=8),
        Setup("lora, eager attention", {"model": {"attn_implementation": "eager"}}, **alone),
        Setup("lora, hqq 4 bits", {"quantization": {"kind": "hqq", "nbits": 4}}, **alone),
        Setup("lora, bf16 base", unquantized, **alone),
        Setup(
            "llama_pro, 2 new layers", {"adapter": {"kind": "llama_pro", "num_new_layers": 2}},
            **alone,
        ),
        Setup("full finetuning", trained, **alone),
        Setup(
            "lora, checkpointing selective", fsdp(activation_checkpointing="selective"), **alone
        ),
        Setup("lora, checkpointing none", fsdp(activation_checkpointing="none"), **alone),
        Setup("lora, activation_offload", fsdp(activation_offload=True), **alone),
        Setup("lora, offload cpu", fsdp(offload="cpu"), **alone),
        Setup("lora, offload disk", fsdp(offload="disk"), **alone),
        Setup("lora, 4 rows", **rows),
        Setup("lora, 4 rows, layer_chunks 4", {"training": {"layer_chunks": 4}}, **rows),
        Setup("lora, 2 ranks", num_ranks=2, **alone),
        Setup("full finetuning, 2 ranks", trained, num_ranks=2, **alone),
    ]  # fmt: skip
    if compare:
        setups += [
            Setup("PEFT lora", {"adapter": LORA}, lengths, stock=True),
            Setup("PEFT dora", {"adapter": DORA}, stock=True, **alone),
        ]
    return setups


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
