"""Checks a model directory on disk before any rank reads it.

A directory must hold what transformers and the streaming loader need: a config, whole safetensors
weights (every file that the index names, and every tensor in it), and a tokenizer. Pickles
(``*.bin``, ``*.pt``) are refused: loading them can run code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fsdpq.errors import FetchError
from fsdpq.fetch.cache import MANIFEST
from fsdpq.tensor_files.directory import (
    INDEX_NAME,
    PICKLE_HINT,
    check_directory,
    holds_pickles_only,
    pickles_only,
)
from fsdpq.tensor_files.header import join_problems

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
"""The files of a checkpoint that count, as glob patterns; never pickles or Python code."""

CODE_PATTERNS = ("*.py",)
"""Those that count too under ``--trust-remote-code``."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def checkpoint_files(directory: Path, *, with_code: bool = False) -> dict[str, Path]:
    """Returns the files that make up the model in ``directory``, by name.

    Args:
        directory: of the checkpoint.
        with_code: its Python files are part of it.

    Raises:
        FetchError: something is missing or damaged, or the weights are pickles only; names all of
            it.
    """
    patterns = (*ALLOW_PATTERNS, *(CODE_PATTERNS if with_code else ()))
    files = {path.name: path for pattern in patterns for path in directory.glob(pattern)}
    if holds_pickles_only(directory):
        raise FetchError(pickles_only(directory), hint=PICKLE_HINT)
    problems = [] if "config.json" in files else ["`config.json` is missing"]
    if not any(name in files for name in _TOKENIZERS):
        problems.append("a tokenizer (`tokenizer.json`) is missing")
    problems += check_directory(directory)[1]
    if problems:
        raise FetchError(
            join_problems(f"`{directory}` is not a whole model", problems),
            hint="complete the directory, or name a model of the hub (`org/name`)",
        )
    return files


def copy_model_files(source: Path, target: Path, *, with_code: bool = False) -> None:
    """Copies all that makes a model beside its weights: config, tokenizer, chat template.

    Args:
        source: directory of the checkpoint.
        target: directory that holds other weights; files that it has already stay.
        with_code: copy the Python files too.
    """
    for name, path in checkpoint_files(source, with_code=with_code).items():
        is_weights = name.endswith(".safetensors") or name == INDEX_NAME
        if not is_weights and name != MANIFEST and not (target / name).exists():
            shutil.copyfile(path, target / name)
