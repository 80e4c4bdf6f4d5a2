"""Which category an allocation is: by the module that runs, by its owner, by the graph's node.

Forward and recomputation run modules: hooks keep a stack of what is running. Backward runs nodes of
the graph: a node's allocations count as those of the operator that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdpq.dist import Shard, own_shard
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.plan.result import Category
from fsdpq.protocols import Quantizer, RowReader
from fsdpq.worker.plan_trace.tracker import Tracker

POST_BACKWARD = "RegisterPostBackwardFunctionBackward"
"""The node in which FSDP2 reduces the gradients of a group (torch 2.13)."""


class NotedQuantizer:
    """A quantizer whose dequantized matrices are noted as such.

    Args:
        quantizer: does the work.
        tags: are told.
    """

    def __init__(self, quantizer: Quantizer, tags: Tags) -> None:
        self._quantizer, self._tags = quantizer, tags
        self.modules_to_not_convert = quantizer.modules_to_not_convert

    def packed_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
        """See `fsdpq.protocols.Quantizer`."""
        return self._quantizer.packed_shapes(out_features, in_features)

    def quantize_shards(
        self, read: RowReader, shape: tuple[int, int], shards: Mapping[str, Shard]
    ) -> None:
        """See `fsdpq.protocols.Quantizer`."""
        self._quantizer.quantize_shards(read, shape, shards)

    def dequantize(
        self, packed: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """See `fsdpq.protocols.Quantizer`."""
        with self._tags.inside("dequantized"):
            return self._quantizer.dequantize(packed, shape, dtype)

    def dequantize_rows(
        self,
        packed: Mapping[str, Tensor],
        shape: tuple[int, int],
        start: int,
        stop: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """See `fsdpq.protocols.Quantizer`."""
        with self._tags.inside("dequantized"):
            return self._quantizer.dequantize_rows(packed, shape, start, stop, dtype)


class Tags:
    """What runs now.

    Attributes:
        default: category of what no module and no node claims.
        where: the decoder layer that ran last, for people.
    """

    def __init__(self) -> None:
        self._stack: list[Category] = []
        self._nodes: dict[int, Category] = {}
        self.default: Category = "recomputed"
        self.where = ""

    @contextmanager
    def inside(self, category: Category) -> Iterator[None]:
        """Counts what is allocated inside as ``category``."""
        self._stack.append(category)
        try:
            yield
        finally:
            self._stack.pop()

    def category(self) -> Category:
        """Returns the category of an allocation now."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return self.default
        if type(node).__name__ == POST_BACKWARD:
            return "communication"
        return self._nodes.get(node._sequence_nr(), "recomputed")

    def node_made(self) -> None:
        """Remembers what the newest node of the graph belongs to."""
        if not torch.is_grad_enabled() and not self._stack:
            return
        number = _get_sequence_nr() - 1
        if number not in self._nodes:
            owner = self.default
            for claim in self._stack:
                owner = owner if claim == "dequantized" else claim
            self._nodes[number] = owner

    def watch(self, model: CausalLM, tracker: Tracker) -> None:
        """Sets the hooks on a sharded model, before it first runs.

        Args:
            model: with memory.
            tracker: changes the category of what a hook sees.
        """
        for module in model.modules():
            if isinstance(module, PackedMatrix):
                module.quantizer = NotedQuantizer(module.quantizer, self)
            if module is model.head:
                module.register_forward_pre_hook(lambda *_: self._note("the loss"))
                self._claim(module, "loss")
        for index, layer in enumerate(model.decoder_layers):
            self._watch_layer(index, layer, tracker)
        # The last norm and what the head is given belong to the loss.
        model.decoder_layers[0].register_forward_pre_hook(lambda *_: self._default("recomputed"))
        model.decoder_layers[-1].register_forward_hook(lambda *_: self._default("loss"))
        tag_parameters(model, tracker)
        _watch_gradients(model, tracker)

    def _watch_layer(self, index: int, layer: nn.Module, tracker: Tracker) -> None:
        run = getattr(layer, "layer_run", None)

        def enter(_layer: nn.Module, args: Any) -> None:
            self._note(f"layer {index + 1}")
            if run is not None and run.recompute and args:
                tracker.retag(args[0], "layer_inputs")

        layer.register_forward_pre_hook(enter)
        for name, child in layer.named_children():
            is_attention = "attn" in name or "attention" in name
            child.register_forward_pre_hook(lambda *_: self._note(f"layer {index + 1}"))
            self._claim(child, "attention" if is_attention and list(child.children()) else None)
            for grandchild in child.children() if is_attention else ():
                self._claim(grandchild, "recomputed")

    def _default(self, category: Category) -> None:
        self.default = category

    def _note(self, where: str) -> None:
        self.where = where

    def _claim(self, module: nn.Module, category: Category | None) -> None:
        """Counts what ``module`` allocates in its forward as ``category``, None as usual."""
        claimed: Category = category or "recomputed"
        module.register_forward_pre_hook(lambda *_: self._stack.append(claimed))
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        if self._stack:
            self._stack.pop()


def tag_parameters(model: CausalLM, tracker: Tracker) -> None:
    """Gives the shards of all Parameters, and buffers, their categories."""
    kinds: dict[int, Category] = {}
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            for name in module.packed_names:
                kinds[id(getattr(module, name))] = "codes" if name == "codes" else "scales"
    for parameter in model.parameters():
        plain: Category = "trained" if parameter.requires_grad else "plain"
        tracker.retag(own_shard(parameter).rows, kinds.get(id(parameter), plain))
    for buffer in model.buffers():
        tracker.retag(buffer, "plain")


def _watch_gradients(model: CausalLM, tracker: Tracker) -> None:
    """Counts gradients as such from the moment when they are whole, sharded or not."""

    def note(parameter: Tensor) -> None:
        tracker.retag(parameter.grad, "gradients")

    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # From the inside out: the Parameters of an outer group are none of its inner ones.
    known: set[int] = set()
    for group in reversed(groups):
        group.unshard()  # the Parameters that autograd knows are the gathered ones
        module = cast("nn.Module", group)
        own = [p for p in module.parameters() if id(p) not in known]
        known |= {id(p) for p in own}
        tracker.watch_gathered([p for p in own if not isinstance(p, DTensor)])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)
    for group in groups:
        group.reshard()
