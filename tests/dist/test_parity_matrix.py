"""Every method over every base under every strategy trains as other people's code does unsharded.

The reference of a method and a base is one process: transformers' model whose linears are the
quantization library's own, PEFT's adapters, `torch.optim.AdamW`. docs/developing/parity.md has the
matrix as a table.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import bases, library_models, reference
from support.ranks import RankPool
from support.sharded import train, whole_a
from support.tiny import random_rows, save_tiny_llama, tiny_recipe

from fsdpq.data.text.tokenize import Row
from fsdpq.dist import check_same_on_all_ranks
from fsdpq.errors import TrainingError
from fsdpq.recipe.checks import CHECKS

Sections = dict[str, dict[str, Any]]

NUM_STEPS = 5
BATCH = 6
LR = 1e-2
MAX_NORM = 1.0

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True},
    "dora": LORA | {"kind": "dora"},
    "llama_pro": {"kind": "llama_pro", "num_new_layers": 1},
    "none": {"kind": "none"},
}
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"kind": "bnb"},
    "hqq4": {"kind": "hqq", "nbits": 4, "group_size": 64},
    "none": {"kind": "none"},
}
ON_TWO: dict[str, dict[str, Any]] = {
    "full_shard": {},
    "shard_grad_op": {"strategy": "shard_grad_op"},
    "ddp": {"strategy": "ddp"},
    "offload_cpu": {"offload": "cpu"},
    "offload_disk": {"offload": "disk"},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "hybrid_full_shard": {"strategy": "hybrid_full_shard"},
    "hybrid_shard_grad_op": {"strategy": "hybrid_shard_grad_op"},
}
CELLS = [
    (method, base)
    for method in METHODS
    for base in BASES
    if method != "none" or base == "none"  # codes have no gradient: refused, see below
]
WITH_FOUR_RANKS = [("lora", "nf4"), ("dora", "hqq4"), ("llama_pro", "nf4"), ("none", "none")]
"""Four processes cost most: every method and every base is among these."""


def strategies(method: str, base: str) -> list[str]:
    """Returns the strategies of a cell; only what is packed is mapped from a disk."""
    two = [name for name in ON_TWO if base != "none" or name != "offload_disk"]
    return two + [*ON_FOUR] * ((method, base) in WITH_FOUR_RANKS)


def batches() -> list[list[Row]]:
    """Returns the rows of every step."""
    rows = random_rows(NUM_STEPS * BATCH, longest=16)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def train_each(
    directory: Path, base: Path | None, sections: Sections, settings: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Trains under every setting of ``fsdp``; returns losses, gradient norms and the first A."""
    answers: dict[str, dict[str, Any]] = {}
    for name, fsdp in settings.items():
        mapped = base if fsdp.get("offload") == "disk" else None
        assembled = bases.assemble_from(mapped, directory, sections | {"fsdp": fsdp})
        initial = whole_a(assembled)
        # One micro-batch: of three rows on two ranks, of one or two on four.
        losses, norms = train(assembled, batches(), micro_batch_size=3, lr=LR, max_norm=MAX_NORM)
        answers[name] = {"initial": initial, "losses": losses, "norms": norms}
    return answers


class Matrix:
    """Trains a cell when it is first asked for.

    Attributes:
        directory: the model of all cells.
    """

    def __init__(self, ranks: RankPool, root: Path) -> None:
        self.ranks, self.root = ranks, root
        self.directory = save_tiny_llama(root / "model", num_hidden_layers=2)
        self.sharded = cache(self._sharded)
        self.unsharded = cache(self._unsharded)
        self.base = cache(self._base)

    def _base(self, base: str) -> Path:
        out = self.root / base
        self.ranks.run(2, bases.write, self.directory, out, {"quantization": BASES[base]})
        return out

    def _sharded(self, method: str, base: str) -> dict[str, list[dict[str, Any]]]:
        """Returns what every rank saw, by strategy."""
        sections = {"adapter": METHODS[method], "quantization": BASES[base]}
        packed = self.base(base) if base != "none" else None
        answers: dict[str, list[dict[str, Any]]] = {}
        for num_ranks, all_settings in ((2, ON_TWO), (4, ON_FOUR)):
            names = [name for name in all_settings if name in strategies(method, base)]
            settings = {name: all_settings[name] for name in names}
            arguments = (self.directory, packed, sections, settings)
            by_rank = self.ranks.run(num_ranks, train_each, *arguments) if names else []
            answers |= {name: [answer[name] for answer in by_rank] for name in names}
        return answers

    def _unsharded(self, method: str, base: str) -> dict[str, Any]:
        initial = self.sharded(method, base)["full_shard"][0]["initial"]
        model = library_models.build(self.directory, METHODS[method], BASES[base], initial)
        losses, norms = reference.train(model, batches(), lr=LR, max_norm=MAX_NORM)
        return {"losses": losses, "norms": norms}


@pytest.fixture(scope="module")
def matrix(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(ranks, tmp_path_factory.mktemp("matrix"))


def _difference(answer: dict[str, Any], expected: dict[str, Any]) -> float:
    """Returns the largest relative difference of a loss or gradient norm of any step."""
    return max(
        abs(ours - theirs) / abs(theirs)
        for name in ("losses", "norms")
        for ours, theirs in zip(answer[name], expected[name], strict=True)
    )


@pytest.mark.parametrize(
    ("method", "base", "strategy"),
    [(*cell, strategy) for cell in CELLS for strategy in strategies(*cell)],
)
def test_training_equals_the_unsharded_libraries(
    matrix: Matrix, method: str, base: str, strategy: str
) -> None:
    expected, first = matrix.unsharded(method, base), matrix.sharded(method, base)["full_shard"][0]
    assert len(set(expected["losses"])) == NUM_STEPS
    for answer in matrix.sharded(method, base)[strategy]:
        for name, a in first["initial"].items():
            assert torch.equal(answer["initial"][name], a), "all start from the same adapter"
        # fp32 sums in another order, amplified by five steps of Adam, most where all weights are
        # trained: gradients that are nearly zero take steps as large as any. Seen are 8e-6 and 4e-6
        # from the libraries, and 2e-6 from each other.
        assert _difference(answer, expected) < (1e-4 if method == "none" else 2e-5)
        assert _difference(answer, first) < 1e-5


@pytest.mark.parametrize("base", ["nf4", "hqq4"])
def test_full_finetuning_of_codes_is_refused(base: str) -> None:
    recipe = tiny_recipe(adapter=METHODS["none"], quantization=BASES[base])
    problems = [problem for check in CHECKS for problem in check(recipe, Path())]
    [message] = [problem.message for problem in problems if problem.key == "adapter.kind"]
    assert "quantized weights cannot be trained" in message


def differing_adapters() -> str:
    """Returns what the ranks say when each has a text of its own."""
    try:
        check_same_on_all_ranks("the adapters", f"rank {dist.get_rank()}")
    except TrainingError as error:
        return error.message
    return ""


def test_ranks_that_differ_are_noticed_by_all_of_them(ranks: RankPool) -> None:
    answers = ranks.run(3, differing_adapters)
    assert answers == ["the adapters differ between rank 0 and ranks [1, 2]"] * 3
