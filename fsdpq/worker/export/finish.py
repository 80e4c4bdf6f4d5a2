"""The end of a run: what was trained is exported, checked, described, then put in its place."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq import dist
from fsdpq.checkpoint.peft import check_loadable
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.errors import ExportError
from fsdpq.model.config import read_config
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RunSummary
from fsdpq.worker.assemble import Assembled, Inputs
from fsdpq.worker.export.card import write_card
from fsdpq.worker.export.formats import FORMATS, save_template
from fsdpq.worker.export.streamed import build_stock_model
from fsdpq.worker.export.verify import prompt_ids, verify_export


@dataclass(frozen=True)
class Trained:
    """What there is to export.

    Attributes:
        recipe: of the run, resolved.
        inputs: of the run.
        assembled: the trained model.
        tokenizer: of the base.
        rows: what made the training rows of text.
        summary: of the run.
    """

    recipe: Recipe
    inputs: Inputs
    assembled: Assembled
    tokenizer: PreTrainedTokenizerBase
    rows: RowTokenizer
    summary: RunSummary


def export_run(
    trained: Trained, files: RunFiles, events: MetricSink, *, device: torch.device
) -> None:
    """Writes what was trained, in the recipe's format; see `RunFiles.exported`.

    It has another name until stock libraries have loaded it and computed the same
    (``export.verify``), and keeps that name where they do not.

    Ranks: all (collective); rank 0 writes.

    Raises:
        ExportError: it cannot be written or loaded, or computes something else.
    """
    events.write({"event": "phase", "name": "export"})
    started = time.monotonic()
    recipe = trained.recipe
    export_format = recipe.export.format
    directory = files.exported(export_format)
    draft = unverified(directory) if recipe.export.verify else directory
    FORMATS[export_format].save(recipe, trained.inputs, trained.assembled, draft)
    save_template(recipe, trained.tokenizer, trained.rows, draft)
    verified = None
    if recipe.export.verify:
        ids = prompt_ids(trained.tokenizer)
        verified = verify_export(
            recipe, trained.inputs, trained.assembled, draft, ids, device=device
        )
    if dist.rank() == 0:
        write_card(files, draft, summary=trained.summary, verified=verified)
        if draft != directory:
            replace_directory(draft, directory)
        row = {
            "event": "export",
            "format": export_format,
            "directory": str(directory),
            "num_bytes": sum(path.stat().st_size for path in directory.rglob("*")),
            "verified": verified is not None,
            "max_difference": None if verified is None else verified.max_difference,
            "seconds": time.monotonic() - started,
        }
        events.write(row)
    dist.wait_for_all()


def unverified(directory: Path) -> Path:
    """Returns what an exported directory is called until stock libraries have loaded it."""
    return directory.with_suffix(".unverified")


def check_exportable(recipe: Recipe, inputs: Inputs, assembled: Assembled) -> None:
    """Checks, before anything is trained, that stock libraries will load what is exported.

    Raises:
        ExportError: PEFT adapts other layers of this family than those that are trained.
    """
    if recipe.export.format != "peft" or not recipe.export.verify:
        return
    config = read_config(inputs.model_dir, trust_remote_code=inputs.trust_remote_code)
    hf = build_stock_model(config, dtype=torch.float32, trust_remote_code=inputs.trust_remote_code)
    check_loadable(
        assembled.adapted_layers,
        hf,
        options=recipe.adapter,  # pyright: ignore[reportArgumentType] - a check of the recipe
        saved=assembled.trained_base,
    )


def replace_directory(draft: Path, directory: Path) -> None:
    """Gives ``draft`` the name ``directory``; what was there is gone.

    Raises:
        ExportError: the file system refuses.
    """
    try:
        shutil.rmtree(directory, ignore_errors=True)
        draft.rename(directory)
    except OSError as error:
        raise ExportError(
            f"{draft} cannot be renamed to {directory.name}: {error}",
            hint="it is complete and checked: rename it yourself",
        ) from error
