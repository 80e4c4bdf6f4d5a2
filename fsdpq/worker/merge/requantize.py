"""Quantizes merged weights again, and writes what comes of it.

``nf4`` is bitsandbytes' 4-bit format, as transformers writes and loads it. hqq has no form that
others load: transformers 5.23 says ``QuantizationMethod.HQQ is not available yet``, and hqq's own
files are pickles. So ``hqq`` is a quantized base of fsdpq's own
(`fsdpq.tensor_files.base_manifest`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdpq.dist import own_shard
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.loading.base_source import QuantizedBaseSource
from fsdpq.model.loading.base_writer import write_base
from fsdpq.model.loading.bnb_checkpoint import BnbCheckpointSource
from fsdpq.model.loading.bnb_files import BnbFiles
from fsdpq.model.loading.source import copy_rows, open_tensors, row_reader
from fsdpq.model.loading.targets import LoadingTarget, loading_targets, packed_shards
from fsdpq.model.meta import build_meta_model
from fsdpq.model.quantized_linear import PackedMatrix
from fsdpq.protocols import DTYPES, Adapter
from fsdpq.recipe.sections.quantization import BnbOptions, HqqOptions
from fsdpq.registry import resolve_builder
from fsdpq.tensor_files.base_manifest import Key, base_key
from fsdpq.worker.assemble import without_gpu_kernels
from fsdpq.worker.export.bnb import GivenWeights, save_bnb_weights
from fsdpq.worker.merge.bases import StoredRows, TrainedRows, matrix_rows
from fsdpq.worker.merge.receipt import SurvivalBook
from fsdpq.worker.merge.sources import FinishedRun
from fsdpq.worker.merge.weights import MergedWeights, row_chunks

HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class Requantized:
    """How merged weights are quantized.

    Attributes:
        run: what is merged.
        how: ``nf4`` or ``hqq``.
        dtype: of the weights before, and of those that stay.
        device: matrices are quantized there.
        trust_remote_code: build model classes that the base brings.
    """

    run: FinishedRun
    how: str
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool = False

    @property
    def options(self) -> BnbOptions | HqqOptions:
        """Those of the run where it quantized with the same library, else the defaults."""
        own = self.run.recipe.quantization
        if self.how == "nf4":
            found = own if isinstance(own, BnbOptions) else BnbOptions(kind="bnb")
            return found.model_copy(update={"quant_type": "nf4"})
        return own if isinstance(own, HqqOptions) else HqqOptions(kind="hqq")

    @property
    def key(self) -> Key:
        """What a base of fsdpq's own is made from: its model is no other's."""
        adapter = self.run.files.exported(self.run.recipe.export.format)
        digest = hashlib.sha256(str(self.run.inputs.model_dir).encode())
        for path in sorted(adapter.glob("*.safetensors")):
            with path.open("rb") as file:
                while piece := file.read(HASH_BYTES):
                    digest.update(piece)
        model = {"sha256": digest.hexdigest(), "revision": None, "source": f"merged {adapter}"}
        names = {dtype: name for name, dtype in DTYPES.items()}
        return base_key(
            model=model,
            quantization=self.options.model_dump(mode="json"),
            dtype=names[self.dtype],
            device=self.device.type,
        )

    def build_model(self, directory: Path) -> CausalLM:
        """Returns the model of ``directory`` on meta, quantized so, all of it frozen."""
        recipe = without_gpu_kernels(self.run.recipe)
        adapter: Adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
        merged = directory != self.run.inputs.model_dir
        return build_meta_model(
            directory,
            dtype=self.dtype,
            attn_implementation=recipe.model.attn_implementation,
            quantizer=resolve_builder("quantization", self.options)(self.options),
            trust_remote_code=self.trust_remote_code,
            layer_sources=range if merged else adapter.layer_sources,
        )

    def write(
        self,
        weights: MergedWeights,
        directory: Path,
        *,
        max_file_bytes: int,
        report: Callable[[int, int], Any],
    ) -> tuple[SurvivalBook, SurvivalBook]:
        """Writes the quantized weights into ``directory``.

        Returns:
            What survived of the change when it was cast to ``dtype``, and what after that.
        """
        model = self.build_model(self.run.inputs.model_dir)
        books = _Books(weights, model, self.dtype)
        if self.how == "hqq":
            source = _MergedSource(weights, books, dtype=self.dtype, device=self.device)
            write_base(
                model, source, directory, key=self.key, dtype=self.dtype, device=self.device,
                report=report,
            )  # fmt: skip
        else:
            written = directory / "weights"
            given = GivenWeights(weights, self.run.inputs.model_dir, books.add_packed)
            save_bnb_weights(
                model, given, written,
                quantizer=resolve_builder("quantization", self.options)(self.options),
                dtype=self.dtype, device=self.device, max_file_bytes=max_file_bytes,
                report=report,
            )  # fmt: skip
            for path in written.iterdir():
                path.rename(directory / path.name)
            written.rmdir()
        books.add_plain()
        return books.cast, books.again

    def reader(self, directory: Path) -> Callable[[str], Tensor]:
        """Returns what reads whole weights of what `write` wrote, dequantized."""
        rows, shapes = self._open(directory), self.run.shapes

        def read(name: str) -> Tensor:
            shape = shapes[name]
            return rows.read(name, 0, matrix_rows(shape)).reshape(shape)

        return read

    def _open(self, directory: Path) -> TrainedRows:
        model, options = self.build_model(directory), self.options
        if isinstance(options, HqqOptions):
            source = QuantizedBaseSource(model, directory, key=self.key, open_original=_no_original)
            return TrainedRows(model, source, None, dtype=self.dtype, device=self.device)
        files = BnbFiles(directory)
        stored = StoredRows(model, files, open_tensors(model, files))
        tables = resolve_builder("quantization", options)(options).library_tables()
        source = BnbCheckpointSource(
            model, directory, options=options, tables=tables, device=self.device
        )
        return TrainedRows(model, source, stored, dtype=self.dtype, device=self.device)


def _no_original() -> Any:
    raise RuntimeError("a merged base holds all weights")


class _Books:
    """Compares what is written with what was trained, while it is written."""

    def __init__(self, weights: MergedWeights, model: CausalLM, dtype: torch.dtype) -> None:
        self._weights = weights
        self._targets = loading_targets(model)
        self._dtype = dtype
        self.cast, self.again = SurvivalBook(), SurvivalBook()

    def add_packed(self, name: str, packed: Mapping[str, Tensor]) -> None:
        """Adds a matrix that was packed: its whole byte tensors."""
        target = self._targets[name]
        if not isinstance(target, PackedMatrix) or not self._weights.is_changed(name):
            return
        shape = (target.out_features, target.in_features)
        for start, stop in row_chunks(shape, 0, shape[0]):
            rows = self._weights.read_both(name, start, stop)
            self.cast.add(name, rows, rows.trained.to(self._dtype))
            again = target.quantizer.dequantize_rows(packed, shape, start, stop, self._dtype)
            self.again.add(name, rows, again.cpu())

    def add_plain(self) -> None:
        """Adds the changed weights that stay unquantized."""
        for name, target in self._targets.items():
            if isinstance(target, PackedMatrix) or not self._weights.is_changed(name):
                continue
            shape = self._weights.shapes[name]
            for start, stop in row_chunks(shape, 0, matrix_rows(shape)):
                rows = self._weights.read_both(name, start, stop)
                for book in (self.cast, self.again):
                    book.add(name, rows, rows.trained.to(self._dtype))


class _MergedSource:
    """Merged weights as a `fsdpq.model.loading.source.BaseSource`: quantized while read."""

    def __init__(
        self, weights: MergedWeights, books: _Books, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._weights = weights
        self._books = books
        self._dtype = dtype
        self._device = device

    def fill(self, name: str, target: LoadingTarget) -> None:
        read = row_reader(self._weights, name, target, dtype=self._dtype, device=self._device)
        if not isinstance(target, PackedMatrix):
            copy_rows(read, own_shard(target))
            return
        shards = packed_shards(target)
        target.quantizer.quantize_shards(read, (target.out_features, target.in_features), shards)
        self._books.add_packed(name, {packed: shard.rows for packed, shard in shards.items()})
