"""Shapes of the models, and how many floating-point operations a step of one takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fsdpq.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """A Llama whose embedding and head are not tied."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    key_value_heads: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of the linears of a layer."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (key_value, self.hidden),
            "v_proj": (key_value, self.hidden),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def num_weights(self) -> int:
        """All weights but the norms."""
        layer = sum(rows * columns for rows, columns in self.linears.values())
        return self.layers * layer + 2 * self.vocab * self.hidden

    def config(self, tokens: int) -> dict[str, Any]:
        """Returns the arguments of transformers' ``LlamaConfig``."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": tokens,
            "tie_word_embeddings": False,
        }


SHAPES = {
    "tiny": Shape(128, 256, 2, 4, 2, 512),
    "56m": Shape(512, 1408, 8, 8, 4, 32000),
    "200m": Shape(1024, 2816, 12, 16, 16, 32000),
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000),
    "34b": Shape(7168, 20480, 60, 56, 8, 64000),
    "70b": Shape(8192, 28672, 80, 64, 8, 32000),
    "405b": Shape(16384, 53248, 126, 128, 8, 128256),
}
"""``1b`` is TinyLlama, ``7b`` and ``70b`` are Llama 2, ``34b`` is Yi, ``405b`` is Llama 3.1."""


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, every token of which carries loss."""

    rows: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Batch:
        """Returns the batch that ``text`` names: ``2x2048`` is two rows of 2048 tokens.

        Raises:
            UsageError: it names none.
        """
        rows, _, tokens = text.partition("x")
        if not (rows.isdecimal() and tokens.isdecimal() and int(rows) and int(tokens)):
            raise UsageError(f"`{text}` is no batch", hint="for example `2x2048`: rows x tokens")
        return cls(int(rows), int(tokens))

    @property
    def size(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"


def find_shape(name: str, layers: int = 0) -> Shape:
    """Returns the shape called ``name``, with another number of layers if one is given.

    Raises:
        UsageError: there is none.
    """
    if name not in SHAPES:
        raise UsageError(f"there is no shape `{name}`", hint=f"there are {', '.join(SHAPES)}")
    return with_layers(SHAPES[name], layers or None)


def with_layers(shape: Shape, layers: int | None) -> Shape:
    """Returns ``shape`` with another number of layers, if one is given."""
    return shape if layers is None else dataclasses.replace(shape, layers=layers)


def step_flops(shape: Shape, batch: Batch, *, lora_rank: int, recompute: bool) -> float:
    """Returns the operations of forward and backward; a multiplication and an addition are two.

    Frozen weights take 2 for each weight and token in forward and in the gradient of the input,
    LoRA's as much again for their own gradient. Attention is causal: half of its ``tokens x
    tokens`` products, and five of them in backward for two in forward. Elementwise operations are
    not counted.

    Args:
        shape: of the model.
        batch: of the step.
        lora_rank: of the adapters, on every linear of the layers.
        recompute: count the forward of the layers twice.
    """
    forwards = 2 if recompute else 1
    linears = shape.linears.values()
    frozen = sum(rows * columns for rows, columns in linears)
    lora = lora_rank * sum(rows + columns for rows, columns in linears)
    products = 2 * frozen * (forwards + 1) + 2 * lora * (forwards + 2)
    head = 2 * shape.vocab * shape.hidden * 2
    attention = attention_flops(shape, batch, recompute=recompute)
    return float(batch.size * (shape.layers * products + head)) + attention


def attention_flops(shape: Shape, batch: Batch, *, recompute: bool) -> float:
    """Returns what of `step_flops` are products of activations with each other."""
    forwards = 2 if recompute else 1
    return float(batch.size * shape.layers * batch.tokens * shape.hidden * (2 * forwards + 5))
