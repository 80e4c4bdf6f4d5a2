"""The reference of preparing rows: ``datasets`` and TRL's trainer, as users call them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def prepare_with_trl(
    *, rows: str, model: str, kind: str, out: str, processes: int
) -> dict[str, Any]:
    """Lets TRL's trainer prepare the rows; returns the time of that and of reading them."""
    os.environ |= {"HF_DATASETS_CACHE": f"{out}/cache", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from fsdpq.worker.bench.data import SEQ_LEN, Clock

    spent, prepared = list[tuple[float, float]](), list[Any]()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
            clock = Clock()
            done = super()._prepare_dataset(dataset, *arguments, **options)
            spent.append(clock.passed())
            prepared.append(done)
            return done

    tokenizer = AutoTokenizer.from_pretrained(Path(model))
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    tiny: Any = LlamaForCausalLM(config)
    clock = Clock()
    dataset = load_dataset("json", data_files=rows, split="train")
    spent.append(clock.passed())
    options = SFTConfig(
        output_dir=f"{out}/trainer", packing=True, max_length=SEQ_LEN, report_to="none",
        dataset_num_proc=processes, assistant_only_loss=kind == "chat", use_cpu=True, bf16=False,
    )  # fmt: skip
    Timed(model=tiny, args=options, train_dataset=dataset, processing_class=tokenizer)
    return _described(prepared[0], spent, SEQ_LEN)


def _described(packed: Any, spent: list[tuple[float, float]], seq_len: int) -> dict[str, Any]:
    table = packed.with_format("arrow")
    num_tokens = sum(
        len(batch["input_ids"].combine_chunks().flatten()) for batch in table.iter(batch_size=1000)
    )
    seconds, cpu_s = (sum(each) for each in zip(*spent, strict=True))
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "sequences": len(packed),
        "filled": num_tokens / (len(packed) * seq_len),
        "tokens": num_tokens,
    }
