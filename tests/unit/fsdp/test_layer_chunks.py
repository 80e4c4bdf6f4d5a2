"""Layers that run in chunks of rows compute what they compute at once, dropout apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.families import FAMILIES, MORE_FAMILIES, ONLY_EAGER
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fsdpq.fsdp.layers import apply_layer_runs
from fsdpq.model.causal_lm import CausalLM

ROWS = TOKENS = HEADS = 4
"""Equal, so that a tensor without rows cannot be told from one with rows by its sizes."""

WITH_ALIBI: dict[str, dict[str, Any]] = {
    "bloom": {},
    "mpt": {},
    "falcon": {"alibi": True, "new_decoder_architecture": False, "num_kv_heads": HEADS},
}


def build(family: str, attention: str, **changes: Any) -> PreTrainedModel:
    """Returns a random tiny model, in evaluation mode: some families draw numbers in training."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 192,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(sizes | changes))
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()


def loss_and_gradients(
    hf: PreTrainedModel, num_chunks: int, position_ids: Tensor | None, *, width: int = TOKENS
) -> tuple[float, list[Tensor]]:
    """Returns the loss of ``ROWS`` rows of ``width`` tokens and the gradients of all weights."""
    model = CausalLM(copy.deepcopy(hf)).eval()
    layers = list(model.decoder_layers)
    apply_layer_runs(layers, checkpointing="none", num_chunks=num_chunks, host=None)
    ids = torch.arange(3, 3 + ROWS * width).view(ROWS, width) % 61
    positions = torch.arange(ROWS * width - 1)
    loss = model(ids, positions, ids.flatten()[1:], position_ids)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def packed_positions(width: int) -> Tensor:
    """Returns positions of two documents in each row, cut at another place in each."""
    rows = [
        torch.cat([torch.arange(row + 1), torch.arange(width - row - 1)]) for row in range(ROWS)
    ]
    return torch.stack(rows)


def check(hf: PreTrainedModel, position_ids: Tensor | None, width: int = TOKENS) -> None:
    """Compares one chunk with two, and with one a row."""
    expected, gradients = loss_and_gradients(hf, 1, position_ids, width=width)
    for num_chunks in (2, 3, ROWS):
        loss, found = loss_and_gradients(hf, num_chunks, position_ids, width=width)
        # fp32 sums in another order.
        assert loss == pytest.approx(expected, rel=1e-6)
        for mine, whole in zip(found, gradients, strict=True):
            assert (mine - whole).norm() <= 1e-5 * whole.norm() + 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_run_in_chunks(family: str) -> None:
    attention = "eager" if family in ONLY_EAGER else "sdpa"
    check(build(family, attention, **FAMILIES[family]), packed_positions(TOKENS))


@pytest.mark.parametrize("family", WITH_ALIBI)
def test_alibi_is_cut_by_rows(family: str) -> None:
    changes = (FAMILIES | MORE_FAMILIES)[family] | WITH_ALIBI[family]
    check(build(family, "eager", **changes), None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
def test_masks_are_cut_by_rows(attention: str, packed: bool) -> None:
    hf = build("mistral", attention, sliding_window=4)
    positions = packed_positions(11) if packed else None
    check(hf, positions, 11)
    plain, _ = loss_and_gradients(hf, 1, None, width=11)
    assert (loss_and_gradients(hf, 4, positions, width=11)[0] == pytest.approx(plain)) != packed


class Dropping(nn.Module):
    """A layer with dropout that keeps what was left of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropped: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        out = nn.functional.dropout(self.linear(hidden), 0.5, self.training)
        self.dropped.append(out.detach())
        return out.square()  # saves its input: recomputing stops at the last saved tensor


def test_every_chunk_draws_its_own_numbers_and_draws_them_again_in_backward() -> None:
    layer = Dropping().train()
    apply_layer_runs([layer], checkpointing="full", num_chunks=4, host=None)
    hidden = torch.ones(4, 16, 8, requires_grad=True)
    torch.manual_seed(3)
    layer(hidden).sum().backward()
    after = torch.rand(1)
    forward, again = layer.dropped[:4], layer.dropped[4:]
    assert len(again) == 4
    # Equal rows, and no two chunks drop the same of them.
    assert len({tuple(chunk.flatten().tolist()) for chunk in forward}) == 4
    # Recomputed in the order of backward: each has the bits of its forward.
    for chunk in again:
        assert any(torch.equal(chunk, other) for other in forward)
    assert len({tuple(chunk.flatten().tolist()) for chunk in again}) == 4
    # Drawing again does not move the generator.
    torch.manual_seed(3)
    for _ in range(4):
        nn.functional.dropout(torch.ones(1, 16, 8), 0.5)
    assert torch.equal(torch.rand(1), after)


def test_an_output_that_cannot_be_joined_is_named() -> None:
    class Strange(nn.Module):
        def forward(self, hidden: Tensor) -> dict[str, Tensor]:
            return {"hidden": hidden}

    layer = Strange()
    apply_layer_runs([layer], checkpointing="none", num_chunks=2, host=None)
    with pytest.raises(TypeError, match="`dict`, which"):
        layer(torch.ones(2, 3, 4))
