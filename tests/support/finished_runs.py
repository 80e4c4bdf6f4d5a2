"""Run directories as a finished run leaves them, made without the launcher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdpq.recipe.load import dump_recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.worker.assemble import Inputs
from fsdpq.worker.export.formats import FORMATS
from support.sharded import assemble, train
from support.tiny import random_rows, tiny_recipe

Sections = dict[str, dict[str, Any]]


def write_run(root: Path, base: Path, sections: Sections) -> RunFiles:
    """Writes the resolved recipe and the lock of a run of the tiny recipe."""
    files = RunFiles(root)
    files.logs.mkdir(parents=True)
    export = {"format": "peft"} | sections.get("export", {})
    recipe = tiny_recipe(**(sections | {"export": export}))
    files.resolved.write_text(dump_recipe(recipe))
    model = {"directory": str(base), "revision": None, "sha256": "0" * 64, "source": "tiny"}
    files.lock.write_text(json.dumps({"inputs": {"model": model, "data": None}}))
    return files


def train_run(root: Path, base: Path, sections: Sections, lr: float = 1e-2) -> None:
    """Trains three steps and exports into a run directory.

    Ranks: all (collective).
    """
    files = write_run(root, base, sections)
    assembled = assemble(base, **sections)
    batches = [random_rows(4, seed=index) for index in range(3)]
    train(assembled, batches, micro_batch_size=2, lr=lr, max_norm=None)
    name = sections.get("export", {}).get("format", "peft")
    recipe = tiny_recipe(**sections)
    FORMATS[name].save(recipe, Inputs(base, None, None), assembled, files.exported(name))
