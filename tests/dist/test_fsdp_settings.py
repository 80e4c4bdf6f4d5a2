"""Places of shards, loss scaling and chunked layers.

That no strategy or memory option changes a gradient is in test_split_independence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest import mock

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.late_transfer import LateTransfer, late_activations
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama
from torch import Tensor

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole, placement
from fsdpq.fsdp.layers import RunsInChunks
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.training.scaler import LossScaler
from fsdpq.training.step import reduce_after_backward

Sections = dict[str, dict[str, Any]]

NUM_STEPS = 3
BATCH = 8
LR = 1e-3
KEEP = {"activation_checkpointing": "none"}


def batches() -> list[list[Row]]:
    """Returns the rows of every step; fewer than the ranks can share evenly."""
    rows = random_rows(NUM_STEPS * BATCH, shortest=4, longest=12)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def held(directory: Path, strategies: list[str]) -> dict[str, dict[str, Any]]:
    """Returns how the codes of a layer are held under each strategy, and all of them."""
    found: dict[str, dict[str, Any]] = {}
    for strategy in strategies:
        model = assemble(directory, fsdp={"strategy": strategy}).model
        layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
        place = placement(layer.get_parameter("codes"))
        codes = {name: gather_whole(layer.get_parameter(name)) for name in layer.packed_names}
        found[strategy] = codes | {"place": (place.index, place.size)}
    return found


PLACES = {
    1: {"ddp": [(0, 1)]},
    2: {"hybrid_full_shard": [(0, 1), (0, 1)], "full_shard": [(0, 2), (1, 2)]},
    4: {
        "shard_grad_op": [(0, 4), (1, 4), (2, 4), (3, 4)],
        "ddp": [(0, 1)] * 4,
        "hybrid_full_shard": [(0, 2), (1, 2), (0, 2), (1, 2)],
        "hybrid_shard_grad_op": [(0, 2), (1, 2), (0, 2), (1, 2)],
    },
}
"""Ranks -> strategies -> which part of how many each rank holds."""


@pytest.mark.parametrize("num_ranks", PLACES)
def test_strategies_place_the_bits_of_the_library(
    ranks: RankPool, tiny: Path, num_ranks: int
) -> None:
    answers = ranks.run(num_ranks, held, tiny, list(PLACES[num_ranks]))
    weight = load_file(tiny / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for strategy, places in PLACES[num_ranks].items():
        assert [answer[strategy]["place"] for answer in answers] == places
        for answer in answers:
            assert torch.equal(answer[strategy]["codes"].flatten(), codes.flatten())
            assert torch.equal(answer[strategy]["absmax"].flatten(), state.absmax)


def overflow_on_one_rank(directory: Path) -> tuple[list[bool], list[float], list[Tensor]]:
    """Makes one rank's gradients overflow in the first step; returns what every rank did."""
    assembled = assemble(directory, fsdp={"precision": "fp16_autocast"}, model={"dtype": "fp32"})
    before = [gather_whole(p).clone() for p in assembled.trainable]
    scaler = LossScaler()
    hook = None
    if dist.get_rank() == 1:
        layer = assembled.model.decoder_layers[0]
        hook = layer.register_full_backward_pre_hook(
            lambda _module, grads: tuple(g * float("inf") for g in grads)
        )
    moved: list[bool] = []
    scales: list[float] = []
    for index in range(2):
        train(
            assembled,
            batches()[index : index + 1],
            micro_batch_size=4,
            lr=LR,
            max_norm=1.0,
            scaler=scaler,
            no_sync=False,
        )
        now = [gather_whole(p) for p in assembled.trainable]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
        scales.append(scaler.scale)
        if hook is not None:
            hook.remove()
            hook = None
    return moved, scales, [gather_whole(p) for p in assembled.trainable]


def test_all_ranks_skip_a_step_that_overflows_on_one(ranks: RankPool, tiny: Path) -> None:
    first, second = ranks.run(2, overflow_on_one_rank, tiny)
    for moved, scales, _ in (first, second):
        assert moved == [False, True]
        assert scales == [2.0**15, 2.0**15]
    for mine, theirs in zip(first[2], second[2], strict=True):
        assert torch.equal(mine, theirs)


def sharded_gradients(directory: Path) -> tuple[int, int]:
    """Returns how many parameters have a reduced gradient after the first and second backward."""
    assembled = assemble(directory)
    step = build_step(random_rows(4), micro_batch_size=1, rank=dist.get_rank(), world_size=2)
    counts: list[int] = []
    for index, batch in enumerate(step.micro_batches):
        reduce_after_backward(assembled.model, index == 1)
        loss = assembled.model(batch.input_ids, batch.loss_positions, batch.targets)
        loss.backward()
        counts.append(sum(p.grad is not None for p in assembled.trainable))
    return counts[0], counts[1]


def test_no_sync_reduces_after_the_last_backward_only(ranks: RankPool, tiny: Path) -> None:
    assert ranks.run(2, sharded_gradients, tiny) == [(0, 42), (0, 42)]


def train_with_dropout(
    directory: Path, fsdp: dict[str, Any], layer_chunks: int, seed: int
) -> tuple[list[float], list[float]]:
    """Trains with dropout in adapters and attention; returns losses and norms."""
    assembled = assemble(
        directory,
        adapter={"dropout": 0.2},
        fsdp=fsdp,
        training={"layer_chunks": layer_chunks},
    )
    torch.manual_seed(seed)
    return train(
        assembled,
        batches(),
        micro_batch_size=4,
        lr=LR,
        max_norm=1.0,
        scaler=None,
        no_sync=False,
    )


def test_layers_draw_the_same_dropout_again_in_backward(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path, attention_dropout=0.1)
    for chunks in (1, 2):
        kept = ranks.run(1, train_with_dropout, directory, KEEP, chunks, 3)[0]
        again = ranks.run(1, train_with_dropout, directory, {"activation_offload": True}, chunks, 3)
        # The same operations on the same numbers, or gradients would be of another function.
        assert again[0] == kept
    other = ranks.run(1, train_with_dropout, directory, KEEP, 2, 4)[0]
    assert other[0] != pytest.approx(kept[0], rel=1e-4), "something is dropped"


def gathers_and_moves(directory: Path, sections: Sections) -> dict[str, Any]:
    """Trains two steps with copies to the host that come late; counts gathers and copies."""
    with mock.patch("fsdpq.fsdp.wrap.build_host_activations", late_activations):
        assembled = assemble(directory, **sections)
    layers = assembled.model.decoder_layers
    calls: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _module, _args: calls.append(1))
    rows = random_rows(8 * dist.get_world_size())
    losses, norms = train(
        assembled,
        [rows[: len(rows) // 2], rows[len(rows) // 2 :]],
        micro_batch_size=4,
        lr=LR,
        max_norm=None,
        no_sync=sections["fsdp"].get("no_sync", False),
    )
    first = layers[0]
    assert isinstance(first, RunsInChunks)
    answer = {"calls": len(calls), "numbers": [*losses, *norms], "log": [], "most": {}}
    if first.layer_run.host is not None:
        transfer = cast("LateTransfer", first.layer_run.host._transfer)
        transfer.check_nothing_was_freed_early()
        answer |= {"log": transfer.log, "most": transfer.most}
    return answer


@pytest.mark.parametrize(
    ("fsdp", "chunks", "moved"),
    [
        ({"activation_checkpointing": "full"}, 1, 2),
        ({"activation_checkpointing": "full", "offload": "cpu", "no_sync": True}, 4, 8),
        ({"activation_checkpointing": "selective", "strategy": "ddp", "offload": "cpu"}, 2, 2),
    ],
)
def test_inputs_of_recomputed_layers_move_and_the_numbers_stay(
    ranks: RankPool, tiny: Path, fsdp: dict[str, Any], chunks: int, moved: int
) -> None:
    training = {"layer_chunks": chunks, "micro_batch_size": 4}
    sections: Sections = {"training": training, "fsdp": fsdp}
    plain = ranks.run(2, gathers_and_moves, tiny, sections)
    offloaded = {"training": training, "fsdp": fsdp | {"activation_offload": True}}
    for answer, expected in zip(
        ranks.run(2, gathers_and_moves, tiny, offloaded), plain, strict=True
    ):
        # FSDP gathers in hooks of the layer's call: one call a layer and step, whatever the chunks.
        assert answer["calls"] == 2 * 3
        # The last of those layers keeps its input; hidden states move, masks and positions do not.
        assert answer["log"].count("out") == answer["log"].count("in") == 2 * moved
        assert answer["most"] == {"out": 1, "in": 1}
        assert answer["numbers"] == expected["numbers"]
