"""Python code in a checkpoint runs only when the command line says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils

from fsdpq.errors import CheckpointError
from fsdpq.model.config import read_config
from fsdpq.model.meta import build_meta_model
from fsdpq.quantization.none import NoQuantizer
from fsdpq.recipe.sections.quantization import NoQuantOptions
from fsdpq.worker.tokenizer import load_tokenizer

CODE = """\
from pathlib import Path
from transformers import PretrainedConfig

Path({owned!r}).touch()

class StrangeConfig(PretrainedConfig):
    model_type = "strange"
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked on stdin"))
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    auto_map = {"AutoConfig": "strange.StrangeConfig", "AutoTokenizer": ["strange.S", None]}
    config = {"model_type": "strange", "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (directory / "strange.py").write_text(CODE.format(owned=str(tmp_path / "owned")))
    return directory


def build(directory: Path) -> Any:
    return build_meta_model(
        directory,
        dtype=torch.float32,
        attn_implementation="sdpa",
        quantizer=NoQuantizer(NoQuantOptions(kind="none")),
    )


@pytest.mark.parametrize(
    "load",
    [lambda path: read_config(path, trust_remote_code=False), load_tokenizer, build],
    ids=["config", "tokenizer", "model"],
)
def test_code_does_not_run_and_nobody_is_asked(
    load: Callable[[Path], Any], checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="code runs only when you say so") as caught:
        load(checkpoint)
    assert "--trust-remote-code" in caught.value.hint
    assert not (tmp_path / "owned").exists()


def test_code_runs_where_it_is_trusted(checkpoint: Path, tmp_path: Path) -> None:
    config = read_config(checkpoint, trust_remote_code=True)
    assert type(config).__name__ == "StrangeConfig"
    assert (tmp_path / "owned").exists()
