"""A base that is quantized already, as a source: no weight is quantized again.

Weights that a base does not hold as they are needed (trained ones start from the unquantized
original, in fp32) come from the checkpoint that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from fsdpq.dist import own_shard
from fsdpq.errors import CheckpointError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.expansion import source_name
from fsdpq.model.loading.base_file import BaseFile
from fsdpq.model.loading.base_layout import packed_name, target_tensors
from fsdpq.model.loading.mapped_base import MappedBase, parameter_modules
from fsdpq.model.loading.source import BaseSource
from fsdpq.model.loading.targets import LoadingTarget, loading_targets
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.tensor_files.base_layout import StoredTensor
from fsdpq.tensor_files.base_manifest import Key, is_base, key_differences, remedy


class QuantizedBaseSource:
    """Fills a model from a base's file; see `fsdpq.model.loading.source.BaseSource`.

    Opening it compares all names, dtypes and shapes, so that nothing is loaded where they do not
    fit.

    Args:
        model: whose base it is; on meta.
        directory: the base.
        key: what the base must be made from.
        open_original: returns the source of the unquantized weights; called only where trained
            weights need it.
        mapped: leave rows where they are in the file, as read-only pages of it, instead of copying
            them; the targets are on meta then.

    Attributes:
        mapped_base: the rows that stay in the file, None where they are copied.

    Raises:
        CheckpointError: the base is another one; says what differs.
        DamagedBaseError: it is not what was written.
    """

    def __init__(
        self,
        model: CausalLM,
        directory: Path,
        *,
        key: Key,
        open_original: Callable[[], BaseSource],
        mapped: bool = False,
    ) -> None:
        self._model = model
        self._file = BaseFile(directory)
        differences = key_differences(self._file.manifest.key, key)
        if differences:
            raise _foreign(directory, differences)
        targets = loading_targets(model)
        stored = {name: target for name, target in targets.items() if _is_stored(target)}
        differences = self._compare(stored)
        if differences:
            raise _foreign(directory, differences)
        self._original = open_original() if len(stored) < len(targets) else None
        modules = parameter_modules(model)
        self.mapped_base = MappedBase(self._file, modules) if mapped else None

    def fill(self, name: str, target: LoadingTarget) -> None:
        """Fills this rank's rows of one target; see `BaseSource`.

        Memory: one chunk of the file beside the target; the target itself is no memory of the
        process where it is mapped.
        """
        if self._original is not None and not _is_stored(target):
            self._original.fill(name, target)
            return
        for stored, parameter in self._tensors(name, target).items():
            if self.mapped_base is not None and isinstance(parameter, nn.Parameter):
                self.mapped_base.map_parameter(parameter, stored)
            else:
                self._file.copy_rows(stored, own_shard(parameter))

    def _tensors(self, name: str, target: LoadingTarget) -> dict[str, Tensor]:
        """Returns what of ``target`` one tensor of the file fills each."""
        name = source_name(self._model, name)
        if not isinstance(target, PackedMatrix):
            return {name: target}
        return {
            packed_name(name, packed): target.get_parameter(packed)
            for packed in target.packed_names
        }

    def _compare(self, targets: dict[str, LoadingTarget]) -> list[str]:
        """Returns in words which tensors of the file do not fit the model."""
        needed: dict[str, StoredTensor] = {}
        for name, target in targets.items():
            needed |= target_tensors(source_name(self._model, name), target)
        differences: list[str] = []
        for name, spec in needed.items():
            entry = self._file.entries.get(name)
            wanted = f"{spec.dtype} {list(spec.shape)}"
            if entry is None:
                differences.append(f"without `{name}`")
            elif f"{entry.dtype} {list(entry.shape)}" != wanted:
                found = f"{entry.dtype} {list(entry.shape)}"
                differences.append(f"with `{name}` as {found}, the model needs {wanted}")
        return differences


def _is_stored(target: LoadingTarget) -> bool:
    """Whether a base holds the target as it is needed: not where it is trained."""
    return isinstance(target, PackedMatrix) or not target.requires_grad


def _foreign(directory: Path, differences: list[str]) -> CheckpointError:
    shown = differences[:10] + ([f"and {len(differences) - 10} more"] * (len(differences) > 10))
    return CheckpointError(
        f"the base {directory} is of another model or recipe:\n  " + "\n  ".join(shown),
        hint=remedy(directory),
    )


def check_is_original(directory: Path) -> None:
    """Checks that a checkpoint is no quantized base, before its weights are trained.

    Raises:
        CheckpointError: it is one.
    """
    if is_base(directory):
        raise CheckpointError(
            f"{directory} is a quantized base, and this recipe trains weights of the model itself, "
            "which start from the unquantized ones",
            hint="name the unquantized model in `model.name_or_path`",
        )
