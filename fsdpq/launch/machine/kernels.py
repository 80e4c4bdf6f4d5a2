"""What attention kernels and compiled layers need of this machine, without torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from fsdpq.errors import EnvironmentProblemError
from fsdpq.recipe.root import Recipe

CXX_COMPILERS = ("g++",)
"""What torch's inductor calls on Linux where ``CXX`` says nothing (2.13, ``config.cpp.cxx``)."""

C_COMPILERS = ("clang", "gcc")
"""What Triton calls where ``CC`` says nothing (3.9, ``runtime/build.py``)."""


def check_kernels(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> None:
    """Checks that this machine can run the recipe's attention, kernels and compiled layers.

    Args:
        recipe: resolved: its device is ``cuda`` or ``cpu``.
        environ: says where compilers are.

    Raises:
        EnvironmentProblemError: it needs a GPU or a compiler that is not there.
    """
    on_cpu = recipe.launch.device == "cpu"
    attention = recipe.model.attn_implementation
    needs_gpu: list[tuple[str, str]] = []
    if attention in ("flash_attention_2", "flex_attention"):
        needs_gpu.append((f"attn_implementation: {attention}", "model.attn_implementation=sdpa"))
    if recipe.model.use_liger_kernel:
        needs_gpu.append(("use_liger_kernel: true", "model.use_liger_kernel=false"))
    if on_cpu and needs_gpu:
        settings = " and ".join(f"`{setting}`" for setting, _ in needs_gpu)
        message = f"{settings} cannot be trained with on a CPU, and this machine shows no GPU"
        overrides = " ".join(override for _, override in needs_gpu)
        raise EnvironmentProblemError(message, hint=f"add `{overrides}` to the command line")
    if recipe.training.compile:
        _check_compiler("training.compile: true", "training.compile=false", on_cpu, environ)
    if attention == "flex_attention":
        _check_compiler(
            "attn_implementation: flex_attention", "model.attn_implementation=sdpa", on_cpu, environ
        )


def _check_compiler(setting: str, override: str, on_cpu: bool, environ: Mapping[str, str]) -> None:
    """Looks for what torch compiles with: C++ for a CPU; Triton's launchers are C."""
    variable, names = ("CXX", CXX_COMPILERS) if on_cpu else ("CC", C_COMPILERS)
    chosen = environ.get(variable)
    candidates = (chosen,) if chosen else names
    if any(shutil.which(name, path=environ.get("PATH")) for name in candidates):
        return
    language = "C++" if on_cpu else "C"
    found = f"`{variable}` names `{chosen}`" if chosen else f"looked for {' and '.join(names)}"
    message = f"`{setting}` needs a {language} compiler, and there is none ({found})"
    hint = f"install one (`apt install g++`), or add `{override}` to the command line"
    raise EnvironmentProblemError(message, hint=hint)
