"""The directory of a run that has finished, without its weights."""

from __future__ import annotations

from pathlib import Path

from fsdpq.launch.machine.resolve import resolve_launch
from fsdpq.launch.runs.run_dir import create_run_dir
from fsdpq.recipe.load import load_recipe
from fsdpq.run_files.paths import RunFiles

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
FAKE_ANSWERER = (str(ROOT / "tests" / "unit" / "launch" / "fake_answerer.py"),)


def finished_run(folder: Path) -> RunFiles:
    """Makes ``run`` in a folder that stands for the base model's directory."""
    recipe = resolve_launch(load_recipe(QUICKSTART).recipe, num_gpus=0, cpu_dtype="fp32")
    lock = {"inputs": {"model": {"directory": str(folder)}}}
    files = create_run_dir(recipe, raw=b"", lock=lock, run_dir=folder / "run")
    files.adapter.mkdir()
    (files.adapter / "adapter_model.safetensors").touch()
    return files
