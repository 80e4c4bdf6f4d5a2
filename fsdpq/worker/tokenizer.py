"""Loads what the data needs of a model: its tokenizer, and how long its context is."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fsdpq.errors import Problem, RecipeError
from fsdpq.model.config import explained_remote_code, read_config


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the checkpoint's tokenizer.

    Raises:
        CheckpointError: it is code of the model's authors, and nobody said to trust it.
    """
    with explained_remote_code(model_dir):
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code)


def check_context(seq_len: int, model_dir: Path, *, trust_remote_code: bool = False) -> None:
    """Raises `RecipeError` where rows may be longer than the model was made for."""
    config = read_config(model_dir, trust_remote_code=trust_remote_code).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        message = f"`data.seq_len` is {seq_len}, the model's context is {longest} tokens"
        hint = f"use data.seq_len={longest} or less"
        raise RecipeError([Problem(message, "data.seq_len", None, hint)])
