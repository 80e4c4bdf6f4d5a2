"""Configs as text in, imports out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fsdpq.importing.convert import import_config
from fsdpq.importing.result import ImportResult

Importer = Callable[..., ImportResult]


@pytest.fixture
def import_text(tmp_path: Path) -> Importer:
    """Writes the text to a file and imports it."""

    def run(text: str, tool: str = "auto", *, accelerate: str = "") -> ImportResult:
        path = tmp_path / ("command.sh" if tool == "fsdp_qlora" else "config.yaml")
        path.write_text(text, encoding="utf-8")
        extra = None
        if accelerate:
            extra = tmp_path / "accelerate.yaml"
            extra.write_text(accelerate, encoding="utf-8")
        return import_config(path, tool=tool, accelerate=extra)

    return run
