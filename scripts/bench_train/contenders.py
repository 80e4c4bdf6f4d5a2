"""The two ways to train: fsdpq, and transformers + PEFT + bitsandbytes as users call them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bench_train.shapes import Batch, Shape

LR = 1e-4
MAX_NORM = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What all contenders are built from.

    Attributes:
        shape: of the model.
        checkpoint: its weights; None makes them on the device.
        dtype: ``bf16`` or ``fp32``.
        device: ``cpu`` or ``cuda``.
        lora_rank: on all linears.
        tokens: the longest row.
        offload: fsdpq's ``fsdp.offload``.
        activation_offload: fsdpq's ``fsdp.activation_offload``.
    """

    shape: Shape
    checkpoint: Path | None
    dtype: str
    device: str
    lora_rank: int
    tokens: int
    offload: str
    activation_offload: bool


RunStep = Callable[[Batch], float]
"""Does one optimizer step and returns the mean token loss before it."""


def batch_ids(shape: Shape, batch: Batch) -> torch.Tensor:
    """Returns the token ids of a batch, ``(rows, tokens)``, the same for every contender."""
    generator = torch.Generator().manual_seed(batch.size)
    return torch.randint(3, shape.vocab, (batch.rows, batch.tokens), generator=generator)


def write_checkpoint(directory: Path, shape: Shape, tokens: int) -> None:
    """Writes a Llama with random bf16 weights, as transformers initialises and saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape.config(tokens), dtype=torch.bfloat16)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def build_fsdpq(options: Options) -> RunStep:
    """Returns the step that ``fsdpq train`` does on one rank."""
    from fsdpq.data.dealing.collate import Step, build_step
    from fsdpq.data.text.tokenize import Row
    from fsdpq.dist import start_process_group
    from fsdpq.registry import resolve_builder
    from fsdpq.training.step import train_step

    device = start_process_group(options.device)
    recipe = recipe_of(options)
    if options.checkpoint is None:
        from scripts.bench_train.random_base import assemble_random

        assembled = assemble_random(recipe, options.shape, options.tokens, device=device)
    else:
        from fsdpq.worker.assemble import assemble_model

        assembled = assemble_model(
            recipe, options.checkpoint, device=device, report_load=lambda _done, _total: None
        )
    build_optimizer = resolve_builder("optimizer", recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, assembled.named_trainable)
    parameters = assembled.trainable
    assembled.model.train()

    @functools.cache  # the loader is not measured: not in the steps after the first
    def step_of(batch: Batch) -> Step:
        rows = [
            Row(ids, [False] + [True] * (batch.tokens - 1))
            for ids in batch_ids(options.shape, batch).tolist()
        ]
        return build_step(rows, micro_batch_size=batch.rows, rank=0, world_size=1)

    def run(batch: Batch) -> float:
        step = step_of(batch)
        result = train_step(
            assembled.model, step, optimizer=optimizer, parameters=parameters,
            max_grad_norm=MAX_NORM, device=device,
        )  # fmt: skip
        return result.loss.item()

    return run


def recipe_of(options: Options, **sections: dict[str, Any]) -> Any:
    """Returns the `Recipe` of ``options``; ``sections`` change keys, or a whole kind."""
    from fsdpq.recipe.root import Recipe

    rank = options.lora_rank
    document: dict[str, Any] = {
        "version": 1,
        "name": "bench",
        "model": {"name_or_path": str(options.checkpoint), "dtype": options.dtype},
        "quantization": {"kind": "bnb", "quant_type": "nf4", "double_quant": True},
        "adapter": {"kind": "lora", "rank": rank, "alpha": 2.0 * rank},
        "fsdp": {"offload": options.offload, "activation_offload": options.activation_offload},
        "data": {"path": "rows.jsonl", "seq_len": options.tokens},
        "optimizer": {"kind": "adamw", "lr": LR},
        "lr_scheduler": {"kind": "constant"},
        "training": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1},
        "launch": {"device": options.device, "nproc_per_node": 1},
    }
    for section, changes in sections.items():
        document[section] = changes if "kind" in changes else document[section] | changes
    return Recipe.model_validate(document)


def build_transformers(options: Options, *, prepare: bool) -> RunStep:
    """Returns a step of stock libraries.

    Args:
        options: of the model.
        prepare: call ``prepare_model_for_kbit_training``, which makes everything fp32 that is not
            quantized; without it the base is frozen and checkpointed, and stays in its dtype.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    device = torch.device(options.device)
    checkpointing = {"use_reentrant": False}
    model = _load_4bit(options, device)
    if prepare:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    else:
        model.requires_grad_(False)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    rank = options.lora_rank
    model.config.use_cache = False
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0)
    torch.manual_seed(0)  # the same start in every process
    peft_model = get_peft_model(model, config)
    peft_model.train()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    def run(batch: Batch) -> float:
        ids = batch_ids(options.shape, batch).to(device)
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run


def _load_4bit(options: Options, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = DTYPES[options.dtype]
    if options.checkpoint is None:
        from scripts.bench_train.random_base import random_4bit

        return random_4bit(options.shape, options.tokens, dtype=dtype, device=device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        options.checkpoint, quantization_config=quantization, dtype=dtype, device_map=str(device)
    )


def build(name: str, options: Options) -> RunStep:
    """Returns the step of the contender ``name``: one of `CONTENDERS`."""
    run = CONTENDERS[name](options)
    gc.collect()
    return run


CONTENDERS: dict[str, Callable[[Options], RunStep]] = {
    "fsdpq": build_fsdpq,
    "transformers": lambda options: build_transformers(options, prepare=True),
    "transformers-unprepared": lambda options: build_transformers(options, prepare=False),
}
