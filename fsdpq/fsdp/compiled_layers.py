"""Decoder layers compiled by ``torch.compile``, each kind of layer once.

What is compiled is the layer's own forward, innermost: gathers, chunks, checkpoints and copies to
the host stay outside (`fsdpq.fsdp.layers`). All layers of a kind share one class and one compiled
function, and so their graphs: dynamo's guards look at the class. Quantized linears are operators of
their own (`fsdpq.model.compiled_product`); quantized experts run as they are.

Generation runs uncompiled: its shapes change with every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BACKEND = "inductor"
"""What layers are compiled with; tests take ``aot_eager``, which makes the same graphs sooner."""

MAX_GRAPHS = 64
"""Graphs of one kind of layer, not torch's 8, beyond which layers run uncompiled without a word.

Lengths cost two: the first, and one for all others. So do frozen and trained inputs, training and
evaluation, each attention type, with a mask and without.
"""


class RunsCompiled(nn.Module):
    """What is put in front of a decoder layer's class."""

    compiled_forward: Callable[..., Any]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer on ``hidden``, ``(rows, tokens, hidden)``."""
        if kwargs.get("past_key_values") is not None:
            return super().forward(hidden, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return self.compiled_forward(hidden, *args, **kwargs)


def apply_compile(layers: Sequence[nn.Module]) -> None:
    """Makes decoder layers run compiled, in place; before they run in chunks and are sharded.

    Nothing is compiled yet: a graph is made when a layer first meets its shapes.
    """
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    for layer in layers:
        layer.__class__ = _compiled_class(type(layer), BACKEND)


@functools.cache
def _compiled_class(kind: type[nn.Module], backend: str) -> type[nn.Module]:
    compiled = torch.compile(kind.forward, backend=backend)
    return type(f"Compiled{kind.__name__}", (RunsCompiled, kind), {"compiled_forward": compiled})
