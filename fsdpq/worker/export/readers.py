"""Where whole tensors of a model come from, by their names in transformers, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from fsdpq.model.config import read_config
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.model.loading.checkpoint_names import ModelTensors
from fsdpq.worker.export.streamed import Read, build_stock_model, model_slots


def checkpoint_reader(
    directory: Path,
    *,
    config: PreTrainedConfig | None = None,
    only: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Read:
    """Returns what reads the tensors of a checkpoint, under the names that transformers loads.

    Experts that lie apart in the files are stacked as the model has them.

    Memory: a tensor at a time, on the host, in the dtype of its file.

    Args:
        directory: holds safetensors.
        config: of the model, None for that of ``directory``.
        only: the names that the directory holds; None is all.
        trust_remote_code: run the model class that the config names as Python code.

    Raises:
        CheckpointError: names or shapes do not fit, or a file is damaged.
    """
    config = config or read_config(directory, trust_remote_code=trust_remote_code)
    hf = build_stock_model(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    slots = list(model_slots(hf))
    shapes = {slot.name: tuple(slot.empty.shape) for slot in slots}
    wanted = shapes if only is None else {name: shapes[name] for name in only}
    ignored = {slot.path for slot in slots} - wanted.keys()
    tensors = ModelTensors(CheckpointFiles(directory), hf, wanted, ignored=ignored)

    def read(name: str) -> Tensor:
        return tensors.read_rows(name, 0, (*wanted[name], 1)[0])

    return read
