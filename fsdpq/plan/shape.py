"""A model as its tensors: all that arithmetic needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

TensorKind = Literal["linear", "experts", "router", "plain"]
"""``linear``: the matrix of a linear layer inside a decoder layer. ``experts``: a stack of such
matrices, ``(experts, out_features, in_features)``. ``router``: the matrix that chooses experts,
never quantized. ``plain``: everything else: norms, biases, embeddings, heads."""


@dataclass(frozen=True)
class TensorShape:
    """One weight of a model.

    Attributes:
        name: as transformers names it, inside its layer (``self_attn.q_proj.weight``) or, outside
            of the layers, in the model (``model.embed_tokens.weight``).
        shape: ``(out_features, in_features)`` of a linear layer.
        kind: what may become of it.
        tied_name: its second name, of an embedding that is the head too; else empty.
        is_transposed: of ``experts``: ``(experts, in_features, out_features)``.
        stays_plain: a checkpoint that is quantized already holds this matrix unquantized.
        is_fp32: the model keeps it in fp32 whatever ``model.dtype`` is.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorKind = "plain"
    tied_name: str = ""
    is_transposed: bool = False
    stays_plain: bool = False
    is_fp32: bool = False

    @property
    def num_weights(self) -> int:
        """Elements."""
        return math.prod(self.shape)


GroupName = Literal["layer", "embedding", "head", "root"]
"""``layer`` is a decoder layer. A head that is tied to the embedding has no group: it is in
``embedding``. ``root`` is what is left, the last norm."""


@dataclass(frozen=True)
class GroupShape:
    """Weights that FSDP gathers together.

    Attributes:
        name: which.
        tensors: of one of them, in the model's order.
        count: how many of the same shapes there are; decoder layers of two shapes are two groups.
        indices: numbers of these decoder layers in the model; empty: they follow each other.
    """

    name: GroupName
    tensors: tuple[TensorShape, ...]
    count: int = 1
    indices: tuple[int, ...] = ()

    @property
    def num_weights(self) -> int:
        """Elements of one of them."""
        return sum(tensor.num_weights for tensor in self.tensors)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model.

    Attributes:
        name: repository or directory.
        source: where the numbers are from.
        model_type: transformers' name of the architecture.
        groups: all weights; decoder layers come first, in the order of the model.
        hidden_size: width of the residual stream.
        intermediate_size: hidden size of the dense feed-forward, 0 where there is none.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: size of one head.
        vocab_size: rows of the embedding.
        max_position_embeddings: longest sequence that the model was made for, in tokens.
        tie_word_embeddings: the head is the embedding.
        gated: the feed-forward multiplies a gate and an up projection.
        layer_norms: norms over the hidden size in a decoder layer.
        qk_norm: norms of query and key: none, over each head, or over all heads at once.
        num_experts: of each mixture, 0 where all is dense.
        num_experts_per_tok: experts that see a token.
        moe_intermediate_size: hidden size of one expert.
        softcap: logits are capped (Gemma 2), which costs the loss a third of its bytes more.
        checkpoint_bytes: of the weight files, None where they were not seen.
        is_here: the files lie on this machine.
        layers_prefix: what stands before a layer's number in names.
        residual_linears: linear layers that write to the residual stream, without ``.weight``.
        stored_as: how the checkpoint itself is quantized: not at all, by bitsandbytes in 4 bits, or
            as a quantized base of this program.
    """

    name: str
    source: Literal["card", "config", "headers"]
    model_type: str
    groups: tuple[GroupShape, ...]
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    gated: bool = True
    layer_norms: int = 2
    qk_norm: Literal["none", "head", "full"] = "none"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    softcap: bool = False
    checkpoint_bytes: int | None = None
    is_here: bool = False
    layers_prefix: str = "model.layers."
    residual_linears: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    stored_as: Literal["plain", "bnb", "base"] = "plain"

    @property
    def layers(self) -> Iterator[GroupShape]:
        """The groups of decoder layers, each with its count."""
        return (group for group in self.groups if group.name == "layer")

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(group.count for group in self.layers)

    @property
    def num_weights(self) -> int:
        """Weights of the whole model, tied ones once."""
        return sum(group.num_weights * group.count for group in self.groups)

    def layer_indices(self, group: GroupShape) -> Sequence[int]:
        """Returns the numbers of a group's decoder layers in the model."""
        start = 0
        for other in self.layers:
            if other is group:
                break
            start += other.count
        return group.indices or range(start, start + group.count)
