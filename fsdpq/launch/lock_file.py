"""What a run was made of: versions, commit, hardware, inputs. For ``run.lock.json``."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import fsdpq
from fsdpq.recipe.load import LoadedRecipe
from fsdpq.recipe.root import Recipe

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "hqq", "safetensors", "tokenizers", "numpy",
    "huggingface-hub", "pydantic", "hydra-core", "pyyaml",
)  # fmt: skip


def describe_run(
    loaded: LoadedRecipe,
    recipe: Recipe,
    *,
    gpus: Sequence[str],
    inputs: dict[str, Any],
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Returns the content of ``run.lock.json``.

    Args:
        loaded: the recipe as given.
        recipe: the same, resolved.
        gpus: the GPUs that the run may use.
        inputs: ``model`` and ``data`` as the fetch room describes them, and ``base``, the quantized
            base, where the ranks load one.
        trust_remote_code: whether the ranks may run code of the model; a record, not a permission.
    """
    return {
        "fsdpq": fsdpq.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "git": describe_checkout(loaded.base_dir),
        "recipe": str(loaded.path),
        "fragments": [str(path) for path in loaded.fragments],
        "overrides": list(loaded.overrides),
        "trust_remote_code": trust_remote_code,
        "world_size": recipe.launch.nproc_per_node,
        "seed": recipe.training.seed,
        "hardware": {
            "gpus": list(gpus),
            "num_cpus": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "inputs": inputs,
    }


def describe_checkout(directory: Path) -> dict[str, Any] | None:
    """Returns commit and dirty flag of the git checkout around ``directory``, None without one."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(directory, "status", "--porcelain"))}


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path, *arguments: str) -> str | None:
    # The checkout may be a stranger's: its own configuration must not start programs.
    safe = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    try:
        done = subprocess.run(
            ["git", *safe, "-C", str(directory), *arguments],  # noqa: S607
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
