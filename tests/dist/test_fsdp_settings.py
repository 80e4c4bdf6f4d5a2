"""Every way to shard, store, offload and recompute gives the numbers of the plain way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdpq.data.loader import build_step
from fsdpq.data.tokenize import Row
from fsdpq.dist import placement
from fsdpq.fsdp.layers import RunsInChunks
from fsdpq.fsdp.precision import needs_loss_scaling
from fsdpq.model.quantized_linear import QuantizedLinear
from fsdpq.training.scaler import LossScaler
from fsdpq.training.step import reduce_after_backward
from support import reference
from support.imports import load_script
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import random_rows, save_tiny_llama

Sections = dict[str, dict[str, Any]]

NUM_STEPS = 3
BATCH = 8
LR = 1e-3
KEEP = {"activation_checkpointing": "none"}


def batches() -> list[list[Row]]:
    """Returns the rows of every step; fewer than the ranks can share evenly."""
    rows = random_rows(NUM_STEPS * BATCH, shortest=4, longest=12)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def whole(parameter: Tensor) -> Tensor:
    """Returns all rows of a parameter."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def run(directory: Path, sections: Sections) -> dict[str, Any]:
    """Trains on this rank; returns losses, norms, and how things are held."""
    assembled = assemble(directory, **sections)
    fsdp = sections.get("fsdp", {})
    scaled = needs_loss_scaling(
        fsdp.get("precision", "auto"), sections.get("model", {}).get("dtype", "fp32")
    )
    layer = next(m for m in assembled.model.modules() if isinstance(m, QuantizedLinear))
    codes = {name: whole(getattr(layer, name)) for name in layer.packed_names}
    initial = {
        name: whole(layer.lora_A).float().clone()  # pyright: ignore[reportArgumentType]
        for name, layer in assembled.adapted_layers.items()
    }
    losses, norms = train(
        assembled,
        batches(),
        micro_batch_size=sections.get("training", {}).get("micro_batch_size", 2),
        lr=LR,
        max_norm=1.0,
        scaler=LossScaler() if scaled else None,
        no_sync=fsdp.get("no_sync", False),
    )
    place = placement(getattr(layer, layer.packed_names[0]))
    buffers = dict(assembled.model.named_buffers())
    return {
        "losses": losses,
        "norms": norms,
        "codes": codes,
        "initial": initial,
        "place": (place.index, place.size),
        "dtypes": {p.dtype for p in assembled.trainable},
        "rope": {b.dtype for name, b in buffers.items() if name.endswith("inv_freq")},
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one_rank(ranks: RankPool, tiny: Path) -> dict[str, Any]:
    """What the plain recipe gives on one rank."""
    return ranks.run(1, run, tiny, {})[0]


def same_numbers(answer: dict[str, Any], expected: dict[str, Any], rel: float = 1e-5) -> None:
    """Compares losses and norms: fp32 sums in another order, amplified by Adam's steps."""
    assert answer["losses"] == pytest.approx(expected["losses"], rel=rel)
    assert answer["norms"] == pytest.approx(expected["norms"], rel=rel)


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "places"),
    [
        ("shard_grad_op", 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("ddp", 1, [(0, 1)]),
        ("ddp", 4, [(0, 1)] * 4),
        ("hybrid_full_shard", 2, [(0, 1), (0, 1)]),
        ("hybrid_full_shard", 4, [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ("hybrid_shard_grad_op", 4, [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_strategies_equal_one_rank_and_keep_the_bits(
    ranks: RankPool,
    tiny: Path,
    one_rank: dict[str, Any],
    strategy: str,
    num_ranks: int,
    places: list[tuple[int, int]],
) -> None:
    answers = ranks.run(num_ranks, run, tiny, {"fsdp": {"strategy": strategy}})
    assert [answer["place"] for answer in answers] == places
    weight = load_file(tiny / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for answer in answers:
        same_numbers(answer, one_rank)
        assert torch.equal(answer["codes"]["codes"].flatten(), codes.flatten())
        assert torch.equal(answer["codes"]["absmax"].flatten(), state.absmax)


@pytest.mark.parametrize(
    ("num_ranks", "sections"),
    [
        (2, {"fsdp": {"strategy": "hybrid_full_shard", "shard_size": 2}}),
        (2, {"fsdp": {"no_sync": True}}),
        (
            4,
            {
                "fsdp": {"no_sync": True, "strategy": "hybrid_full_shard"},
                "training": {"micro_batch_size": 1},
            },
        ),
        (1, {"fsdp": {"offload": "cpu"}}),
        (2, {"fsdp": {"offload": "cpu"}}),
        (2, {"fsdp": {"offload": "cpu", "strategy": "ddp", "activation_offload": True}}),
        (2, {"fsdp": {"activation_checkpointing": "none"}}),
        (2, {"fsdp": {"activation_checkpointing": "selective"}}),
        (2, {"fsdp": {"activation_checkpointing": "selective", "activation_offload": True}}),
        (2, {"fsdp": {"precision": "fp32"}}),
        (2, {"training": {"layer_chunks": 2}}),
        (2, {"training": {"layer_chunks": 2}, "fsdp": {"activation_checkpointing": "none"}}),
        (
            2,
            {
                "training": {"layer_chunks": 2},
                "fsdp": {"activation_offload": True, "offload": "cpu", "no_sync": True},
            },
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_settings_do_not_change_the_numbers(
    ranks: RankPool, tiny: Path, one_rank: dict[str, Any], num_ranks: int, sections: Sections
) -> None:
    for answer in ranks.run(num_ranks, run, tiny, sections):
        same_numbers(answer, one_rank)


def load_rounded(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Returns the dequantized model in ``dtype``, quantized from that dtype as fsdpq does."""
    return reference.load_dequantized(directory, dtype=dtype).train()


@pytest.mark.parametrize(
    ("precision", "dtype", "trained", "rel"),
    [
        # bf16 keeps 8 bits, and roundings average out over tokens: seen are 9e-5 in the losses and
        # 3e-3 in the norms. fp16 keeps 11 bits: 9e-6 and 1e-4. The autocasts are compared with
        # fp32, which they approximate.
        ("bf16", torch.bfloat16, torch.bfloat16, 5e-4),
        ("bf16_buffers_autocast", torch.bfloat16, torch.bfloat16, 5e-4),
        ("bf16_autocast", torch.float32, torch.float32, 5e-4),
        ("fp16_autocast", torch.float32, torch.float32, 5e-5),
    ],
)
def test_presets_train_close_to_peft_in_the_same_dtype(
    ranks: RankPool,
    tiny: Path,
    one_rank: dict[str, Any],
    precision: str,
    dtype: torch.dtype,
    trained: torch.dtype,
    rel: float,
) -> None:
    name = "bf16" if dtype is torch.bfloat16 else "fp32"
    sections: Sections = {"fsdp": {"precision": precision}, "model": {"dtype": name}}
    answers = ranks.run(2, run, tiny, sections)
    peft_model = reference.with_peft_lora(load_rounded(tiny, dtype), answers[0]["initial"], rank=4)
    losses, norms = reference.train(peft_model, batches(), lr=LR, max_norm=1.0)
    for answer in answers:
        assert answer["dtypes"] == {trained}
        assert answer["rope"] == {torch.float32}
        assert answer["losses"] == pytest.approx(losses, rel=rel)
        assert answer["losses"] != pytest.approx(one_rank["losses"], rel=1e-7), "not in fp32"
        # Gradients pass through more roundings, and average over fewer numbers.
        assert answer["norms"] == pytest.approx(norms, rel=20 * rel)


def overfit(directory: Path, sections: Sections) -> list[float]:
    """Returns the losses of training on one batch over and over."""
    assembled = assemble(directory, **sections)
    precision = sections["fsdp"]["precision"]
    scaler = LossScaler() if needs_loss_scaling(precision, sections["model"]["dtype"]) else None
    rows = [batches()[0]] * 12
    return train(
        assembled, rows, micro_batch_size=4, lr=2e-2, max_norm=1.0, scaler=scaler, no_sync=False
    )[0]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", "bf16"),
        ("auto", "fp16"),
        ("bf16", "bf16"),
        ("fp16_autocast", "fp32"),
        ("bf16_autocast", "fp32"),
        ("bf16_buffers_autocast", "bf16"),
    ],
)
def test_losses_fall_under_every_preset(
    ranks: RankPool, tiny: Path, precision: str, dtype: str
) -> None:
    sections: Sections = {"fsdp": {"precision": precision}, "model": {"dtype": dtype}}
    losses = ranks.run(2, overfit, tiny, sections)[0]
    assert all(loss == loss and loss < 100 for loss in losses)
    assert losses[-1] < 0.9 * losses[0]


def overflow_on_one_rank(directory: Path) -> tuple[list[bool], list[float], list[Tensor]]:
    """Makes one rank's gradients overflow in the first step; returns what every rank did."""
    assembled = assemble(directory, fsdp={"precision": "fp16_autocast"}, model={"dtype": "fp32"})
    before = [whole(p).clone() for p in assembled.trainable]
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
        now = [whole(p) for p in assembled.trainable]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
        scales.append(scaler.scale)
        if hook is not None:
            hook.remove()
            hook = None
    return moved, scales, [whole(p) for p in assembled.trainable]


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


def gathers_and_saves(
    directory: Path, settings: list[tuple[int, int]]
) -> list[tuple[list[tuple[int, int]], int]]:
    """Counts, for every ``micro_batch_size`` and ``layer_chunks``, what a step of four rows gathers
    and the tensors that it saves on the host."""
    counts: list[tuple[list[tuple[int, int]], int]] = []
    for micro_batch_size, layer_chunks in settings:
        assembled = assemble(
            directory,
            training={"layer_chunks": layer_chunks, "micro_batch_size": micro_batch_size},
            fsdp={"activation_offload": True},
        )
        with load_script("bench_chunks").CountedGathers() as counted:
            train(
                assembled,
                [random_rows(4 * dist.get_world_size())],
                micro_batch_size=micro_batch_size,
                lr=LR,
                max_norm=None,
                scaler=None,
                no_sync=False,
            )
        first = assembled.model.decoder_layers[0]
        assert isinstance(first, RunsInChunks)
        assert first.layer_run.host is not None
        counts.append((counted.sizes, first.layer_run.host.num_saved))
    return counts


def test_layer_chunks_gather_once_and_save_only_checkpointed_inputs(
    ranks: RankPool, tiny: Path
) -> None:
    settings = [(4, 1), (4, 4), (1, 1)]
    whole, chunked, accumulated = ranks.run(2, gathers_and_saves, tiny, settings)[0]
    # Three layers in forward and in backward, embedding and head (tied), the last norm.
    assert len(whole[0]) == 2 * 3 + 2
    assert chunked[0] == whole[0], "chunks gather once, the same bytes"
    assert accumulated[0] == 4 * whole[0], "micro-batches gather each for itself"
    assert [saved for _, saved in (whole, chunked, accumulated)] == [3, 12, 12]
