"""The load-balancing loss of mixtures, trained with, against transformers' own models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import reference
from support.families import FAMILIES
from support.ranks import RankPool
from support.sharded import CPU, assemble
from support.tiny import random_rows, save_tiny_llama
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fsdpq.data.dealing.collate import MicroBatch, build_step, collate
from fsdpq.data.pack import pack_rows
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole
from fsdpq.training.step import StepMode, evaluate, train_step
from fsdpq.worker.assemble import Assembled

Sections = dict[str, dict[str, Any]]

NUM_STEPS, BATCH, MICRO, LR, MAX_NORM = 5, 5, 2, 1e-3, 1.0
COEFFICIENT = 0.5
"""Large, so that the routers' part of a gradient is seen."""

FULL: Sections = {"adapter": {"kind": "none"}, "quantization": {"kind": "none"}}


def batches() -> list[list[Row]]:
    """Returns the rows of every step; with two ranks, the last of them has a micro-batch less."""
    rows = random_rows(NUM_STEPS * BATCH)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def train_sharded(directory: Path, sections: Sections, num_steps: int) -> dict[str, Any]:
    """Trains on this rank; returns losses, load-balancing losses and norms over all ranks."""
    assembled = assemble(directory, **sections)
    initial = {
        name: gather_whole(layer.lora_A).clone()  # pyright: ignore[reportAttributeAccessIssue]
        for name, layer in assembled.adapted_layers.items()
    }
    found = assembled.model.router_loss
    coefficient = found.coefficient if found else 0.0
    optimizer = torch.optim.AdamW(assembled.trainable, lr=LR, weight_decay=0.0, fused=True)
    answer: dict[str, Any] = {"initial": initial, "losses": [], "aux": [], "norms": []}
    for rows in batches()[:num_steps]:
        result = train_step(
            assembled.model,
            build_step(
                rows,
                micro_batch_size=sections.get("training", {}).get("micro_batch_size", MICRO),
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
            ),
            optimizer=optimizer,
            parameters=assembled.trainable,
            max_grad_norm=MAX_NORM,
            device=CPU,
            mode=StepMode(router_aux_loss_coef=coefficient),
        )
        assert result.aux_loss is not None
        both = torch.stack([result.loss, result.aux_loss])
        dist.all_reduce(both)
        answer["losses"].append(both[0].item())
        answer["aux"].append(both[1].item())
        answer["norms"].append(result.grad_norm.item())
    return answer | {"held_out": held_out(assembled)}


def held_out(assembled: Assembled) -> float:
    """Returns the loss of evaluation over the first batch."""
    step = build_step(
        batches()[0],
        micro_batch_size=MICRO,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    return evaluate(assembled.model, [step], device=CPU)


def reference_losses(
    model: nn.Module, micro_batches: Sequence[MicroBatch]
) -> tuple[Tensor, Tensor]:
    """Returns mean token loss and mean load-balancing loss of a step by transformers' forward."""
    num_tokens = sum(batch.num_tokens for batch in micro_batches)
    num_trained = sum(len(batch.targets) for batch in micro_batches)
    total = aux = torch.zeros(())
    for batch in micro_batches:
        if not batch.num_tokens:
            continue
        mask = batch.is_token.long()
        out = model(batch.input_ids, attention_mask=mask, output_router_logits=True)
        logits = out.logits.flatten(0, 1)[batch.loss_positions]
        total = total + functional.cross_entropy(logits, batch.targets, reduction="sum")
        aux = aux + out.aux_loss * batch.num_tokens / num_tokens
    return total / num_trained, aux


def train_reference(model: nn.Module, num_ranks: int) -> dict[str, list[float]]:
    """Trains transformers' model by plain torch on the micro-batches of all ranks."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    answer: dict[str, list[float]] = {"losses": [], "aux": [], "norms": []}
    for rows in batches():
        steps = [
            build_step(rows, micro_batch_size=MICRO, rank=rank, world_size=num_ranks)
            for rank in range(num_ranks)
        ]
        loss, aux = reference_losses(model, [b for step in steps for b in step.micro_batches])
        (loss + COEFFICIENT * aux).backward()
        answer["norms"].append(float(nn.utils.clip_grad_norm_(parameters, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        answer["losses"].append(loss.item())
        answer["aux"].append(aux.item())
    return answer


def save_mixture(directory: Path, family: str, **changes: Any) -> Path:
    """Saves a tiny mixture."""
    return save_tiny_llama(directory, tied=False, family=family, **(FAMILIES[family] | changes))


def given(coefficient: float, **more: Any) -> Sections:
    """Returns the section of the recipe that asks for the loss."""
    return {"training": {"router_aux_loss_coef": coefficient, **more}}


@pytest.mark.parametrize(
    ("family", "num_ranks", "sections", "changes"),
    [
        # Frozen routers, NF4 experts; what the model's config says, in chunks.
        (
            "mixtral",
            2,
            {"training": {"layer_chunks": 2}},
            {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT},
        ),
        # Trained routers.
        ("qwen3_moe", 2, FULL | given(COEFFICIENT), {}),
        (
            "gpt_oss",
            1,
            {
                **given(COEFFICIENT),
                "quantization": {"kind": "none"},
                "model": {"attn_implementation": "eager"},
                "fsdp": {"activation_checkpointing": "selective"},
            },
            {},
        ),
    ],
)
def test_training_equals_transformers(
    ranks: RankPool,
    tmp_path: Path,
    family: str,
    num_ranks: int,
    sections: Sections,
    changes: dict[str, Any],
) -> None:
    directory = save_mixture(tmp_path, family, **changes)
    answers = ranks.run(num_ranks, train_sharded, directory, sections, NUM_STEPS)
    attention = sections.get("model", {}).get("attn_implementation", "sdpa")
    plain = "quantization" in sections
    load = reference.load_plain if plain else reference.load_dequantized
    model = load(directory, attn_implementation=attention).train()
    if answers[0]["initial"]:
        model = reference.with_peft_lora(model, answers[0]["initial"], rank=4)
    expected = train_reference(model, num_ranks)
    with torch.no_grad():
        expected_held_out = reference.batch_loss(model.eval(), batches()[0]).item()
    for answer in answers:
        # fp32 sums in another order, amplified by Adam: 1e-5 relative.
        assert answer["aux"] == pytest.approx(expected["aux"], rel=1e-5)
        assert answer["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        # Evaluation is the loss of tokens alone.
        assert answer["held_out"] == pytest.approx(expected_held_out, rel=1e-5)


def train_under(directory: Path, settings: list[Sections]) -> list[dict[str, Any]]:
    """Trains under each of the settings in turn."""
    return [train_sharded(directory, FULL | sections, 2) for sections in settings]


def test_settings_do_not_change_the_loss(ranks: RankPool, tmp_path: Path) -> None:
    four = {"micro_batch_size": 4}
    settings: list[Sections] = [
        given(COEFFICIENT, **four) | {"fsdp": {"activation_checkpointing": "none"}},
        given(COEFFICIENT, **four),
        given(COEFFICIENT, **four, layer_chunks=2) | {"fsdp": {"activation_offload": True}},
        given(COEFFICIENT, **four, layer_chunks=4)
        | {"fsdp": {"activation_checkpointing": "selective"}},
        given(1e-9, **four),
    ]
    directory = save_mixture(tmp_path, "mixtral")
    kept, *others, tiny = ranks.run(1, train_under, directory, settings)[0]
    for answer in others:
        for name in ("aux", "losses", "norms"):
            # fp32 sums in another order.
            assert answer[name] == pytest.approx(kept[name], rel=1e-6)
    assert tiny["aux"][0] == pytest.approx(kept["aux"][0], rel=1e-6)
    assert tiny["norms"] != pytest.approx(kept["norms"], rel=1e-3), "the loss has a gradient"


def packed_loss(directory: Path, layer_chunks: int) -> tuple[float, float]:
    """Returns the load-balancing loss of packed rows, and the sum of their token losses."""
    assembled = assemble(
        directory,
        **given(1.0, layer_chunks=layer_chunks),
        quantization={"kind": "none"},
        data={"packing": "best_fit"},
    )
    batch = collate(packed_rows())
    assert batch.position_ids is not None
    assert not batch.is_token.all()
    inputs = (batch.input_ids, batch.loss_positions, batch.targets, batch.position_ids)
    losses = assembled.model.losses(*inputs, batch.is_token)
    return losses.router.item(), losses.tokens.item()


def packed_rows() -> list[Row]:
    """Returns four rows of several documents each."""
    packed = pack_rows(random_rows(12), 56)[:4]
    assert len(packed) == 4
    assert all(len(row.document_lengths) > 1 for row in packed)
    return packed


def test_packed_documents_count_as_if_each_was_alone(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_mixture(tmp_path, "mixtral")
    model: Any = reference.load_plain(directory)
    of_layers: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    with torch.no_grad():
        for row in packed_rows():
            for ids in torch.tensor(row.input_ids).split(list(row.document_lengths)):
                found = model(ids[None], output_router_logits=True).router_logits
                for mine, logits in zip(of_layers, found, strict=True):
                    mine.append(logits)
    layers = tuple(torch.cat(logits) for logits in of_layers)
    expected = float(load_balancing_loss_func(layers, 4, 2))
    plain, chunked = (ranks.run(1, packed_loss, directory, n)[0] for n in (1, 2))
    assert plain[0] == pytest.approx(expected, rel=1e-6)
    assert chunked == pytest.approx(plain, rel=1e-6)
