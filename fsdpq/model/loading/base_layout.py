"""The tensors of a model as a quantized base holds them.

Where they lie in its file is `fsdpq.tensor_files.base_layout`'s.
"""

from __future__ import annotations

from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.checkpoint_files import DTYPES
from fsdpq.model.loading.targets import LoadingTarget, full_shape, loading_targets
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.tensor_files.base_layout import BaseLayout, StoredTensor, lay_out

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What safetensors calls the dtypes that a model's tensors have."""


def packed_name(name: str, packed: str) -> str:
    """Returns the name in the file of one byte tensor of the target ``name``."""
    return f"{name}.{packed}"


def target_tensors(name: str, target: LoadingTarget) -> dict[str, StoredTensor]:
    """Returns what one target of a model is in the file: byte tensors, or a plain tensor."""
    if not isinstance(target, PackedMatrix):
        return {name: StoredTensor(DTYPE_NAMES[target.dtype], full_shape(target))}
    shapes = target.quantizer.packed_shapes(target.out_features, target.in_features)
    return {
        packed_name(name, packed): StoredTensor("U8", shape) for packed, shape in shapes.items()
    }


def plan_layout(model: CausalLM) -> BaseLayout:
    """Returns where the tensors of ``model`` go, the same for any number of ranks.

    Args:
        model: with the layers of its checkpoint; on meta is enough.
    """
    specs: dict[str, StoredTensor] = {}
    for name, target in loading_targets(model).items():
        specs |= target_tensors(name, target)
    return lay_out(specs)
