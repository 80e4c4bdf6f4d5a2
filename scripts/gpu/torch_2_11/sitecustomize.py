"""Lets fsdpq run on torch 2.11, to measure on a machine that has nothing newer.

Put this directory first on ``PYTHONPATH``: Python imports it at the start of every process, ranks
too. The product asks for torch >= 2.13 and is not changed by this. What is put into torch's modules
as they are imported:

- FSDP2 makes Parameters of integers without ``requires_grad=True``, as torch >= 2.12 does
  (https://github.com/pytorch/pytorch/pull/177844). Nothing here sets ``param_dtype`` for them.
- the name ``ShardPlacementResult``, which only groups of two dtypes of trained weights use;
- ``FSDPState._fsdp_param_groups``, of which torch 2.11 has at most one;
- ``all_gather_single``, torch 2.13's name of ``all_gather_into_tensor``.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _patch_common(module: ModuleType) -> None:
    fields = [("placement", Any), ("mesh_info", Any)]
    module.ShardPlacementResult = dataclasses.make_dataclass("ShardPlacementResult", fields)


def _patch_param(module: ModuleType) -> None:
    nn = module.nn

    class IntegersAreFrozen(nn.Parameter):
        def __new__(cls, data: Any, requires_grad: bool | None = None) -> Any:
            wanted = data.is_floating_point() if requires_grad is None else requires_grad
            return nn.Parameter(data, requires_grad=wanted)

    names = ModuleType("torch.nn")
    names.__dict__.update(nn.__dict__ | {"Parameter": IntegersAreFrozen})
    module.nn = names


def _patch_state(module: ModuleType) -> None:
    groups = property(lambda self: [each for each in (self._fsdp_param_group,) if each])
    module.FSDPState._fsdp_param_groups = groups


def _patch_distributed(module: ModuleType) -> None:
    module.all_gather_single = module.all_gather_into_tensor


_FULLY_SHARD = "torch.distributed.fsdp._fully_shard"
PATCHES: dict[str, Callable[[ModuleType], None]] = {
    f"{_FULLY_SHARD}._fsdp_common": _patch_common,
    f"{_FULLY_SHARD}._fsdp_param": _patch_param,
    f"{_FULLY_SHARD}._fsdp_state": _patch_state,
    "torch.distributed": _patch_distributed,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as Python does, and runs their patch once they are executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        patch = PATCHES.get(fullname)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if importlib.metadata.version("torch").startswith("2.11."):
    sys.meta_path.insert(0, _Finder())
