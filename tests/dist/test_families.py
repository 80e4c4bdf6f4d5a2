"""Other Llama-like families load and compute as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache

from support import reference
from support.ranks import RankPool
from support.sharded import assemble
from support.tiny import save_tiny_llama

PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]


def last_logits(directory: Path) -> torch.Tensor:
    """Returns the logits after the prompt, by the sharded model."""
    model = assemble(directory).model.eval()
    cache = DynamicCache(config=model.hf.config)
    return model.next_token_logits(torch.tensor([PROMPT]), cache)[0]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "olmo2"])
def test_logits_equal_transformers(ranks: RankPool, tmp_path: Path, family: str) -> None:
    changes = {"head_dim": 48} if family == "qwen3" else {}
    directory = save_tiny_llama(tmp_path, tied=False, family=family, **changes)
    model = reference.load_dequantized(directory).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    for logits in ranks.run(2, last_logits, directory):
        # fp32, sums in another order.
        assert torch.allclose(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
