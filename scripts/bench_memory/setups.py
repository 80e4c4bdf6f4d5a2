"""What is measured: one `Setup` a process (or two), all of the same made-up Llama."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 16384,
}
"""56 million weights, 32.8 million of them in embedding and head."""

TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"vocab_size": 512, "num_attention_heads": 2, "num_key_value_heads": 2}

LENGTHS = (512, 1024, 2048, 4096)
FULL_LENGTHS = (*LENGTHS, 8192)
LENGTH = 2048
"""Of the comparison by phase."""

NF4: dict[str, Any] = {"kind": "bnb"}
LORA: dict[str, Any] = {"kind": "lora", "rank": 16, "alpha": 32.0}
DORA = LORA | {"kind": "dora"}


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
        library: ``fsdpq``, or ``transformers`` with PEFT and bitsandbytes.
    """

    name: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: tuple[int, ...] = (LENGTH,)
    num_rows: int = 1
    num_ranks: int = 1
    num_documents: int = 1
    library: str = "fsdpq"


def list_setups(*, full: bool) -> list[Setup]:
    """Returns all setups; ``full`` adds lengths up to 8192."""
    lengths = FULL_LENGTHS if full else LENGTHS
    unquantized = {"quantization": {"kind": "none"}}
    trained = unquantized | {"adapter": {"kind": "none"}}
    rows = {"lengths": (LENGTH // 4,), "num_rows": 4}

    def fsdp(**options: Any) -> dict[str, dict[str, Any]]:
        return {"fsdp": options}

    return [
        Setup("lora", lengths=lengths),
        Setup("dora", {"adapter": DORA}, lengths),
        Setup("lora, packed", lengths=lengths, num_documents=8),
        Setup("lora, eager attention", {"model": {"attn_implementation": "eager"}}),
        Setup("lora, hqq 4 bits", {"quantization": {"kind": "hqq", "nbits": 4}}),
        Setup("lora, bf16 base", unquantized),
        Setup("llama_pro, 2 new layers", {"adapter": {"kind": "llama_pro", "num_new_layers": 2}}),
        Setup("full finetuning", trained),
        Setup("lora, checkpointing selective", fsdp(activation_checkpointing="selective")),
        Setup("lora, checkpointing none", fsdp(activation_checkpointing="none")),
        Setup("lora, activation_offload", fsdp(activation_offload=True)),
        Setup("lora, offload cpu", fsdp(offload="cpu")),
        Setup("lora, offload disk", fsdp(offload="disk")),
        Setup("lora, 4 rows", **rows),
        Setup("lora, 4 rows, layer_chunks 4", {"training": {"layer_chunks": 4}}, **rows),
        Setup("lora, 2 ranks", num_ranks=2),
        Setup("full finetuning, 2 ranks", trained, num_ranks=2),
        Setup("PEFT lora", {"adapter": LORA}, LENGTHS, library="transformers"),
        Setup("PEFT dora", {"adapter": DORA}, library="transformers"),
    ]
