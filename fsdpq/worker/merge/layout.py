"""Which tensors a merged model consists of, and their names: those of its base's checkpoint.

transformers renames weights while it loads and stacks those of experts; written under the
checkpoint's own names and shapes, the merged model loads wherever its base does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fsdpq.checkpoint.tensor_stream import TensorSpec
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.checkpoint_files import CheckpointFiles
from fsdpq.model.loading.targets import full_shape, loading_targets
from fsdpq.worker.merge.bases import StoredRows, matrix_rows


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the merged model.

    Attributes:
        spec: its name, dtype and shape in the file.
        weight: of the model, by its name in transformers.
        start: its first row among those of the weight.
    """

    spec: TensorSpec
    weight: str
    start: int

    @property
    def stop(self) -> int:
        """After its last row among those of the weight."""
        return self.start + matrix_rows(self.spec.shape)


def weight_shapes(model: CausalLM) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all weights, by their names in transformers."""
    return {name: full_shape(target) for name, target in loading_targets(model).items()}


def plan_tensors(
    model: CausalLM, stored: StoredRows | None, dtype: torch.dtype
) -> list[WrittenTensor]:
    """Returns the tensors to write, in the order of the model.

    Args:
        model: on meta, made as for training.
        stored: the base's checkpoint; None names the tensors as transformers does.
        dtype: of floating-point tensors. What the checkpoint keeps in another dtype than most of
            itself (a router's bias in fp32) keeps it.
    """
    usual = None if stored is None else usual_dtype(stored.files)
    grown = model.layer_sources != tuple(range(len(model.layer_sources)))
    planned: list[WrittenTensor] = []
    for name, target in loading_targets(model).items():
        own = target.dtype if isinstance(target, torch.Tensor) else dtype
        if stored is None or grown:
            kept = own if not own.is_floating_point else dtype
            planned.append(WrittenTensor(TensorSpec(name, kept, full_shape(target)), name, 0))
            continue
        start = 0
        for source in stored.sources(name):
            shape, found = stored.files.shape(source), stored.files.dtype(source)
            is_usual = found in (usual, torch.uint8) and own.is_floating_point
            spec = TensorSpec(source, dtype if is_usual else found, shape)
            planned.append(WrittenTensor(spec, name, start))
            start += matrix_rows(shape)
    return planned


def usual_dtype(files: CheckpointFiles) -> torch.dtype:
    """Returns the floating-point dtype that most weights of a checkpoint are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for name in files.names:
        if files.dtype(name).is_floating_point:
            counts[files.dtype(name)] += torch.Size(files.shape(name)).numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def sizes(planned: list[WrittenTensor]) -> Mapping[str, int]:
    """Returns the bytes of each tensor, by its name in the file."""
    return {tensor.spec.name: tensor.spec.num_bytes for tensor in planned}
