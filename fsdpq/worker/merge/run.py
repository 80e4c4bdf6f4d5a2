"""``merge``: writes a finished run's model with the change in its weights, and the receipt."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fsdpq
from fsdpq import dist
from fsdpq.checkpoint.bnb_format import MAX_FILE_BYTES
from fsdpq.checkpoint.directory import whole_directory
from fsdpq.protocols import DTYPES
from fsdpq.run_files.paths import MERGE_RECEIPT, RunFiles
from fsdpq.run_files.writing import write_whole
from fsdpq.worker.export.readers import checkpoint_reader
from fsdpq.worker.merge.bases import BaseRows
from fsdpq.worker.merge.card import MODEL_WORDS, write_card
from fsdpq.worker.merge.compare import Documents, choose_documents, compare_models
from fsdpq.worker.merge.layout import usual_dtype
from fsdpq.worker.merge.receipt import Likeness, SurvivalBook, verdict
from fsdpq.worker.merge.requantize import Requantized
from fsdpq.worker.merge.sources import FinishedRun, open_finished_run
from fsdpq.worker.merge.weights import MergedWeights
from fsdpq.worker.merge.write import copy_companions, write_config, write_merged_weights
from fsdpq.worker.tokenizer import load_tokenizer

REPORT_S = 0.5


@dataclass(frozen=True)
class MergeOptions:
    """What to write.

    Attributes:
        out: a directory that is not there, or empty.
        onto: ``original`` weights of the base, or ``dequantized`` ones: those trained over.
        requantize: ``nf4`` or ``hqq``, None writes the merged weights themselves.
        dtype: ``bf16``, ``fp16`` or ``fp32``; None is that of the base.
        compare_tokens: tokens that the models are compared on; 0 compares none.
        device: ``cuda`` or ``cpu``: where matrices are quantized and dequantized, and models run.
        trust_remote_code: run code that the model brings.
        max_file_bytes: a file is full at this size.
    """

    out: Path
    onto: str = "dequantized"
    requantize: str | None = None
    dtype: str | None = None
    compare_tokens: int = 1024
    device: str = "cpu"
    trust_remote_code: bool = False
    max_file_bytes: int = MAX_FILE_BYTES


def merge(files: RunFiles, options: MergeOptions) -> None:
    """Starts a process group of one rank, then does `merge_run`."""
    merge_run(files, options, dist.start_process_group(options.device))


def merge_run(files: RunFiles, options: MergeOptions, device: torch.device) -> None:
    """Writes the merged model of a finished run; prints how far it is, as lines of JSON.

    Ranks: all (collective); there is one.
    Memory: some chunks of weights in fp32, the packed bytes of a matrix; for the comparison one
        layer in fp32 and log-probabilities of two models.

    Raises:
        FsdpqError: the run left nothing to merge, something is damaged, or the disk is full.
    """
    say = _Progress()
    run = open_finished_run(files, device, trust_remote_code=options.trust_remote_code)
    base = run.base_rows(options.onto)
    weights = MergedWeights(base, run.change, run.shapes)
    documents = _documents(run, options)
    dtype = _choose_dtype(run, options.dtype)
    again = None
    if options.requantize is not None:
        again = Requantized(run, options.requantize, dtype, device, options.trust_remote_code)
    with whole_directory(options.out.absolute(), what="the merged model") as partial:
        limits: dict[str, Any] = {
            "max_file_bytes": options.max_file_bytes,
            "report": say.reporter("merging"),
        }
        quantized_book = None
        if again is None:
            book = write_merged_weights(run, weights, partial, dtype=dtype, **limits)
        else:
            book, quantized_book = again.write(weights, partial, **limits)
        if options.requantize != "nf4":  # that writer has its own
            write_config(run, partial, dtype)
        copy_companions(run, partial, with_code=options.trust_remote_code)
        likeness: dict[str, Likeness] = {}
        if documents is not None:
            models = _models(run, weights, partial, dtype, again)
            likeness = compare_models(
                run.model.hf.config, models, documents, device=device, report=say.comparing,
                trust_remote_code=options.trust_remote_code,
            )  # fmt: skip
        receipt = _Receipt(run, options, dtype, book, quantized_book, documents, likeness, again)
        content = receipt.fields(partial)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        write_whole(partial / MERGE_RECEIPT, text.encode())
        write_card(partial, content)


def _documents(run: FinishedRun, options: MergeOptions) -> Documents | None:
    if not options.compare_tokens:
        return None
    directory = run.inputs.model_dir
    tokenizer = load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
    return choose_documents(run.inputs, tokenizer, max_tokens=options.compare_tokens)


def _choose_dtype(run: FinishedRun, asked: str | None) -> torch.dtype:
    """Returns the dtype to write: as asked, or that of the base, or what training computed in."""
    if asked is not None:
        return DTYPES[asked]
    usual = DTYPES[run.recipe.model.dtype] if run.stored is None else usual_dtype(run.stored.files)
    return usual if usual in DTYPES.values() else DTYPES[run.recipe.model.dtype]


def _models(
    run: FinishedRun,
    weights: MergedWeights,
    written: Path,
    dtype: torch.dtype,
    again: Requantized | None,
) -> Mapping[str, Callable[[str], Tensor]]:
    """Returns what reads the weights of each model to compare, the trained one first.

    What was written is read back from its files.
    """

    def reader(base: BaseRows, *, untrained: bool) -> Callable[[str], Tensor]:
        return MergedWeights(base, run.change, run.shapes, untrained=untrained).read

    def cast(name: str) -> Tensor:
        found = weights.read(name)
        return found.to(dtype) if found.is_floating_point() else found

    models = {
        "trained": reader(run.trained_over, untrained=False),
        "base": reader(run.trained_over, untrained=True),
    }
    if again is None:
        config = run.model.hf.config
        return models | {"merged": checkpoint_reader(written, config=config)}
    return models | {
        "merged": cast,
        "requantized": again.reader(written),
    }


@dataclass(frozen=True)
class _Receipt:
    """All that the receipt says."""

    run: FinishedRun
    options: MergeOptions
    dtype: torch.dtype
    book: SurvivalBook
    quantized_book: SurvivalBook | None
    documents: Documents | None
    likeness: Mapping[str, Likeness]
    again: Requantized | None

    def fields(self, directory: Path) -> dict[str, Any]:
        run, options = self.run, self.options
        dtype = next(name for name, each in DTYPES.items() if each is self.dtype)
        weights = sorted(directory.glob("*.safetensors"))
        return {
            "fsdpq": fsdpq.__version__,
            "time": time.time(),
            "run": str(run.files.root),
            "base_model": run.recipe.model.name_or_path,
            "base_revision": run.inputs.model_revision,
            "adapter": run.recipe.adapter.kind,
            "quantization": run.recipe.quantization.model_dump(mode="json"),
            "onto": options.onto,
            "dtype": dtype,
            "requantize": None if self.again is None else options.requantize,
            "requantize_options": (
                None if self.again is None else self.again.options.model_dump(mode="json")
            ),
            "num_bytes": sum(path.stat().st_size for path in weights),
            "files": [path.name for path in weights],
            "merged": self.book.fields(),
            "requantized": None if self.quantized_book is None else self.quantized_book.fields(),
            "likeness": self._likeness(),
            "verdict": verdict(
                onto=options.onto,
                dtype=dtype,
                survival=self.book.total(),
                likeness=self.likeness,
                requantized=options.requantize,
            ),
            "notices": [run.notice] if run.notice else [],
        }

    def _likeness(self) -> dict[str, Any] | None:
        if self.documents is None:
            return None
        return {
            "text": self.documents.what,
            "documents": len(self.documents.batch),
            "tokens": self.documents.num_tokens,
            "computed_in": "fp32",
            "divergence": "KL(trained || model), in nats a token",
            "models": {n: dataclasses.asdict(one) for n, one in self.likeness.items()},
        }


class _Progress:
    """Prints lines of JSON: ``what``, ``done`` and ``total``; not too often."""

    def __init__(self) -> None:
        self._last = 0.0

    def reporter(self, what: str) -> Callable[[int, int], None]:
        """Returns what is told ``(done, total)``."""

        def report(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._last >= REPORT_S or done == total:
                self._last = now
                self._print({"what": what, "done": done, "total": total})

        return report

    def comparing(self, model: str) -> None:
        """Says which model is run."""
        self._print({"what": f"comparing: {MODEL_WORDS[model]}", "done": 0, "total": 0})

    def _print(self, row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
