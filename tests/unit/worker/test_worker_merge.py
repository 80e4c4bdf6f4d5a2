"""What the receipt of a merge says, and which tokens models are compared on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fsdpq.data.text.tokenize import Row
from fsdpq.worker.merge.compare import _divergences, _documents_of, _lay_out
from fsdpq.worker.merge.receipt import Likeness, Survival, SurvivalBook, kind_of, verdict
from fsdpq.worker.merge.weights import Rows


def rows(seed: int, scale: float) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(6, 8, generator=generator)
    return Rows(base, base + scale * torch.randn(6, 8, generator=generator))


def test_sums_over_chunks_and_weights_are_those_of_the_whole() -> None:
    first, second = rows(0, 0.01), rows(1, 0.02)
    book = SurvivalBook()
    for part in (slice(0, 2), slice(2, 6)):
        chunk = Rows(first.base[part], first.trained[part])
        book.add("model.layers.0.mlp.up_proj.weight", chunk, chunk.trained.bfloat16())
    book.add("model.layers.1.mlp.up_proj.weight", second, second.trained.bfloat16())
    whole = Rows(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    change = (whole.trained - whole.base).double()
    kept = whole.trained.bfloat16().double() - whole.base.double()
    told = book.fields()
    assert told["kinds"] == {"mlp.up_proj": told["all"]}
    assert told["all"]["change_norm"] == pytest.approx(change.norm().item(), rel=1e-5)
    assert told["all"]["survived_norm"] == pytest.approx(kept.norm().item(), rel=1e-5)
    assert told["all"]["kept"] == pytest.approx(
        ((kept * change).sum() / change.square().sum()).item(), rel=1e-4
    )
    error = ((kept - change).norm() / change.norm()).item()
    assert told["all"]["relative_error"] == pytest.approx(error, rel=1e-4)
    assert told["weights"].keys() == book.weights.keys()


def test_a_change_below_the_steps_of_16_bits_is_lost_and_that_is_told() -> None:
    base = torch.ones(4, 4)
    both = Rows(base, base + 1e-4)
    sums = Survival()
    sums.add(both, both.trained.bfloat16())
    assert sums.fields()["kept"] == 0.0
    assert sums.fields()["lost"] == 1.0
    assert torch.equal(both.trained, base + 1e-4), "what is written later stays as it is"
    told = verdict(onto="original", dtype="bf16", survival=sums, likeness={}, requantized=None)
    assert len(told) == 1
    assert "bf16 changed what was trained by 100% of its size: `--dtype fp32` keeps all" in told[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.3.mlp.experts.7.w1.weight", "w1"),
    ],
)
def test_kinds_are_names_without_numbers(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def likeness(merged: float, requantized: float | None = None) -> dict[str, Likeness]:
    found = {"trained": Likeness(1.0, 0.0, 0.0), "base": Likeness(2.0, 0.5, 3.0)}
    found["merged"] = Likeness(1.25, merged, 4 * merged)
    if requantized is not None:
        found["requantized"] = Likeness(1.5, requantized, 1.0)
    return found


def test_the_verdict_names_the_cause_of_a_difference() -> None:
    def say(onto: str, **models: float) -> str:
        found = likeness(**models)
        return " ".join(
            verdict(
                onto=onto, dtype="bf16", survival=Survival(), likeness=found,
                requantized="nf4" if "requantized" in models else None,
            )
        )  # fmt: skip

    assert say("dequantized", merged=1e-6).startswith("The merged model is the trained model")
    assert "is close to the trained model" in say("original", merged=0.03)
    far = say("original", merged=0.2)
    assert "is not the trained model (loss 1.2500 and 1.0000 nats a token)" in far
    assert "40.00% of what training changed" in far
    assert "peft/issues/2105" in far
    assert "`--onto dequantized`" in far
    assert "`--dtype fp32` keeps them" in say("dequantized", merged=0.2)
    again = say("dequantized", merged=1e-6, requantized=0.25)
    assert "Quantizing again (nf4) costs +0.2500 nats" in again
    assert "serve the adapter beside the quantized base" in again


def test_divergences_are_those_of_torch_in_nats() -> None:
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randn(150, 40, generator=generator).log_softmax(-1) for _ in range(2))
    found = torch.cat(list(_divergences(first, other)))
    expected = functional.kl_div(other, first, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(found, expected.double(), atol=1e-6)
    assert torch.cat(list(_divergences(first, first))).max() == 0


def test_documents_of_packed_rows_stand_apart_and_within_the_budget() -> None:
    row = Row(list(range(1, 13)), [0, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1], (4, 3, 5))
    documents = list(_documents_of(row))
    assert [list(d.tokens) for d in documents] == [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]
    laid_out = _lay_out(documents, 8)
    assert laid_out is not None
    batch, counts = laid_out
    assert batch.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert counts.tolist() == [[True, True, True], [False, True, False]]
    # A document that is too long alone is cut; one without a trained token is none.
    cut = _lay_out(documents[2:], 4)
    assert cut is not None
    assert cut[0].tolist() == [[8, 9, 10, 11]]
    assert _lay_out([documents[0].__class__([1, 2], [False, False])], 8) is None
