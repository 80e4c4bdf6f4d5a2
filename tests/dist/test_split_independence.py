"""Gradients are those of the whole batch in one process, whoever computes which of its rows.

The gradients of all rows in one micro-batch on one rank are compared with what autograd gives for
them in a model made of other people's code. Those of every strategy, number of ranks and size of
micro-batches, reduced after each micro-batch or once, are compared with these, tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import bases, library_models, reference
from support.ranks import RankPool
from support.sharded import CPU, named_trained, whole_a
from support.tiny import random_rows, save_tiny_llama
from torch import Tensor
from torch.nn.utils import get_total_norm

from fsdpq.data.dealing.collate import build_step
from fsdpq.dist import assign_own_rows, gather_whole
from fsdpq.training.step import StepMode, train_step
from fsdpq.worker.assemble import Assembled

Sections = dict[str, dict[str, Any]]

ROWS = random_rows(7, seed=3, longest=16)
"""Of uneven lengths and trained shares; no number of ranks but one divides them."""
MICRO_BATCH_SIZES = {1: (2,), 2: (4, 1), 3: (2,), 4: (2, 1)}
"""By ranks. Three ranks of two rows leave one for the second micro-batch: two ranks have none."""
# The hybrid ones need four ranks: two groups of two.
STRATEGIES = ["full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"]

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
METHODS: dict[str, Sections] = {
    "lora": {"adapter": LORA, "quantization": {"kind": "bnb"}},
    "dora": {"adapter": LORA | {"kind": "dora"}, "quantization": {"kind": "hqq"}},
    "llama_pro": {
        "adapter": {"kind": "llama_pro", "num_new_layers": 1},
        "quantization": {"kind": "none"},
    },
    "none": {"adapter": {"kind": "none"}, "quantization": {"kind": "none"}},
}


def nonzero(name: str, start: Tensor) -> Tensor:
    """Returns a value away from the start, where some gradients would be zero."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return start + torch.randn(start.shape, generator=generator) * 0.02


def move(assembled: Assembled) -> dict[str, Tensor]:
    """Moves all that is trained to `nonzero`, in place; returns the first values of every A."""
    initial = whole_a(assembled)
    for name, parameter in named_trained(assembled).items():
        assign_own_rows(parameter, nonzero(name, gather_whole(parameter)))
    return initial


def whole_gradients(
    assembled: Assembled, micro_batch_size: int, no_sync: bool
) -> dict[str, Tensor]:
    """Returns the gradients that an optimizer step over `ROWS` would see, whole, and the loss."""
    step = build_step(
        ROWS,
        micro_batch_size=micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    found: dict[str, Tensor] = {}

    def record(*_: Any) -> None:
        for name, parameter in named_trained(assembled).items():
            assert parameter.grad is not None, name
            found[name] = gather_whole(parameter.grad).clone()

    optimizer = torch.optim.SGD(assembled.trainable, lr=0.0)
    optimizer.register_step_pre_hook(record)
    result = train_step(
        assembled.model, step, optimizer=optimizer, parameters=assembled.trainable,
        max_grad_norm=None, device=CPU, mode=StepMode(no_sync=no_sync),
    )  # fmt: skip
    loss = result.loss.clone()
    dist.all_reduce(loss)
    return found | {"loss": loss, "norm": result.grad_norm}


def whole_batch(directory: Path, sections: Sections) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the first values of every A, and the gradients of all rows at once."""
    assembled = bases.assemble_from(None, directory, sections)
    initial = move(assembled)
    return initial, whole_gradients(assembled, len(ROWS), no_sync=False)


@dataclass(frozen=True)
class Errors:
    """Norms of differences over norms of what is expected.

    Attributes:
        whole: of all gradients as one vector.
        worst: of the tensor where it is largest.
        name: of that tensor.
    """

    whole: float
    worst: float
    name: str


def errors_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    """Compares all gradients; the loss and their norm count as tensors."""
    assert found.keys() == expected.keys()
    differences = [found[name] - value for name, value in expected.items()]
    whole = get_total_norm(differences) / get_total_norm(expected.values())
    by_name = zip(differences, expected.items(), strict=True)
    worst, name = max((float(d.norm() / value.norm()), name) for d, (name, value) in by_name)
    return Errors(whole.item(), worst, name)


def split_errors(
    directory: Path,
    base: Path | None,
    expected_file: Path,
    sections: Sections,
    settings: dict[str, Sections],
) -> dict[str, Errors]:
    """Returns the errors of every setting and split."""
    expected: dict[str, Tensor] = torch.load(expected_file)
    errors: dict[str, Errors] = {}
    sizes = MICRO_BATCH_SIZES[dist.get_world_size()]
    for setting, changes in settings.items():
        mapped = base if changes.get("fsdp", {}).get("offload") == "disk" else None
        assembled = bases.assemble_from(mapped, directory, sections | changes)
        move(assembled)
        for size, no_sync in [*((size, False) for size in sizes), (sizes[-1], True)]:
            found = whole_gradients(assembled, size, no_sync)
            errors[f"{setting}, {size} rows, no_sync {no_sync}"] = errors_of(found, expected)
    return errors


def library_gradients(
    directory: Path, sections: Sections, initial: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the gradients of `ROWS` in one process, their norm and the loss."""
    adapter, quantization = sections["adapter"], sections["quantization"]
    model = library_models.build(directory, adapter, quantization, initial)
    named = library_models.named_trained(model)
    for name, parameter in named.items():
        parameter.data.copy_(nonzero(name, parameter.data))
    loss = reference.batch_loss(model, ROWS)
    loss.backward()
    found = {
        name: parameter.grad for name, parameter in named.items() if parameter.grad is not None
    }
    return found | {"loss": loss.detach(), "norm": get_total_norm(found.values())}


def assert_small(errors: Errors, setting: str) -> None:
    """Checks errors of fp32, whose sums have another order.

    The largest belong to queries and keys, where positive and negative terms cancel: 1.3e-6 seen.
    """
    assert errors.whole < 1e-6, setting
    assert errors.worst < 3e-6, (setting, errors.name)


class Splits:
    """Compares splits of the rows with all of them in one micro-batch on one rank.

    Attributes:
        directories: a model with tied embeddings under True, one without under False.
    """

    def __init__(self, ranks: RankPool, root: Path) -> None:
        self.ranks, self.root = ranks, root
        self.directories = {
            tied: save_tiny_llama(root / f"tied-{tied}", tied=tied, num_hidden_layers=2)
            for tied in (True, False)
        }
        self.base = cache(self._base)
        self._expected: dict[str, Path] = {}

    def _base(self) -> Path:
        self.ranks.run(2, bases.write, self.directories[False], self.root / "base", {})
        return self.root / "base"

    def expected(self, sections: Sections, directory: Path) -> Path:
        """Returns a file of the gradients of the whole batch, equal to the libraries'."""
        key = f"{sections} {directory}"
        if key not in self._expected:
            initial, found = self.ranks.run(1, whole_batch, directory, sections)[0]
            errors = errors_of(found, library_gradients(directory, sections, initial))
            assert_small(errors, "the whole batch")
            self._expected[key] = self.root / f"{len(self._expected)}.pt"
            torch.save(found, self._expected[key])
        return self._expected[key]

    def check(
        self,
        sections: Sections,
        num_ranks: int,
        settings: dict[str, Sections],
        *,
        tied: bool = False,
        base: Path | None = None,
    ) -> None:
        """Checks that no setting and no split of it changes a gradient on any rank."""
        directory = self.directories[tied]
        arguments = (directory, base, self.expected(sections, directory), sections, settings)
        for errors in self.ranks.run(num_ranks, split_errors, *arguments):
            assert len(errors) == len(settings) * (len(MICRO_BATCH_SIZES[num_ranks]) + 1)
            for setting, error in errors.items():
                assert_small(error, setting)


@pytest.fixture(scope="module")
def splits(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return Splits(ranks, tmp_path_factory.mktemp("splits"))


@pytest.mark.parametrize(
    ("method", "num_ranks", "strategies"),
    [
        ("lora", 1, STRATEGIES[:1]),
        ("lora", 2, STRATEGIES[:3]),
        ("lora", 3, STRATEGIES[:3]),
        ("lora", 4, STRATEGIES),
        ("dora", 2, ["full_shard", "ddp"]),
        ("dora", 3, ["shard_grad_op"]),
        ("dora", 4, ["hybrid_full_shard"]),
        ("llama_pro", 2, ["shard_grad_op", "ddp"]),
        ("llama_pro", 3, ["full_shard"]),
        ("llama_pro", 4, ["hybrid_shard_grad_op"]),
        ("none", 1, STRATEGIES[:1]),
        ("none", 2, STRATEGIES[:3]),
        ("none", 3, STRATEGIES[:3]),
        ("none", 4, STRATEGIES),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_no_strategy_on_any_ranks_changes_a_gradient(
    splits: Splits, method: str, num_ranks: int, strategies: list[str]
) -> None:
    settings: dict[str, Sections] = {name: {"fsdp": {"strategy": name}} for name in strategies}
    # Tied embeddings where they are trained: two uses add up in one gradient.
    tied = method == "none" and num_ranks != 3
    splits.check(METHODS[method], num_ranks, settings, tied=tied)


SETTINGS: list[Sections] = [
    {"fsdp": {"offload": "cpu"}},
    {"fsdp": {"offload": "disk"}},
    {"fsdp": {"offload": "cpu", "strategy": "ddp", "activation_offload": True}},
    {"fsdp": {"activation_checkpointing": "none"}},
    {"fsdp": {"activation_checkpointing": "selective", "activation_offload": True}},
    {"fsdp": {"precision": "fp32"}},
    {"training": {"layer_chunks": 2}},
    {"training": {"layer_chunks": 2}, "fsdp": {"activation_checkpointing": "none"}},
    {"training": {"layer_chunks": 2}, "fsdp": {"activation_offload": True, "offload": "cpu"}},
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_no_memory_option_changes_a_gradient(splits: Splits, num_ranks: int) -> None:
    some = {1: SETTINGS[:2], 2: SETTINGS, 3: SETTINGS[1:2]}[num_ranks]
    settings = {str(sections): sections for sections in some}
    splits.check(METHODS["lora"], num_ranks, settings, base=splits.base())


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": {"kind": "none"}},
        {"quantization": {"kind": "bnb", "modules_to_not_convert": ["o_proj"]}},
        {
            "adapter": LORA
            | {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "mlp.down_proj"]}
            | {"use_rslora": True}
        },
    ],
)
def test_no_choice_of_layers_changes_a_gradient(splits: Splits, sections: Sections) -> None:
    splits.check(METHODS["lora"] | sections, 3, {"full_shard": {}})
