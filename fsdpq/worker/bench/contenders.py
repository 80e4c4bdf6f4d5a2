"""What trains in a benchmark: fsdpq here, stock libraries in `fsdpq.worker.bench.reference`."""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import start_process_group
from fsdpq.metrics.peaks import synchronize
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.training.step import train_step
from fsdpq.worker.assemble import Assembled, assemble_model
from fsdpq.worker.bench.shapes import Batch, Shape
from fsdpq.worker.random_base import assemble_random

LR = 1e-4
MAX_NORM = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS = "fsdpq"
PREPARED, UNPREPARED = "transformers", "transformers, unprepared"
"""The second leaves `prepare_model_for_kbit_training` out, which makes embedding and norms fp32."""

RATE = "matmul"
"""What multiplies the model's matrices and does nothing else."""

RunStep = Callable[[Batch], float]
"""Does one optimizer step and returns the mean token loss before it."""


@dataclass(frozen=True)
class ContenderOptions:
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
    offload: str = "none"
    activation_offload: bool = False


def batch_ids(shape: Shape, batch: Batch) -> torch.Tensor:
    """Returns the token ids of a batch, ``(rows, tokens)``, the same for every contender."""
    generator = torch.Generator().manual_seed(batch.size)
    return torch.randint(3, shape.vocab, (batch.rows, batch.tokens), generator=generator)


def write_checkpoint(directory: Path, shape: Shape, tokens: int) -> None:
    """Writes a Llama with random bf16 weights, as transformers initialises and saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape.config(tokens), dtype=torch.bfloat16)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)


def recipe_of(options: ContenderOptions, **sections: dict[str, Any]) -> Recipe:
    """Returns the recipe of ``options``; ``sections`` change keys, or a whole kind."""
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


def assemble_shape(
    recipe: Recipe, shape: Shape, tokens: int, *, device: torch.device, **options: Any
) -> Assembled:
    """Returns what ``assemble_model`` does for a shape, with random weights made on the device.

    Args:
        recipe: of the run.
        shape: of the model.
        tokens: the longest row.
        device: this rank's.
        options: as `fsdpq.worker.random_base.assemble_random` takes them.
    """
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as directory:
        config = LlamaConfig(**shape.config(tokens), architectures=["LlamaForCausalLM"])
        config.save_pretrained(directory)
        return assemble_random(recipe, Path(directory), device=device, **options)


def build_fsdpq(options: ContenderOptions) -> RunStep:
    """Returns the step that ``fsdpq train`` does on one rank."""
    device = start_process_group(options.device)
    recipe = recipe_of(options)
    if options.checkpoint is None:
        assembled = assemble_shape(recipe, options.shape, options.tokens, device=device)
    else:
        assembled = assemble_model(
            recipe, options.checkpoint, device=device, report_load=lambda _done, _total: None
        )
    build_optimizer = resolve_builder("optimizer", recipe.optimizer)
    optimizer = build_optimizer(recipe.optimizer, assembled.named_trainable)
    parameters = assembled.trainable
    assembled.model.train()

    @functools.cache  # the loader is not measured: not in the steps after the first
    def step_of(batch: Batch) -> Step:
        mask = np.ones(batch.tokens, np.uint8)
        mask[0] = 0
        ids = batch_ids(options.shape, batch).numpy().astype(np.int32)
        rows = [Row(row, mask) for row in ids]
        return build_step(rows, micro_batch_size=batch.rows, rank=0, world_size=1)

    def run(batch: Batch) -> float:
        result = train_step(
            assembled.model, step_of(batch), optimizer=optimizer, parameters=parameters,
            max_grad_norm=MAX_NORM, device=device,
        )  # fmt: skip
        return result.loss.item()

    return run


def build_contender(name: str, options: ContenderOptions) -> RunStep:
    """Returns the step of the contender ``name``."""
    if name == RATE:
        return MatmulRate(options.shape, DTYPES[options.dtype], options.device).flops_per_s
    if name == OURS:
        run = build_fsdpq(options)
    else:
        from fsdpq.worker.bench.reference import build_transformers

        run = build_transformers(options, prepare=name == PREPARED)
    gc.collect()
    return run


class MatmulRate:
    """Multiplies what a step multiplies: activations by weights, in forward and in backward.

    Args:
        shape: of the model.
        dtype: of the products.
        device: where.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self._sizes = [*shape.linears.values(), (shape.vocab, shape.hidden)]
        self._times = [shape.layers] * len(shape.linears) + [1]
        self._dtype = dtype
        self._device = torch.device(device)

    def flops_per_s(self, batch: Batch) -> float:
        """Returns operations a second, each product weighted by how often a step does it."""
        seconds, flops = 0.0, 0.0
        for size, times in zip(self._sizes, self._times, strict=True):
            seconds += times * self._seconds(size, batch.size)
            flops += times * 4.0 * batch.size * size[0] * size[1]
        return flops / seconds

    def _seconds(self, size: tuple[int, int], tokens: int) -> float:
        """Returns the seconds of one product and the gradient of its input."""
        weight = torch.randn(size, dtype=self._dtype, device=self._device)
        x = torch.randn(tokens, size[1], dtype=self._dtype, device=self._device)
        output = torch.nn.functional.linear(x, weight)
        torch.matmul(output, weight, out=x)
        x.fill_(1.0)
        synchronize(self._device)
        started = time.perf_counter()
        torch.matmul(x, weight.T, out=output)
        torch.matmul(output, weight, out=x)
        synchronize(self._device)
        return time.perf_counter() - started
