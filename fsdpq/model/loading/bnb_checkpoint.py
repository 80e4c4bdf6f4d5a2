"""Loads 4-bit weights of bitsandbytes as they are stored: nothing is quantized again.

The codes and scales of a matrix are flat in the checkpoint and row-major here, so a rank's rows are
one range of bytes. What the checkpoint keeps unquantized stays unquantized, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fsdpq.dist import own_shard
from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.expansion import source_name
from fsdpq.model.loading.bnb_files import BnbFiles, raise_all
from fsdpq.model.loading.checkpoint_names import map_names
from fsdpq.model.loading.source import copy_rows, open_tensors, row_reader
from fsdpq.model.loading.targets import LoadingTarget, loading_targets, packed_shards
from fsdpq.model.quantized_linear import PackedMatrix, QuantizedLinear
from fsdpq.model.structure import named_linears
from fsdpq.protocols import Quantizer
from fsdpq.recipe.sections.quantization import BnbOptions

UNQUANTIZED_HINT = "name the unquantized repository in `model.name_or_path`"


def swap_stored_linears(model: CausalLM, quantizer: Quantizer, directory: Path) -> None:
    """Replaces the linears of the decoder layers that ``directory`` holds quantized, in place.

    Raises:
        CheckpointError: such a linear is trained, or is to stay unquantized, or there is none.
    """
    files = BnbFiles(directory)
    known = dict(model.hf.named_parameters(remove_duplicate=False))
    sources, _ = map_names(model.hf, files.names, dict.fromkeys(known, True))
    stored = {
        name
        for name, groups in sources.items()
        if any(source in files.matrices for group in groups for source in group)
    }
    num_swapped = 0
    for name, parent, attribute, linear in list(named_linears(model.decoder_layers)):
        if source_name(model, f"{model.layers_prefix}{name}.weight") not in stored:
            continue
        if linear.weight.requires_grad:
            raise CheckpointError(
                f"`{name}` is to be trained, and {directory} holds it quantized",
                hint=UNQUANTIZED_HINT,
            )
        setattr(parent, attribute, QuantizedLinear(linear, quantizer=quantizer))
        num_swapped += 1
    if not num_swapped:
        raise CheckpointError(
            f"{directory} says in its config.json that its weights are 4-bit, and holds no "
            "quantized linear of a decoder layer",
            hint="download the model again, or delete `quantization_config` from config.json",
        )


class BnbCheckpointSource:
    """A checkpoint of transformers with 4-bit weights of bitsandbytes, a `BaseSource`.

    Args:
        model: whose base it is; on meta, made with `swap_stored_linears`.
        directory: the checkpoint.
        options: what the recipe says of the quantization.
        tables: the library's own ``quant_map`` and ``nested_quant_map``, fp32, on the host.
        device: unquantized rows go there.

    Attributes:
        notice: what of the decoder layers stays unquantized, empty where nothing does.

    Raises:
        CheckpointError: names, shapes or the quantization do not fit, or a file is damaged.
    """

    def __init__(
        self,
        model: CausalLM,
        directory: Path,
        *,
        options: BnbOptions,
        tables: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self._model = model
        self._device = device
        self._files = BnbFiles(directory)
        self._files.check_format(options, tables)
        self._tensors = open_tensors(model, self._files)
        self._check_packed_as_stored()
        self.notice = _unquantized_notice(model, options)

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills this rank's rows of one target; see `BaseSource`.

        Memory: the rank's rows of the target.
        """
        name = source_name(self._model, name)
        if not isinstance(target, PackedMatrix):
            read = row_reader(self._tensors, name, target, dtype=target.dtype, device=self._device)
            copy_rows(read, own_shard(target))
            return
        [stored] = self._tensors.sources(name)
        for part, shard in packed_shards(target).items():
            width = shard.rows.shape[1]
            if shard.start < shard.stop:
                start, stop = shard.start * width, shard.stop * width
                found = self._files.read_bytes(stored, part, start, stop)
                shard.rows.copy_(found.view(-1, width))

    def _check_packed_as_stored(self) -> None:
        wrong: list[str] = []
        for name, target in loading_targets(self._model).items():
            sources = self._tensors.sources(source_name(self._model, name))
            stored = [source for source in sources if source in self._files.matrices]
            if isinstance(target, PackedMatrix):
                if len(sources) > 1:
                    wrong.append(f"`{name}` is stored in {len(sources)} parts, each quantized")
            elif stored:
                wrong.append(f"`{stored[0]}` is quantized, and no linear of a decoder layer")
        raise_all(self._files.directory, wrong, hint=UNQUANTIZED_HINT)


def _unquantized_notice(model: CausalLM, options: BnbOptions) -> str:
    """Says what stays unquantized.

    Raises:
        CheckpointError: the recipe wants a linear unquantized that the checkpoint holds quantized.
    """
    layers = model.decoder_layers
    kept = options.modules_to_not_convert
    for name, module in layers.named_modules():
        plain = name.removesuffix(".base")
        if isinstance(module, QuantizedLinear) and any(f".{plain}".endswith(f".{k}") for k in kept):
            raise CheckpointError(
                f"`quantization.modules_to_not_convert` names `{plain}`, which the checkpoint "
                "holds quantized",
                hint="delete it from the recipe, or " + UNQUANTIZED_HINT,
            )
    linears = sum(isinstance(module, nn.Linear) for module in layers.modules())
    stacks = sum(parameter.dim() == 3 for parameter in layers.parameters())
    counts = ((linears, "linear layers"), (stacks, "stacks of experts"))
    words = [f"{count} {what}" for count, what in counts if count]
    if not words:
        return ""
    return f"the checkpoint keeps {' and '.join(words)} unquantized: they stay so"
