"""What is known of a model without its files: sizes, from which shapes and counts follow."""

from __future__ import annotations

from dataclasses import dataclass

from fsdpq.cards.families import FAMILIES, Family


@dataclass(frozen=True)
class LinearShape:
    """One linear layer, or one stack of experts' weights, of a decoder layer.

    Attributes:
        name: name inside the decoder layer, ``self_attn.q_proj``.
        out_features: rows of the weight.
        in_features: columns of the weight.
        bias: it has a bias of ``out_features``.
        count: how many there are: 1, or the number of experts.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    count: int = 1

    @property
    def num_weights(self) -> int:
        """Elements of the weights, without biases."""
        return self.out_features * self.in_features * self.count

    @property
    def num_parameters(self) -> int:
        """Elements of the weights and biases."""
        return self.num_weights + self.out_features * self.count * self.bias


@dataclass(frozen=True)
class ModelCard:
    """The published shape of a causal language model, in transformers' words.

    Attributes:
        name: repository on the Hugging Face hub.
        aliases: other repositories, and ``pypi:`` names, of models with the same shape.
        model_type: transformers' name of the architecture, a key of `FAMILIES`.
        max_position_embeddings: longest sequence that it was made for, in tokens.
        num_experts: experts of each feed-forward, 0 where it is dense.
        moe_intermediate_size: hidden size of one expert, 0 where the feed-forward is dense.
        sliding_window: tokens that (some) layers look back on, None where all is seen.
        license: SPDX name, or the name of the licence on the hub.
    """

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    sliding_window: int | None = None
    license: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """What its decoder layers are made of."""
        return FAMILIES[self.model_type]

    @property
    def linear_shapes(self) -> tuple[LinearShape, ...]:
        """The linear layers of one decoder layer; experts are stacks of weights, with a router."""
        return (*self._attention(), *(self._experts() if self.num_experts else self._dense()))

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        family, query, key = self.family, self._query_size, self._key_size
        norms = family.layer_norms * self.hidden_size * (1 + family.norm_bias)
        norms += {"none": 0, "head": 2 * self.head_dim, "full": query + key}[family.qk_norm]
        return norms + sum(shape.num_parameters for shape in self.linear_shapes)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the embedding and of the output head, which may be the same ones."""
        table = self.vocab_size * self.hidden_size
        head = self.vocab_size * self.family.head_bias
        return table + head + (0 if self.tie_word_embeddings else table)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        last_norm = self.hidden_size * (1 + self.family.norm_bias)
        return (
            self.num_embedding_parameters + self.num_layers * self.num_layer_parameters + last_norm
        )

    @property
    def _query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def _key_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def _attention(self) -> list[LinearShape]:
        family = self.family
        sizes = [self._query_size, self._key_size, self._key_size]
        if len(family.projections) == 1:
            sizes = [sum(sizes)]
        inputs = [
            LinearShape(name, size, self.hidden_size, family.projection_bias)
            for name, size in zip(family.projections, sizes, strict=True)
        ]
        output = LinearShape(family.output, self.hidden_size, self._query_size, family.other_bias)
        return [*inputs, output]

    def _dense(self) -> list[LinearShape]:
        family = self.family
        width = self.intermediate_size * (1 + family.gated) // len(family.gates)
        gates = [
            LinearShape(name, width, self.hidden_size, family.other_bias) for name in family.gates
        ]
        down = LinearShape(family.down, self.hidden_size, self.intermediate_size, family.other_bias)
        return [*gates, down]

    def _experts(self) -> list[LinearShape]:
        width, hidden, count = self.moe_intermediate_size, self.hidden_size, self.num_experts
        return [
            LinearShape("mlp.gate", count, hidden),
            LinearShape("mlp.experts.gate_up_proj", 2 * width, hidden, count=count),
            LinearShape("mlp.experts.down_proj", hidden, width, count=count),
        ]
