"""Tensors that exist, whoever holds them."""

from __future__ import annotations

import gc

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def alive_tensors() -> list[Tensor]:
    """Returns all tensors of this process, without those that lie in cycles nobody holds.

    Nor those without memory, which ``torch.compile`` traces with. By type: ``isinstance`` would ask
    objects that stand for others, some of which are gone.
    """
    gc.collect()
    kinds = ((each, type(each)) for each in gc.get_objects())
    return [
        each
        for each, kind in kinds
        if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor | FunctionalTensor)
    ]
