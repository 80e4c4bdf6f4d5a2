"""Finds the linear layers whose output a decoder layer adds to its residual stream.

With the weights of those at zero, a decoder layer is the identity. They are found in the autograd
graph of a forward on meta, not by name: from the layer's output, additions lead back to its input;
what else is added there is a branch, and the first linear layers on every way back through a branch
are the ones. That holds for attention and MLP in sequence or in parallel, scaled, or normalised
behind the linear layer, whatever the family calls its layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fsdpq.errors import CheckpointError

ADD = "AddBackward0"
LEAF = "torch::autograd::AccumulateGrad"
PRODUCTS = ("MmBackward0", "AddmmBackward0")


def find_residual_linears(hf: nn.Module, layers: nn.ModuleList) -> tuple[str, ...]:
    """Returns names inside a decoder layer, such as ``self_attn.o_proj`` and ``mlp.down_proj``.

    Args:
        hf: a transformers model on meta, not yet quantized.
        layers: its decoder layers.

    Raises:
        CheckpointError: zeroed linear layers would not make the layer an identity.
    """
    layer = layers[0]
    linears = {id(m.weight): n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    with _all_require_grad(hf):
        entry, output = _run_layer(hf, layer)
    names: list[str] = []
    for branch in _branches(output, entry):
        names += _first_linears(branch, entry, linears)
    if not names:
        raise _unknown_structure("its output is not its input plus something")
    return tuple(sorted(set(names)))


@contextmanager
def _all_require_grad(hf: nn.Module) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in hf.parameters()}
    try:
        with torch.enable_grad():
            hf.requires_grad_(True)
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _run_layer(hf: Any, layer: nn.Module) -> tuple[Any, Any]:
    """Returns the autograd nodes of the layer's input and output in a forward on meta."""
    nodes: list[tuple[Any, Any]] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        after: Tensor = output[0] if isinstance(output, tuple) else output
        nodes.append((hidden.grad_fn, after.grad_fn))

    device = torch.device("meta")
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    # A mask of four dimensions is taken as it is; transformers would look into values to make one.
    mask = torch.zeros(1, 1, 2, 2, dtype=hf.dtype, device=device)
    hook = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        hf.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise _unknown_structure(f"its forward needs weights ({error})") from error
    finally:
        hook.remove()
    return nodes[0]


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions if child is not None]


def _reaches(node: Any, entry: Any) -> bool:
    """Whether additions alone lead from ``node`` back to ``entry``."""
    return node is entry or (
        node.name() == ADD and any(_reaches(c, entry) for c in _children(node))
    )


def _branches(output: Any, entry: Any) -> list[Any]:
    """Returns the nodes that are added on the way from ``entry`` to ``output``."""
    found: list[Any] = []
    node = output
    while node is not entry and node.name() == ADD:
        onward = [child for child in _children(node) if _reaches(child, entry)]
        if len(onward) != 1:
            return []
        found += [child for child in _children(node) if child is not onward[0]]
        node = onward[0]
    return found if node is entry else []


def _first_linears(branch: Any, entry: Any, linears: dict[int, str]) -> list[str]:
    """Returns the linear layers that every way from ``branch`` meets first."""
    names: list[str] = []
    seen: set[Any] = set()
    waiting = [branch]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() in PRODUCTS:
            names.append(_linear_name(node, linears))
        elif node is entry or "LayerNorm" in node.name():
            raise _unknown_structure(f"a branch goes through `{node.name()}`")
        elif node.name() == LEAF:
            if node.variable.dim() > 1:
                raise _unknown_structure("a branch ends in a weight that is in no `nn.Linear`")
        else:
            waiting += _children(node)
    return names


def _linear_name(product: Any, linears: dict[int, str]) -> str:
    """The linear layer whose transposed weight is a factor of ``product``."""
    for transposed in _children(product):
        for leaf in _children(transposed):
            if leaf.name() == LEAF and id(leaf.variable) in linears:
                return linears[id(leaf.variable)]
    raise _unknown_structure("a branch ends in a product that is no `nn.Linear`")


def _unknown_structure(what: str) -> CheckpointError:
    return CheckpointError(
        f"cannot make a new decoder layer the identity for this family: {what}",
        hint="train it with `adapter: {kind: lora}`, or expand a model of another family",
    )
