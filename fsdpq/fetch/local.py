"""Checks a model directory on disk before any rank reads it.

A directory must hold what transformers and the streaming loader need: a config, safetensors weights
(every shard that the index names), and a tokenizer. Pickle checkpoints (``*.bin``, ``*.pt``) are
refused: loading them can run code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fsdpq.errors import FetchError

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
"""The files of a checkpoint that count, as glob patterns; never pickles or Python code."""

CODE_PATTERNS = ("*.py",)
"""Those that count too under ``--trust-remote-code``."""

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PICKLE_HINT = (
    "pickle files can run code; convert them once on a machine where you trust them: "
    "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_INDEX = "model.safetensors.index.json"


def checkpoint_files(directory: Path, *, with_code: bool = False) -> dict[str, Path]:
    """Returns the files that make up the model in ``directory``, by name.

    Args:
        directory: of the checkpoint.
        with_code: its Python files are part of it.

    Raises:
        FetchError: something is missing, or the weights are pickles only; names all of it.
    """
    patterns = (*ALLOW_PATTERNS, *(CODE_PATTERNS if with_code else ()))
    files = {path.name: path for pattern in patterns for path in directory.glob(pattern)}
    missing = [] if "config.json" in files else ["`config.json`"]
    if not any(name in files for name in _TOKENIZERS):
        missing.append("a tokenizer (`tokenizer.json`)")
    if _INDEX in files:
        missing += [f"`{name}`" for name in _indexed_shards(files[_INDEX]) if name not in files]
    elif not any(name.endswith(".safetensors") for name in files):
        if any(any(directory.glob(pattern)) for pattern in PICKLE_PATTERNS):
            raise FetchError(
                f"`{directory}` holds pickle weights only, no safetensors", hint=PICKLE_HINT
            )
        missing.append("weights (`*.safetensors`)")
    if missing:
        raise FetchError(
            f"`{directory}` is not a whole model, it lacks {', '.join(missing)}",
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
        is_weights = name.endswith(".safetensors") or name == _INDEX
        if not is_weights and not (target / name).exists():
            shutil.copyfile(path, target / name)


def _indexed_shards(index: Path) -> list[str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise FetchError(
            f"`{index}` cannot be read: {error}", hint="fetch the checkpoint again"
        ) from error
