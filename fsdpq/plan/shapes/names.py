"""What the architectures of `fsdpq.cards.families` call the weights that cards only count."""

from __future__ import annotations

from dataclasses import dataclass

_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class WeightNames:
    """Names of one architecture, as transformers 5 gives them.

    Attributes:
        layers: what stands before a decoder layer's number.
        embedding: the module of the embedding.
        head: the module of the output head.
        last_norm: the module of the norm before it.
        norms: of one decoder layer, over the hidden size.
    """

    layers: str = "model.layers."
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    last_norm: str = "model.norm"
    norms: tuple[str, ...] = _NORMS


_OTHERS: dict[str, WeightNames] = {
    "gemma2": WeightNames(norms=_FOUR_NORMS),
    "gemma3_text": WeightNames(norms=_FOUR_NORMS),
    "olmo2": WeightNames(norms=("post_attention_layernorm", "post_feedforward_layernorm")),
    "phi": WeightNames(last_norm="model.final_layernorm", norms=("input_layernorm",)),
    "falcon": WeightNames(
        layers="transformer.h.",
        embedding="transformer.word_embeddings",
        last_norm="transformer.ln_f",
        norms=("input_layernorm",),
    ),
    "gpt_neox": WeightNames(
        layers="gpt_neox.layers.",
        embedding="gpt_neox.embed_in",
        last_norm="gpt_neox.final_layer_norm",
    ),
}


def weight_names(model_type: str) -> WeightNames:
    """Returns the names of an architecture of `fsdpq.cards.families`."""
    return _OTHERS.get(model_type, WeightNames())
