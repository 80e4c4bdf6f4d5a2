"""Documents computed by themselves have the numbers of transformers' mask, and need none."""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import pytest
import torch
from support.families import FAMILIES, MORE_FAMILIES, ONLY_EAGER
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from fsdpq.errors import CheckpointError
from fsdpq.model import document_attention
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.document_attention import (
    attend_documents,
    document_starts,
    longest_document,
    use_document_attention,
)
from fsdpq.model.packing import check_packing_isolates, longest_alone

TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALL = FAMILIES | (MORE_FAMILIES if os.environ.get("FSDPQ_FAMILIES") == "all" else {})
LENGTHS = ([4, 3, 1, 3], [9, 2])
"""Documents of two rows of 11 tokens: one of a single token, and padding behind the second's."""

MASKED = {"doge", "gpt_bigcode"}
"""Families that do more with a mask than to hand it on."""


def positions(*rows: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def build(family: str, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    own = dict(ALL.get(family, {}))
    own |= {"head_dim": 16} if "head_dim" in own else {}
    config = AutoConfig.for_model(family, **(TINY | own | changes))
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in hf.parameters():
        if parameter.dim() > 1:  # larger than usual: attention that differs shows
            nn.init.normal_(parameter, std=0.2)
    return CausalLM(hf.eval())


def run(model: CausalLM, position_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the hidden states of made-up tokens, and the gradients of a weighted sum of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, position_ids.shape, generator=generator)
    model.zero_grad()
    hidden = model._decode(ids, position_ids).last_hidden_state
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same_as_with_the_mask(model: CausalLM, position_ids: Tensor) -> None:
    model.longest_alone = 0
    expected, wanted = run(model, position_ids)
    model.longest_alone = longest_alone(model.hf)
    assert model.longest_alone
    use_document_attention(model.hf)
    found, gradients = run(model, position_ids)
    # fp32, the same sums in another order; gradients pass three layers.
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        bound = 1e-5 * wanted[name].abs().max().item() + 1e-5
        assert torch.allclose(gradient, wanted[name], rtol=0, atol=bound), name
    model.longest_alone = 0
    assert torch.equal(run(model, position_ids)[0], expected), "a mask is used as before"


def _isolates(hf: PreTrainedModel) -> bool:
    try:
        check_packing_isolates(hf)
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("family", [name for name in ALL if name not in ONLY_EAGER])
def test_every_family_has_the_numbers_of_the_mask_or_keeps_it(family: str) -> None:
    model = build(family)
    keeps = family in MASKED | {"falcon", "opt"} or not _isolates(model.hf)
    assert (longest_alone(model.hf) == 0) == keeps
    if not keeps:
        assert longest_alone(model.hf) == sys.maxsize
        assert_same_as_with_the_mask(model, positions(*LENGTHS))


WINDOWED = ["mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3"]


@pytest.mark.parametrize("family", WINDOWED)
def test_documents_longer_than_a_sliding_window_are_cut_by_it(family: str) -> None:
    window = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
    model = build(family, **window)
    assert longest_alone(model.hf) == sys.maxsize
    assert_same_as_with_the_mask(model, positions(*LENGTHS))
    model.longest_alone = sys.maxsize
    hf_config: Any = model.hf.config
    windowed = run(model, positions(*LENGTHS))[0]
    layers: list[Any] = [m for m in model.modules() if getattr(m, "sliding_window", None)]
    for layer in layers:
        layer.sliding_window = None
    hf_config.sliding_window = None
    assert not torch.allclose(windowed, run(model, positions(*LENGTHS))[0], atol=1e-3)


def test_where_a_window_is_not_told_longer_documents_get_a_mask() -> None:
    # OLMoE's layers tell of a window that its masks do not have.
    for family in ("llama", "olmoe"):
        model = build(family, sliding_window=5)
        assert longest_alone(model.hf) == 5
        model.longest_alone = 5
        seen: list[Any] = []
        layer = model.decoder_layers[0]
        hook = layer.register_forward_pre_hook(
            lambda _m, _a, kwargs, seen=seen: seen.append(kwargs["attention_mask"]),
            with_kwargs=True,
        )
        use_document_attention(model.hf)
        for lengths in ([5, 1, 4], [6, 4]):
            run(model, positions(lengths))
        hook.remove()
        assert [mask.dtype for mask in seen] == [torch.int32, torch.bool]


def test_other_attention_is_left_alone() -> None:
    model = build("llama")
    plain = build("llama")
    use_document_attention(model.hf)
    ids = torch.randint(3, 64, (2, 12))
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, 9:] = False
    cached: list[Tensor] = []
    with torch.no_grad():
        for each in (model.hf, plain.hf):
            cache = DynamicCache(config=each.config)
            each(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
            cached.append(each(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits)
        pairs = [
            cached,
            [each.hf(input_ids=ids).logits for each in (model, plain)],
            [each.hf(input_ids=ids, attention_mask=padding).logits for each in (model, plain)],
        ]
    for found, expected in pairs:
        assert torch.equal(found, expected)


def test_who_needs_more_than_causal_attention_keeps_its_mask() -> None:
    assert longest_alone(build("gemma3_text", use_bidirectional_attention=True).hf) == 0
    eager = build("llama")
    eager.hf.set_attn_implementation("eager")
    assert longest_alone(eager.hf) == 0


def test_starts_say_where_documents_and_padding_begin() -> None:
    starts = document_starts(positions(*LENGTHS))
    assert starts.dtype == torch.int32
    assert starts.shape == (2, 1, 1, 12)
    assert starts[0, 0, 0].tolist() == [0, 4, 7, 8] + [11] * 8
    assert starts[1, 0, 0].tolist() == [0, 9] + [11] * 10
    assert longest_document(starts) == 9
    assert longest_document(document_starts(positions([1] * 11))) == 1


def test_starts_of_other_rows_are_an_error() -> None:
    x = torch.randn(1, 2, 11, 8)
    with pytest.raises(ValueError, match="starts of documents have the shape"):
        attend_documents(nn.Module(), x, x, x, document_starts(positions(*LENGTHS)))
    with pytest.raises(RuntimeError):  # what any other attention makes of them
        functional.scaled_dot_product_attention(x, x, x, document_starts(positions(LENGTHS[0])))


class _Largest(TorchDispatchMode):
    """Keeps the most elements of a tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *found, 0)
        return out


def test_no_tensor_grows_with_the_square_of_a_row() -> None:
    model = build("llama", max_position_embeddings=1024)
    position_ids = positions([64] * 16)
    largest: list[int] = []
    for alone in (False, True):
        model.longest_alone = longest_alone(model.hf) if alone else 0
        if alone:
            use_document_attention(model.hf)
        with _Largest() as seen:
            run(model, position_ids)
        largest.append(seen.elements)
    with_mask, without = largest
    assert with_mask >= 1024 * 1024
    assert without <= 1024 * 96  # the widest hidden state


# Gemma 3 scales scores by another number than the size of its heads.
@pytest.mark.parametrize(("family", "window"), [("mistral", None), ("gemma3_text", 5)])
def test_the_kernel_of_a_gpu_is_told_the_same(
    family: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """``torch.nn.attention.varlen.varlen_attn`` in plain torch."""
        told.append((cu_seq_q.dtype, max_q, max_k, window_size))
        bounds = cu_seq_q.tolist()
        assert bounds == cu_seq_k.tolist()
        out = []
        for start, stop in itertools.pairwise(bounds):
            q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
            places = torch.arange(stop - start)
            distance = places[:, None] - places
            mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
            one = functional.scaled_dot_product_attention(
                q, k, v, mask, scale=scale, enable_gqa=enable_gqa
            )
            out.append(one.transpose(0, 1))
        return torch.cat(out)

    model = build(family, sliding_window=window)
    model.longest_alone = longest_alone(model.hf)
    use_document_attention(model.hf)
    expected = run(model, positions(*LENGTHS))
    monkeypatch.setattr(document_attention, "has_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(document_attention, "varlen_attn", varlen_attn)
    found = run(model, positions(*LENGTHS))
    assert torch.allclose(found[0], expected[0], atol=1e-4)  # of numbers up to 5
    for name, gradient in found[1].items():
        bound = 1e-5 * expected[1][name].abs().max().item() + 1e-5
        assert torch.allclose(gradient, expected[1][name], rtol=0, atol=bound), name
    assert told == [(torch.int32, 9, 9, (-1, 0) if window is None else (4, 0))] * 3


def test_autocast_reaches_the_kernel_of_a_gpu_which_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[set[torch.dtype]] = []

    def has_varlen_kernel(flat: document_attention.Projected) -> bool:
        seen.append({x.dtype for x in flat})
        return False

    monkeypatch.setattr(document_attention, "has_varlen_kernel", has_varlen_kernel)
    model = build("llama")
    model.longest_alone = longest_alone(model.hf)
    use_document_attention(model.hf)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, positions(*LENGTHS))
    assert seen == [{torch.bfloat16}] * 3
