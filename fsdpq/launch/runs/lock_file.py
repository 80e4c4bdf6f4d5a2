"""What a run was made of: recipe, versions, commit, hardware, inputs. For ``run.lock.json``.

``fsdpq reproduce`` runs a lock again, so the lock alone must do: the recipe is in it, resolved.
What every field means is in ``docs/guides/reproduce.md``.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import fsdpq
from fsdpq.fetch.hashes import hash_file, hash_of_hashes
from fsdpq.launch.machine.hardware import describe_hardware, numeric_environment
from fsdpq.launch.ranks.processes import worker_environment
from fsdpq.recipe.load import LoadedRecipe
from fsdpq.recipe.provenance import describe_sources
from fsdpq.recipe.root import Recipe

FORMAT = 1
"""Version of the lock's fields; locks of fsdpq 0.1.0 have none."""

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "hqq", "safetensors", "tokenizers", "numpy",
    "huggingface-hub", "pydantic", "hydra-core", "pyyaml", "accelerate", "datasets", "jinja2",
    "pyarrow", "liger-kernel", "flash-attn",
)  # fmt: skip
CUDA_PACKAGES = (
    "triton", "nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cublas",
    "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)  # fmt: skip
"""What a CUDA build of torch brings with it; those that are there are recorded."""


def describe_run(
    loaded: LoadedRecipe,
    recipe: Recipe,
    *,
    gpus: Sequence[str],
    inputs: dict[str, Any],
    trust_remote_code: bool = False,
    smoke: bool = False,
) -> dict[str, Any]:
    """Returns the content of ``run.lock.json``.

    Args:
        loaded: the recipe as given.
        recipe: the same, resolved.
        gpus: the GPUs that the run may use.
        inputs: ``model`` and ``data`` as the fetch room describes them, and ``base``, the quantized
            base, where the ranks load one.
        trust_remote_code: whether the ranks may run code of the model; a record, not a permission.
        smoke: whether the model and the rows are made up.
    """
    local_ranks = int(recipe.launch.nproc_per_node)
    num_ranks = local_ranks * recipe.launch.max_nodes
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fsdpq": fsdpq.__version__,
        "fsdpq_sha256": hash_code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "git": describe_checkout(loaded.base_dir),
        "recipe": str(loaded.path),
        "base_dir": str(loaded.base_dir.absolute()),
        "fragments": [str(path) for path in loaded.fragments],
        "overrides": list(loaded.overrides),
        "resolved": recipe.model_dump(mode="json"),
        "provenance": describe_sources(loaded, recipe, smoke=smoke),
        "smoke": smoke,
        "trust_remote_code": trust_remote_code,
        "world_size": num_ranks,
        "seed": recipe.training.seed,
        "environment": numeric_environment(worker_environment(num_ranks=local_ranks)),
        "hardware": describe_hardware(gpus),
        "inputs": inputs,
    }


def package_versions() -> dict[str, str | None]:
    """Returns the versions of the packages that compute, None for one that is not there."""
    return {name: _version_of(name) for name in PACKAGES} | _cuda_packages()


def hash_code() -> str:
    """Returns one hash over all of fsdpq's code, whatever version it says it is."""
    root = Path(fsdpq.__file__).parent
    paths = [path for path in root.rglob("*") if path.suffix in (".py", ".jinja", ".yaml")]
    files = {path.relative_to(root).as_posix(): path for path in paths}
    return hash_of_hashes({name: hash_file(path) for name, path in files.items()})


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Returns ``value`` where it is a mapping, else an empty one: a lock may be a stranger's."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """Returns ``value`` where it is a list, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def describe_checkout(directory: Path) -> dict[str, Any] | None:
    """Returns the state of the git checkout around ``directory``, None without one.

    Returns:
        ``commit``; ``dirty``, whether anything differs from it; ``diff_sha256``, one hash over the
        changes to files that git knows, None without any.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = _git(directory, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary")
    return {
        "commit": commit.strip(),
        "dirty": bool(_git(directory, "status", "--porcelain")),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }


def _cuda_packages() -> dict[str, str]:
    found = {name: _version_of(name) for name in CUDA_PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


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
            stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
