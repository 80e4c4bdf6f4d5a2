"""Reads a checkpoint's configuration, and says in plain words when that would run foreign code.

Light: no model is built, so what needs the tokenizer only does not import what models need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from fsdpq.errors import CheckpointError


def read_config(directory: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """Returns the checkpoint's config.

    Raises:
        CheckpointError: it is code of the model's authors, and nobody said to trust it.
    """
    with explained_remote_code(directory):
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)


@contextmanager
def explained_remote_code(directory: Path) -> Iterator[None]:
    """Explains transformers' refusal to run Python code that a checkpoint brings.

    ``trust_remote_code`` must be given to transformers as False, not left out: left out, it asks on
    stdin (5.23, ``dynamic_module_utils.resolve_trust_remote_code``).
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"the model of {directory} is Python code that its authors wrote, and code runs only "
            "when you say so",
            hint="read it; if you trust its authors, add `--trust-remote-code` to the command",
        ) from error
