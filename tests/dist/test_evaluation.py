"""Losses of an evaluation are those of a plain loop over transformers, PEFT and bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.ranks import RankPool
from support.sharded import CPU, assemble, train
from support.tiny import random_rows, save_tiny_llama, tiny_recipe
from support.tokenizer import build_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fsdpq.checkpoint.peft import export_adapter, import_adapter
from fsdpq.data.pack import pack_rows
from fsdpq.data.preparing.prepared import PreparedRows, RowIndex, join_documents
from fsdpq.data.text.tokenize import Row
from fsdpq.run_files.evaluation_job import ModelResult
from fsdpq.worker.evaluate.losses import group_by_source, measure_losses
from fsdpq.worker.evaluate.windows import cut_windows

ADAPTER = {"rank": 4, "alpha": 16.0}
SEQ_LEN, STRIDES = 48, (16, 48)
TEXT = "What is the capital of France? The capital of France is Paris. one two three " * 6


def rows_to_measure(packed: bool) -> list[Row]:
    rows = random_rows(11)
    return pack_rows(rows, SEQ_LEN) if packed else rows


def measure(directory: Path, adapter: Path, packed: bool) -> list[ModelResult]:
    """Trains, exports, and measures rows before and after; then the windows of a text.

    Ranks: all (collective).
    """
    sections: dict[str, dict[str, Any]] = {
        "adapter": ADAPTER, "data": {"packing": "best_fit" if packed else "none"},
    }  # fmt: skip
    recipe, assembled = tiny_recipe(**sections), assemble(directory, **sections)
    groups = {"rows": rows_to_measure(packed)}
    before = measure_losses(recipe, assembled.model, groups, CPU)
    if not adapter.exists():
        batches = [random_rows(4, seed=index) for index in range(4)]
        train(assembled, batches, micro_batch_size=2, lr=1e-2, max_norm=None)
        options: Any = recipe.adapter
        export_adapter(
            assembled.adapted_layers, adapter, options=options, base_model="", revision=None,
            hf_config=assembled.model.hf.config,
        )  # fmt: skip
    else:
        import_adapter(assembled.adapted_layers, adapter)
    texts = [
        {"text": cut_windows(TEXT, build_tokenizer(), seq_len=SEQ_LEN, stride=stride)}
        for stride in STRIDES
    ]
    after = [measure_losses(recipe, assembled.model, each, CPU) for each in (groups, *texts)]
    return [before, *after]


def stock_model(directory: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    return base.train()  # in eval mode bitsandbytes multiplies in bf16 on CPUs that have it


@torch.no_grad()
def loop_over_rows(model: Any, rows: list[Row]) -> float:
    """The mean loss, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses = functional.cross_entropy(logits, ids[1:], reduction="none")
        mask = torch.from_numpy(row.loss_mask.astype(bool))[1:]
        total += float(losses[mask].double().sum())
        count += int(mask.sum())
    return total / count


@torch.no_grad()
def loop_of_the_guide(model: Any, stride: int) -> tuple[float, int]:
    """https://huggingface.co/docs/transformers/perplexity, with its count of tokens corrected."""
    ids = build_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    total, count, scored = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + SEQ_LEN, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - scored)] = -100
        num_tokens = int((labels[:, 1:] != -100).sum())
        if num_tokens:
            total += model(window, labels=labels).loss.item() * num_tokens
        count += num_tokens
        scored = end
        if end == ids.shape[1]:
            break
    return total / count, count


def test_losses_are_those_of_a_plain_loop(ranks: RankPool, tmp_path: Path) -> None:
    directory, adapter = save_tiny_llama(tmp_path / "base"), tmp_path / "adapter"
    found = {
        (world_size, packed): ranks.run(world_size, measure, directory, adapter, packed)
        for world_size, packed in ((2, False), (1, False), (2, True))
    }
    stock = stock_model(directory)
    base = loop_over_rows(stock, rows_to_measure(packed=False))
    stock = PeftModel.from_pretrained(stock, adapter).train()  # there is no dropout
    trained = loop_over_rows(stock, rows_to_measure(packed=False))
    assert abs(base - trained) > 0.02
    texts = [loop_of_the_guide(stock, stride) for stride in STRIDES]
    assert texts[0][0] != pytest.approx(texts[1][0], rel=1e-3)  # overlap gives more context
    for (_, packed), results in found.items():
        assert all(other == results[0] for other in results), "all ranks have the same numbers"
        before, after, *windows = results[0]
        # fp32 everywhere, the same quantized weights: only the order of sums differs.
        assert (before.loss, after.loss) == pytest.approx((base, trained), rel=1e-5)
        assert after.perplexity == pytest.approx(np.exp(trained), rel=1e-4)
        if not packed:
            assert [each.loss for each in windows] == pytest.approx([t for t, _ in texts], rel=1e-5)
            assert [each.num_tokens for each in windows] == [count for _, count in texts]


def test_every_source_has_a_loss_of_its_own_where_rows_are_packed(
    ranks: RankPool, tmp_path: Path
) -> None:
    directory = save_tiny_llama(tmp_path / "base")
    result = ranks.run(2, measure_sources, directory)[0]
    stock = stock_model(directory)
    rows = random_rows(8)
    for source, start in zip(result.sources, (0, 1), strict=True):
        own = rows[start::2]
        assert source.loss == pytest.approx(loop_over_rows(stock, own), rel=1e-5)
        assert (source.num_rows, source.num_tokens) == (4, sum(row.num_trained for row in own))
    assert [source.name for source in result.sources] == ["a.jsonl", "b.jsonl"]
    assert result.loss == pytest.approx(loop_over_rows(stock, rows), rel=1e-5)


def measure_sources(directory: Path) -> ModelResult:
    """Measures packed rows whose documents come from two files in turn.

    Ranks: all (collective).
    """
    recipe = tiny_recipe(adapter=ADAPTER, data={"packing": "best_fit"})
    assembled = assemble(directory, adapter=ADAPTER, data={"packing": "best_fit"})
    documents = join_documents(random_rows(8), [(index % 2, index) for index in range(8)])
    index = RowIndex.of_sequences([np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 6, 7])])
    rows = PreparedRows(documents, index, packed=True)
    groups = group_by_source(rows, ["a.jsonl", "b.jsonl"])
    return measure_losses(recipe, assembled.model, groups, CPU)
