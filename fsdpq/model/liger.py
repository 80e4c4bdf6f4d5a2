"""Liger's fused kernels inside a transformers model; the only importer of ``liger_kernel``.

Liger replaces methods of norms and feed-forwards, and functions of the family's module in
transformers: all models of that family in this process run them. Projections are called as the
modules they are, so quantized and adapted ones stay. Its losses are left out: they need the head's
weight beside whole hidden states, where `fsdpq.model.chunked_loss` drops positions without loss
first (https://github.com/linkedin/Liger-Kernel, 0.8.5, ``transformers/monkey_patch.py``).

It is applied before linears and experts are replaced: it would put its own forward, which reads
plain weights, into quantized experts.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from fsdpq.errors import CheckpointError, MissingDependencyError


def apply_liger_kernels(hf: PreTrainedModel) -> None:
    """Makes norms, rotary embedding and feed-forwards of ``hf`` run Liger's kernels, in place.

    Raises:
        MissingDependencyError: liger-kernel is not installed.
        CheckpointError: it has no kernels for the family.
    """
    try:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            _apply_liger_kernel_to_instance,
        )
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"`model.use_liger_kernel: true` needs the package `liger-kernel`: {error}",
            hint="pip install 'fsdpq[liger]'",
        ) from error
    family = hf.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise CheckpointError(
            f"Liger has no kernels for models of type `{family}`",
            hint="add `model.use_liger_kernel=false` to the command line",
        )
    _apply_liger_kernel_to_instance(model=hf, cross_entropy=False, fused_linear_cross_entropy=False)
