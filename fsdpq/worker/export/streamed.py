"""A stock transformers model whose weights are in memory only while they are used.

It judges what others will load: the model is transformers' own class, built on meta, and a layer's
weights are read when its forward begins and dropped when that ends. One layer at a time is in
memory, so that a model of any size answers on a small machine; every forward reads the whole model
once, so that a batch of rows costs about as much as one row. Where the weights come from is the
caller's: files (`fsdpq.worker.export.readers`), or shards of ranks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.buffers import recompute_buffers
from fsdpq.model.structure import find_decoder_layers

Read = Callable[[str], Tensor]
"""Returns a whole tensor by its name in transformers, tied ones by their first name; in any dtype,
on any device."""


@dataclass(frozen=True)
class Slot:
    """A place for a tensor of the model.

    Attributes:
        owner: the module that has it.
        attribute: its name there.
        path: its name in transformers.
        name: the same; of tied weights that of the first.
        empty: the tensor on meta, in the dtype and shape that the model computes with.
    """

    owner: nn.Module
    attribute: str
    path: str
    name: str
    empty: Tensor

    def put(self, tensor: Tensor) -> None:
        """Puts ``tensor`` in this place."""
        is_parameter = isinstance(self.empty, nn.Parameter)
        home: dict[str, Any] = self.owner._parameters if is_parameter else self.owner._buffers
        if is_parameter and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        home[self.attribute] = tensor


class StreamedModel:
    """A causal language model of transformers that reads its weights while it computes.

    Memory: one decoder layer, or the embedding or head; activations of one layer.

    Args:
        config: of the model; not changed.
        read: where its weights come from. Called in the order in which the model uses them.
        device: where it computes.
        dtype: in which it computes; `PreTrainedModel._keep_in_fp32_modules_strict` stay fp32.
        attn_implementation: attention code path of transformers, None for its own choice.
        trust_remote_code: run the model class that the config names as Python code.
        wrap: returns a model around the one that it is given, whose own weights are in memory: a
            PEFT model. What it is given has the right shapes and dtypes, zeros and no memory.

    Attributes:
        module: the model, or what ``wrap`` made around it; in eval mode.

    Raises:
        CheckpointError: the architecture has no decoder layers that can be told from the rest, or
            what ``wrap`` added has no values.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        read: Read,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        wrap: Callable[[PreTrainedModel], nn.Module] = lambda hf: hf,
    ) -> None:
        self._read = read
        self._device = torch.device(device)
        self._positions: Tensor | None = None
        hf = build_stock_model(
            config, dtype=dtype, attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        _fill_computed_buffers(hf, self._device)
        slots = list(model_slots(hf))
        layers = list(find_decoder_layers(hf))
        with _stand_ins(slots):
            self.module = wrap(hf).eval()
        _check_has_values(self.module, slots)
        _move_own(self.module, self._device)
        for module, own in _group_by_module(slots, layers):
            module.register_forward_pre_hook(self._loading(own))
            module.register_forward_hook(_dropping(own), always_call=True)
        # Asked for only now: a head that is wrapped is another module, and the one that is called.
        hf.get_output_embeddings().register_forward_pre_hook(self._keep_positions)  # pyright: ignore

    @torch.no_grad()
    def logits(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns logits as transformers gives them, scaled and capped where the family does so.

        Args:
            input_ids: ``(rows, tokens)``, int64; no padding that later tokens could see.
            positions: which tokens' logits to compute, ``(kept,)``, int64, the same in every row;
                None is all.

        Returns:
            ``(rows, kept, vocabulary)`` on the model's device.
        """
        self._positions = None if positions is None else positions.to(self._device)
        return self.module(input_ids=input_ids.to(self._device), use_cache=False).logits

    def _loading(self, slots: list[Slot]) -> Callable[..., None]:
        def load(_module: nn.Module, _args: Any) -> None:
            for slot in slots:
                tensor = self._read(slot.name)
                if tensor.shape != slot.empty.shape:
                    raise CheckpointError(
                        f"`{slot.name}` has shape {list(tensor.shape)}, the model needs "
                        f"{list(slot.empty.shape)}",
                        hint="weights and config.json are of two models",
                    )
                slot.put(tensor.to(self._device, slot.empty.dtype))

        return load

    def _keep_positions(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._positions is None:
            return args
        hidden, *others = args
        return (hidden.index_select(-2, self._positions), *others)


def build_stock_model(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Returns transformers' own model on meta, tied and frozen; ``config`` stays as it is."""
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    hf.tie_weights()
    hf.requires_grad_(False)
    _keep_in_fp32(hf)
    return hf.eval()


def model_slots(hf: PreTrainedModel) -> Iterator[Slot]:
    """Yields a place for every tensor that a checkpoint of the model holds, tied ones by each."""
    first: dict[int, str] = {}
    for prefix, module in hf.named_modules():
        persistent = module._buffers.keys() - module._non_persistent_buffers_set
        buffers = {name: module._buffers[name] for name in persistent}
        for attribute, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                path = f"{prefix}.{attribute}".lstrip(".")
                yield Slot(module, attribute, path, first.setdefault(id(tensor), path), tensor)


def _keep_in_fp32(hf: PreTrainedModel) -> None:
    """Casts what ``from_pretrained`` keeps in fp32, in place."""
    kept = [re.compile(pattern) for pattern in hf._keep_in_fp32_modules_strict or ()]
    for name, tensor in (*hf.named_parameters(), *hf.named_buffers()):
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()


def _fill_computed_buffers(hf: PreTrainedModel, device: torch.device) -> None:
    for module in hf.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    recompute_buffers(hf)


@contextmanager
def _stand_ins(slots: list[Slot]) -> Iterator[None]:
    """Puts zeros that share one element in the place of tensors on meta.

    PEFT moves what it loads to where the base's weights are.
    """
    zeros: dict[int, Tensor] = {}
    for slot in slots:
        if id(slot.empty) not in zeros:
            same = torch.zeros((), dtype=slot.empty.dtype).expand(slot.empty.shape)
            is_parameter = isinstance(slot.empty, nn.Parameter)
            zeros[id(slot.empty)] = (
                nn.Parameter(same, requires_grad=False) if is_parameter else same
            )
        slot.put(zeros[id(slot.empty)])
    yield
    for slot in slots:
        slot.put(slot.empty)


def _check_has_values(module: nn.Module, slots: list[Slot]) -> None:
    """Checks that all of ``module`` is in memory but for what is to be streamed."""
    streamed = {id(slot.empty) for slot in slots}
    tensors = (*module.named_parameters(), *module.named_buffers())
    left = [name for name, each in tensors if each.is_meta and id(each) not in streamed]
    if left:
        raise CheckpointError(
            f"{len(left)} tensors beside the base model's got no values: {', '.join(left[:3])}",
            hint="the adapter's files are not whole: write them again",
        )


def _move_own(module: nn.Module, device: torch.device) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def _group_by_module(
    slots: list[Slot], layers: list[nn.Module]
) -> Iterator[tuple[nn.Module, list[Slot]]]:
    """Yields modules and what they load: a decoder layer all of its own, others theirs alone."""
    layer_of = {id(part): layer for layer in layers for part in layer.modules()}
    owners: dict[int, tuple[nn.Module, list[Slot]]] = {}
    for slot in slots:
        module = layer_of.get(id(slot.owner), slot.owner)
        owners.setdefault(id(module), (module, []))[1].append(slot)
    yield from owners.values()


def _dropping(slots: list[Slot]) -> Callable[..., None]:
    def drop(_module: nn.Module, _args: Any, _output: Any) -> None:
        for slot in slots:
            slot.put(slot.empty)

    return drop
