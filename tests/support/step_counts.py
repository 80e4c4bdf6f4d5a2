"""What a real step multiplies, gathers and reduces, counted in the dispatcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.registry import resolve_builder
from fsdpq.training.step import StepMode
from support.imports import load_script
from support.sharded import assemble, do_step
from support.tiny import VOCAB_SIZE, tiny_recipe

IN_PLACE = {
    torch.ops.aten.addmm_: lambda _addend, a, b, *_args, **_kwargs: 2 * a[0] * a[1] * b[1],
}
"""Products that torch 2.13 does not know to be such, by shapes."""


@dataclass(frozen=True)
class Call:
    """One collective.

    Attributes:
        ranks: of its group, in the order of its ring.
        num_bytes: of the unsharded tensor.
        is_sum: over copies: a reduction to shards and a gather, as two rings.
    """

    ranks: tuple[int, ...]
    num_bytes: int
    is_sum: bool = False

    def bytes_into(self, machine: int, num_local_ranks: int) -> float:
        """Returns what a ring brings into a machine, where ranks fill one after another."""
        of = [rank // num_local_ranks for rank in self.ranks]
        links = sum(to == machine != come for come, to in zip(of, of[1:] + of[:1], strict=True))
        passes = 2 if self.is_sum else 1
        return links * passes * self.num_bytes * (len(of) - 1) / len(of)


@dataclass(frozen=True)
class StepCounts:
    """What one rank did in one step.

    Attributes:
        flops: of products.
        gathered: bytes that came out of gathers.
        own: bytes that went into gathers: this rank's shards.
        reduced: bytes that went into reductions to shards.
        summed: bytes of gradients that were summed over replicas.
        calls: every gather, reduction and sum, in order.
    """

    flops: int
    gathered: int
    own: int
    reduced: int
    summed: int
    calls: tuple[Call, ...]


class CountedCalls(TorchDispatchMode):
    """Notes what FSDP gathers and reduces while it is active, and among which ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced = self.summed = 0
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self._note(args[2], args[0].nbytes)
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
            self._note(args[2], args[1].nbytes)
        elif func is torch.ops.c10d.allreduce_.default:
            # One number is the gradient norm.
            num_bytes = sum(each.nbytes for each in args[0] if each.numel() > 1)
            self.summed += num_bytes
            if num_bytes:
                self._note(args[1], num_bytes, is_sum=True)
        return func(*args, **(kwargs or {}))

    def _note(self, group: Any, num_bytes: int, *, is_sum: bool = False) -> None:
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        self.calls.append(Call(tuple(ranks), num_bytes, is_sum))


def count_step(directory: Path, sections: Mapping[str, Mapping[str, Any]]) -> StepCounts:
    """Returns what this rank does in a step of a tiny model on rows of full length.

    Ranks: all (collective).
    """
    named = {name: dict(section) for name, section in sections.items()}
    recipe = tiny_recipe(**named)
    assembled = assemble(directory, **named)
    num_rows = recipe.training.global_batch_size or 0
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (num_rows, recipe.data.seq_len), generator=generator)
    step = build_step(
        [Row(row, [True] * len(row)) for row in ids.tolist()],
        micro_batch_size=recipe.training.micro_batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    optimizer = resolve_builder("optimizer", recipe.optimizer)(
        recipe.optimizer, assembled.named_trainable
    )
    products = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    gathers = load_script("bench_chunks").CountedGathers()
    with CountedCalls() as calls, gathers, products:
        do_step(assembled, optimizer, step, StepMode(no_sync=recipe.fsdp.no_sync))
    return StepCounts(
        flops=products.get_total_flops(),
        gathered=sum(whole for whole, _ in gathers.sizes),
        own=sum(own for _, own in gathers.sizes),
        reduced=calls.reduced,
        summed=calls.summed,
        calls=tuple(calls.calls),
    )


def count_steps(
    directories: Mapping[str, Path], cases: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, StepCounts]:
    """Returns the counts of every case: a model's name and sections of the tiny recipe."""
    return {
        name: count_step(directories[model], sections) for name, (model, sections) in cases.items()
    }
