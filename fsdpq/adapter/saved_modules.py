"""``adapter.modules_to_save``: modules of the base that are trained whole beside an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fsdpq.adapter.masters import make_trainable
from fsdpq.errors import Problem, RecipeError

KEY = "adapter.modules_to_save"


def unfreeze_modules(hf: nn.Module, patterns: Sequence[str], *, master_dtype: torch.dtype) -> None:
    """Makes the modules whose names end in one of ``patterns`` trainable, in place.

    Args:
        hf: the transformers model on meta, frozen.
        patterns: last parts of dotted names.
        master_dtype: of trained weights.

    Raises:
        RecipeError: a pattern names nothing that has weights, or a module whose weight is also
            that of a module that stays frozen.
    """
    trained: list[str] = []
    for pattern in patterns:
        found = [
            (name, module)
            for name, module in hf.named_modules(remove_duplicate=False)
            if name == pattern or name.endswith(f".{pattern}")
        ]
        parameters = [parameter for _, module in found for parameter in module.parameters()]
        if not parameters:
            known = sorted({name.rpartition(".")[2] for name, _ in hf.named_modules() if name})
            _refuse(
                f"the model has no module `{pattern}` with weights",
                f"its modules end in {', '.join(n for n in known if not n.isdigit())}",
            )
        trained += [name for name, _ in found]
        for parameter in parameters:
            make_trainable(parameter, master_dtype=master_dtype)
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        is_saved = any(name.startswith(f"{module}.") for module in trained)
        if parameter.requires_grad and not is_saved:
            module = name.rpartition(".")[0]
            _refuse(
                f"the model's `{module}` shares its weight with a module that is named",
                f"name `{module.rpartition('.')[2]}` too, or neither",
            )


def _refuse(message: str, hint: str) -> None:
    raise RecipeError([Problem(f"`{KEY}`: {message}", KEY, hint=hint)])
