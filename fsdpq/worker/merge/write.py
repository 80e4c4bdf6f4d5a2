"""Writes a merged model: its weights, and all that makes them a model others load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdpq.checkpoint.sharded_files import StreamedTensor, write_sharded
from fsdpq.checkpoint.whole_model import COPIED
from fsdpq.errors import ExportError
from fsdpq.worker.merge.layout import WrittenTensor, plan_tensors
from fsdpq.worker.merge.receipt import SurvivalBook
from fsdpq.worker.merge.sources import FinishedRun
from fsdpq.worker.merge.weights import MergedWeights, cast_chunks

CODE = "*.py"


def write_merged_weights(
    run: FinishedRun,
    weights: MergedWeights,
    directory: Path,
    *,
    dtype: torch.dtype,
    max_file_bytes: int,
    report: Callable[[int, int], Any],
) -> SurvivalBook:
    """Writes the weights in ``dtype`` and returns what survived of the change.

    Memory: some chunks of `fsdpq.worker.merge.weights.CHUNK_WEIGHTS`, the packed bytes of a matrix.

    Raises:
        ExportError: the disk lacks room.
    """
    planned = plan_tensors(run.model, run.stored, dtype)
    check_room(directory, sum(tensor.spec.num_bytes for tensor in planned))
    book = SurvivalBook()

    def pieces_of(tensor: WrittenTensor) -> Callable[[], Iterator[Tensor]]:
        spec = tensor.spec
        return lambda: cast_chunks(
            weights, tensor.weight, tensor.start, tensor.stop, spec.dtype, book.add
        )

    write_sharded(
        [StreamedTensor(tensor.spec, pieces_of(tensor)) for tensor in planned],
        directory,
        max_file_bytes=max_file_bytes,
        report=report,
    )
    return book


def check_room(directory: Path, num_bytes: int) -> None:
    """Checks that ``num_bytes`` fit beside ``directory``.

    Raises:
        ExportError: they do not.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise ExportError(
            f"the merged model has {num_bytes / 1e9:.1f} GB, and the disk of {directory.parent} "
            f"has {free / 1e9:.1f} GB left",
            hint="make room, or name a directory on another disk with `--out`",
        )


def write_config(run: FinishedRun, directory: Path, dtype: torch.dtype) -> None:
    """Writes the base's ``config.json``, which says nothing of quantization then."""
    sources = run.model.layer_sources
    path = run.inputs.model_dir / "config.json"
    if sources == tuple(range(len(sources))):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        config = run.model.hf.config.to_dict()
    config.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    # transformers 5 writes `dtype`; what was written before, and readers of that, `torch_dtype`.
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(run: FinishedRun, directory: Path, *, with_code: bool) -> None:
    """Copies the tokenizer, with the run's chat template where it has one, and generation settings.

    Args:
        run: what is merged.
        directory: of the merged model.
        with_code: copy the Python files of the base, which its config names, too.
    """
    exported = run.files.exported(run.recipe.export.format)
    patterns = (*COPIED, CODE) if with_code else COPIED
    for source, wanted in ((run.inputs.model_dir, patterns), (exported, COPIED)):
        for path in sorted({path for pattern in wanted for path in source.glob(pattern)}):
            shutil.copyfile(path, directory / path.name)
