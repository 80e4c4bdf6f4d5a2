"""Puts experts together as transformers 5 keeps them: two stacks a mixture."""

from __future__ import annotations

import re
from collections.abc import Mapping

_EXPERT = re.compile(r"^(?:(.*)\.)?experts\.(\d+)\.([\w.]+)\.weight$")

GATES = ("gate_proj", "up_proj", "w1", "w3")
"""What files call the projections into an expert; both together are ``gate_up_proj``."""

DOWNS = ("down_proj", "w2")

STACKS = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
}
"""What Granite's files call stacks -> what transformers 5 calls them."""

OLD_BLOCKS = {"block_sparse_moe": "mlp"}
"""What files call a mixture -> what transformers 5 calls it."""


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a decoder layer is a matrix of all experts of a mixture."""
    return len(shape) == 3 and "experts." in name


def join_experts(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of one decoder layer with its experts as stacks.

    A stack is named without ``.weight``: ``mlp.experts.gate_up_proj``,
    ``(experts, 2 * intermediate, hidden)``. It stands where the first expert stood.
    """
    joined: dict[str, tuple[int, ...]] = {}
    counts = _counts(tensors)
    for name, shape in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            joined[_renamed(name) if counts else _stack_name(name, shape)] = shape
            continue
        block, _, part = match.groups()
        stem = f"{_renamed(block or '')}.experts".lstrip(".")
        num_experts = counts[block or ""]
        if part in GATES:
            joined[f"{stem}.gate_up_proj"] = (num_experts, 2 * shape[0], shape[1])
        elif part in DOWNS:
            joined[f"{stem}.down_proj"] = (num_experts, *shape)
        else:
            joined[name] = shape
    return joined


def _stack_name(name: str, shape: tuple[int, ...]) -> str:
    for old, new in STACKS.items():
        if len(shape) == 3 and name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def _counts(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns how many experts each mixture of a layer has, by the name of the mixture."""
    numbers: dict[str, set[str]] = {}
    for name in tensors:
        if match := _EXPERT.match(name):
            numbers.setdefault(match[1] or "", set()).add(match[2])
    return {block: len(found) for block, found in numbers.items()}


def _renamed(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{OLD_BLOCKS.get(first, first)}{dot}{rest}"
