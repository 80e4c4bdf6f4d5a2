"""The runs that the proof is about: models, ranks, batches, and what was measured by others.

The recipe's first authors measured their own on two cards
(https://github.com/AnswerDotAI/fsdp_qlora/blob/main/benchmarks_03_2024.md): Llama 2, Yi-34B and
Mistral-7B v0.2, QLoRA of rank 64, peak of the memory that torch's allocator reserved on a card.
Their adapters leave ``o_proj`` out, those here do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fsdpq.worker.bench.shapes import Batch

CAP_GIB = 24.0
LORA_RANK = 64
HOST = {"fsdp": {"offload": "cpu"}}
HOST_ALL = {"fsdp": {"offload": "cpu", "activation_offload": True}}

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """One run, seen by rank 0.

    Attributes:
        shape: a name of `SHAPES`.
        ranks: of the run, one GPU each.
        batch: one micro-batch of a rank.
        sections: of the recipe, beyond NF4 with double quantization and LoRA on all linears.
        theirs_gib: what the first recipe reserved on a card for the same.
        lora_rank: of its adapters.
    """

    shape: str
    ranks: int
    batch: Batch
    sections: Sections = field(default_factory=dict[str, Mapping[str, Any]])
    theirs_gib: float | None = None
    lora_rank: int = LORA_RANK

    @property
    def name(self) -> str:
        """Says which, the same in every file of rows."""
        of = f", rank 0 of {self.ranks}" if self.ranks > 1 else ""
        words = (f"{k}={v}" for each in self.sections.values() for k, v in each.items())
        rank = [f"r{self.lora_rank}"] * (self.lora_rank != LORA_RANK)
        return ", ".join([f"{self.shape}{of}", str(self.batch), *rank, *words])

    def recipe_sections(self, batch: Batch) -> dict[str, dict[str, Any]]:
        """Returns the sections of its recipe, ranks and batch included."""
        own = {name: dict(section) for name, section in self.sections.items()}
        training = {"micro_batch_size": batch.rows, "global_batch_size": batch.rows * self.ranks}
        own["training"] = training | own.get("training", {})
        own["launch"] = {"nproc_per_node": self.ranks} | own.get("launch", {})
        return own


ALONE = Case("70b", 1, Batch(2, 2048), HOST)
"""The headline: 70B on one card of 24 GiB. The first recipe needed two for it."""

ALONE_HOST_ALL = Case("70b", 1, Batch(2, 2048), HOST_ALL)
ALONE_DISK = Case("70b", 1, Batch(2, 2048), {"fsdp": {"offload": "disk"}})

FEW_CARDS = (
    Case(
        "70b", 2, Batch(2, 2048),
        {"fsdp": {"activation_offload": True}, "training": {"layer_chunks": 2}}, lora_rank=16,
    ),
    Case("70b", 2, Batch(1, 2048), {"fsdp": {"activation_offload": True, "precision": "bf16"}}),
    Case("70b", 4, Batch(2, 2048)),
    Case(
        "70b", 4, Batch(4, 2048),
        {"fsdp": {"activation_offload": True}, "training": {"layer_chunks": 4}},
    ),
    Case("405b", 8, Batch(1, 2048), HOST_ALL),
)  # fmt: skip
"""70B without CPU offload on 2 and 4 cards, 405B on 8 with it.

Rank 64 with fp32 adapters does not fit on two: their optimizer alone takes 3.1 GiB of each card.
"""

FIRST_RECIPE = (
    Case("7b", 2, Batch(1, 512), theirs_gib=4.98),
    Case("7b", 2, Batch(4, 512)),
    Case("7b", 2, Batch(10, 512)),
    Case("7b", 2, Batch(1, 2048), theirs_gib=5.21),
    Case("7b", 2, Batch(4, 2048), theirs_gib=11.22),
    Case("7b", 2, Batch(10, 2048), theirs_gib=20.97),
    Case("34b", 2, Batch(2, 2048), theirs_gib=23.05),
    Case("34b", 2, Batch(4, 2048), HOST, theirs_gib=22.98),
    Case("70b", 2, Batch(2, 2048), HOST, theirs_gib=14.92),
    Case("mistral-7b", 2, Batch(12, 2048), HOST, theirs_gib=22.54),
    Case("mistral-7b", 2, Batch(1, 24576), HOST, theirs_gib=22.54),
)
"""Their tables, on two cards."""

CASES = (ALONE, ALONE_HOST_ALL, ALONE_DISK, *FEW_CARDS, *FIRST_RECIPE)
