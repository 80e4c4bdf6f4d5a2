"""What fsdpq trains and exports, stock transformers + PEFT + bitsandbytes load and reproduce."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.ranks import RankPool
from support.sharded import assemble, train
from support.tiny import VOCAB_SIZE, random_rows, save_tiny_llama, tiny_recipe
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.cache_utils import DynamicCache

from fsdpq.checkpoint.peft import export_adapter, import_adapter
from fsdpq.errors import ExportError

ADAPTER = {"rank": 4, "alpha": 16.0}
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]


def train_and_export(directory: Path, adapter: Path) -> torch.Tensor:
    """Trains four steps, exports, and returns the logits after each prefix of the prompt."""
    assembled = assemble(directory, adapter=ADAPTER)
    batches = [random_rows(4, seed=index) for index in range(4)]
    train(assembled, batches, micro_batch_size=2, lr=1e-2, max_norm=None)
    options = tiny_recipe(adapter=ADAPTER).adapter
    export_adapter(
        assembled.adapted_layers, adapter, options=options, base_model=str(directory),
        revision="1" * 40, hf_config=assembled.model.hf.config,
    )  # fmt: skip
    return prefix_logits(assembled.model)


def prefix_logits(model: torch.nn.Module) -> torch.Tensor:
    """Returns logits after each prefix, ``(len(PROMPT), vocabulary)``, by our own forward."""
    model.eval()
    rows = [
        model.next_token_logits(  # pyright: ignore[reportCallIssue]
            torch.tensor([PROMPT[:length]]),
            DynamicCache(config=model.hf.config),  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        )[0]
        for length in range(1, len(PROMPT) + 1)
    ]
    return torch.stack(rows)


def import_and_answer(directory: Path, adapter: Path) -> torch.Tensor:
    """Loads an exported adapter into a fresh model on this rank; returns the logits."""
    assembled = assemble(directory, adapter=ADAPTER)
    import_adapter(assembled.adapted_layers, adapter)
    return prefix_logits(assembled.model)


def _stock_logits(directory: Path, adapter: Path) -> torch.Tensor:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, adapter)
    # In eval mode, bitsandbytes on CPUs with AVX512-BF16 repacks the weight and multiplies in bf16:
    # stay in train mode (there is no dropout), where it dequantizes to fp32.
    model.train()
    ids = torch.tensor([PROMPT])
    return model(input_ids=ids).logits[0].detach()


@pytest.mark.parametrize("tied", [True, False])
def test_stock_peft_reproduces_our_logits(ranks: RankPool, tmp_path: Path, tied: bool) -> None:
    directory = save_tiny_llama(tmp_path / "base", tied=tied)
    adapter = tmp_path / "adapter"
    ours, others = ranks.run(2, train_and_export, directory, adapter)
    assert torch.equal(ours, others), "all ranks compute the same logits"
    config = json.loads((adapter / "adapter_config.json").read_text())
    pinned = config["base_model_name_or_path"], config["revision"]
    assert pinned == (str(directory), "1" * 40)
    stock = _stock_logits(directory, adapter)
    assert stock.shape == (len(PROMPT), VOCAB_SIZE)
    # Same quantized weights, same adapter, fp32 everywhere: only the order of sums differs.
    assert torch.allclose(ours, stock, rtol=0, atol=2e-5 * stock.abs().max().item())
    untrained = _logits_without_adapter(directory)
    assert (ours - untrained).abs().max() > 0.1, "the adapter changes the logits"
    again = ranks.run(1, import_and_answer, directory, adapter)[0]
    assert torch.allclose(again, ours, rtol=0, atol=2e-5 * stock.abs().max().item())


def _logits_without_adapter(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(input_ids=torch.tensor([PROMPT])).logits[0].detach()


def test_an_adapter_of_another_shape_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "base")
    adapter = tmp_path / "adapter"
    ranks.run(1, train_and_export, directory, adapter)
    other = save_tiny_llama(tmp_path / "other", intermediate_size=384)
    with pytest.raises(AssertionError, match=f"{ExportError.__name__}.*does not fit the model"):
        ranks.run(1, import_and_answer, other, adapter)
