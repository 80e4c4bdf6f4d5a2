"""Measures packing: ``make bench-packing``, some minutes.

- How full sequences get, how long that takes, and how many there are beside TRL's where TRL is
  installed: 200,000 made-up lengths, log-normal, about as long as those of known datasets.
- Attention of packed rows: a step of two decoder layers in bf16 with transformers' mask of all
  pairs of tokens, and with documents computed by themselves. CPU seconds of one thread, the less of
  several, taken in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fsdpq.data.pack import pack_lengths
from fsdpq.model.causal_lm import CausalLM
from fsdpq.model.document_attention import use_document_attention
from fsdpq.model.packing import longest_alone

LENGTHS = {"alpaca": (90, 0.8), "dolly": (130, 1.0), "guanaco": (420, 0.85)}
"""Median, and standard deviation of the logarithm."""

SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 16384,
}  # fmt: skip


def make_lengths(name: str, num_rows: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Returns tokens of made-up rows, cut to ``seq_len``."""
    median, spread = LENGTHS[name]
    logs = np.random.default_rng(0).normal(np.log(median), spread, num_rows)
    return np.clip(np.exp(logs), 8, seq_len).astype(np.int64)


def count_of_trl(lengths: npt.NDArray[np.int64], seq_len: int) -> str:
    """Returns the sequences of TRL's ``bfd`` with its defaults, or nothing."""
    if importlib.util.find_spec("trl") is None:
        return ""
    from datasets import Dataset, disable_progress_bars
    from trl.data_utils import pack_dataset  # pyright: ignore[reportMissingImports]

    disable_progress_bars()
    rows = Dataset.from_dict({"input_ids": [[1] * int(n) for n in lengths]})
    start = time.process_time()
    packed = pack_dataset(rows, seq_len, "bfd")
    return f"{len(packed)} in {time.process_time() - start:.1f} s"


def print_fill(num_rows: int) -> None:
    """Prints how full sequences of several lengths are."""
    print("| lengths as of | seq_len | sequences | filled | seconds | TRL |\n|" + " --- |" * 6)
    for name in LENGTHS:
        for seq_len in (512, 1024, 2048, 4096):
            lengths = make_lengths(name, num_rows, seq_len)
            start = time.process_time()
            found = len(pack_lengths(lengths, seq_len))
            took = time.process_time() - start
            cells = [name, seq_len, found, f"{lengths.sum() / (found * seq_len):.2%}"]
            cells += [f"{took:.2f}", count_of_trl(lengths, seq_len)]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def take_step(model: CausalLM, position_ids: torch.Tensor) -> float:
    """Returns the CPU seconds of a forward and a backward pass of the decoder."""
    ids = torch.randint(3, SHAPE["vocab_size"], position_ids.shape)
    start = time.process_time()
    model._decode(ids, position_ids).last_hidden_state.float().square().sum().backward()
    model.zero_grad()
    return time.process_time() - start


def print_attention(repeats: int) -> None:
    """Prints steps with a mask and without."""
    config = AutoConfig.for_model("llama", **SHAPE)
    model = CausalLM(
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    )
    alone = longest_alone(model.hf)
    use_document_attention(model.hf)
    print("\n| tokens | documents | with a mask, s | by document, s | ratio |\n|" + " --- |" * 5)
    for tokens in (2048, 8192):
        lengths = {name: make_lengths(name, 4000, tokens) for name in LENGTHS}
        cases = {n: x[pack_lengths(x, tokens)[3]].tolist() for n, x in lengths.items()}
        for name, documents in (cases | {"one": [tokens]}).items():
            position_ids = torch.cat([torch.arange(n) for n in documents])[None]
            seconds: dict[int, list[float]] = {0: [], alone: []}
            for _ in range(repeats):
                for model.longest_alone, found in seconds.items():
                    found.append(take_step(model, position_ids))
            mask, apart = min(seconds[0]), min(seconds[alone])
            cells = [tokens, f"{len(documents)} ({name})", f"{mask:.2f}", f"{apart:.2f}"]
            print("| " + " | ".join(map(str, cells)) + f" | {mask / apart:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures packing and its attention.")
    parser.add_argument("--rows", type=int, default=200_000, help="made-up rows to pack")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    print_fill(options.rows)
    print_attention(options.repeats)


if __name__ == "__main__":
    main()
