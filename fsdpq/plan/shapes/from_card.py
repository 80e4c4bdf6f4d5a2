"""The tensors of a model that is known by its card."""

from __future__ import annotations

from collections.abc import Iterator

from fsdpq.cards.card import LinearShape, ModelCard
from fsdpq.plan.shape import GroupShape, ModelShape, TensorShape
from fsdpq.plan.shapes.names import WeightNames, weight_names

ROUTER = "mlp.gate"
"""What cards call the matrix that chooses experts."""


def shape_from_card(card: ModelCard) -> ModelShape:
    """Returns the tensors of ``card``, under the names and in the order of transformers."""
    family, names = card.family, weight_names(card.model_type)
    hidden, vocab = card.hidden_size, card.vocab_size
    tied = f"{names.head}.weight" if card.tie_word_embeddings else ""
    embedding = [TensorShape(f"{names.embedding}.weight", (vocab, hidden), tied_name=tied)]
    bias = [TensorShape(f"{names.head}.bias", (vocab,))] if family.head_bias else []
    head = [TensorShape(f"{names.head}.weight", (vocab, hidden)), *bias]
    groups = [
        GroupShape("layer", tuple(_layer(card, names)), card.num_layers),
        GroupShape("embedding", tuple(embedding + (bias if tied else []))),
        *([] if tied else [GroupShape("head", tuple(head))]),
        GroupShape("root", tuple(_norm(names.last_norm, hidden, family.norm_bias))),
    ]
    return ModelShape(
        name=card.name,
        source="card",
        model_type=card.model_type,
        groups=tuple(groups),
        hidden_size=hidden,
        intermediate_size=card.intermediate_size,
        num_attention_heads=card.num_attention_heads,
        num_key_value_heads=card.num_key_value_heads,
        head_dim=card.head_dim,
        vocab_size=vocab,
        max_position_embeddings=card.max_position_embeddings,
        tie_word_embeddings=card.tie_word_embeddings,
        gated=family.gated,
        layer_norms=family.layer_norms,
        qk_norm=family.qk_norm,
        num_experts=card.num_experts,
        num_experts_per_tok=card.num_experts_per_tok,
        moe_intermediate_size=card.moe_intermediate_size,
        softcap=card.model_type == "gemma2",
        layers_prefix=names.layers,
        residual_linears=(family.output, family.down),
    )


def _layer(card: ModelCard, names: WeightNames) -> Iterator[TensorShape]:
    """Yields the tensors of one decoder layer."""
    family = card.family
    for shape in card.linear_shapes:
        yield from _linear(shape)
    for name, heads in (("q_norm", card.num_attention_heads), ("k_norm", card.num_key_value_heads)):
        if family.qk_norm != "none":
            size = card.head_dim * (heads if family.qk_norm == "full" else 1)
            yield TensorShape(f"self_attn.{name}.weight", (size,))
    for name in names.norms:
        yield from _norm(name, card.hidden_size, family.norm_bias)


def _linear(shape: LinearShape) -> Iterator[TensorShape]:
    matrix = (shape.out_features, shape.in_features)
    if shape.count > 1:
        yield TensorShape(shape.name, (shape.count, *matrix), "experts")
        return
    kind = "router" if shape.name == ROUTER else "linear"
    yield TensorShape(f"{shape.name}.weight", matrix, kind)
    if shape.bias:
        yield TensorShape(f"{shape.name}.bias", (shape.out_features,))


def _norm(name: str, size: int, bias: bool) -> Iterator[TensorShape]:
    yield TensorShape(f"{name}.weight", (size,))
    if bias:
        yield TensorShape(f"{name}.bias", (size,))
