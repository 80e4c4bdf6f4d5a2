"""Does a tiny random Llama on all ranks have the loss and gradient norm of one process?

The reference is transformers' own model with the weights that bitsandbytes dequantizes. LoRA starts
with ``B = 0``, so the loss is the base's, and the gradient of ``B`` follows from that of the whole
weight: ``dL/dB = scale * dL/dW @ A.T``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fsdpq.data.dealing.collate import build_step
from fsdpq.data.text.tokenize import Row
from fsdpq.dist import gather_whole, rank, world_size
from fsdpq.recipe.root import Recipe
from fsdpq.training.step import train_step
from fsdpq.worker.assemble import Assembled, assemble_model
from fsdpq.worker.self_test.check import Bench, Check, require_close
from fsdpq.worker.self_test.quantizer_checks import REMEDY, quantize_whole

GROUP = "training"
VOCABULARY = 331
TOLERANCE = 1e-4
"""fp32 through two layers, summed in another order on every rank: about 1e-6."""

SCALE = 2.0


def tiny_recipe() -> Recipe:
    """Returns NF4 with double quantization and LoRA on every linear, in fp32."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "self-test",
        "model": {"name_or_path": "tiny", "dtype": "fp32"},
        "quantization": {"kind": "bnb"},
        "adapter": {"kind": "lora", "rank": 4, "alpha": 4 * SCALE},
        "data": {"path": "rows.jsonl"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "lr_scheduler": {"kind": "constant"},
        "training": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    return Recipe.model_validate(document)


def save_tiny_llama(directory: Path) -> None:
    """Saves a random Llama of two layers, the same on every rank."""
    torch.manual_seed(17)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=320, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Not `save_pretrained`: under torchrun it writes nothing on ranks other than 0.
    config.to_json_file(directory / "config.json")
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def random_rows() -> list[Row]:
    """Returns rows of uneven length, two for every rank and one more."""
    generator = torch.Generator().manual_seed(23)
    rows: list[Row] = []
    for index in range(2 * world_size() + 1):
        length = 9 + index % 7
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = torch.arange(length) > 2
        rows.append(Row(ids.int().numpy(), mask.byte().numpy()))
    return rows


def check_training(bench: Bench) -> str:
    """Compares loss and gradient norm of one step."""
    with tempfile.TemporaryDirectory(prefix="fsdpq-self-test-") as directory:
        save_tiny_llama(Path(directory))
        assembled = assemble_model(
            tiny_recipe(), Path(directory), device=bench.device, report_load=lambda *_: None
        )
        initial_a = {
            name: gather_whole(layer.get_parameter("lora_A"))  # pyright: ignore[reportAttributeAccessIssue]
            for name, layer in assembled.adapted_layers.items()
        }
        reference: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = random_rows()
    expected_loss, expected_norm = _plain_step(reference.to(bench.device), rows, initial_a)
    loss, norm = _sharded_step(assembled, rows, bench)
    apart = [
        require_close("the loss", loss, expected_loss, tolerance=TOLERANCE),
        require_close("the gradient norm", norm, expected_norm, tolerance=TOLERANCE),
    ]
    return (
        f"loss {float(loss):.5f} and gradient norm {float(norm):.5f} within {max(apart):.0e} "
        f"of transformers (at most {TOLERANCE:.0e})"
    )


def _sharded_step(assembled: Assembled, rows: list[Row], bench: Bench) -> tuple[Tensor, Tensor]:
    step = build_step(rows, micro_batch_size=1, rank=rank(), world_size=world_size())
    result = train_step(
        assembled.model,
        step,
        optimizer=torch.optim.SGD(assembled.trainable, lr=0.0, foreach=True),
        parameters=assembled.trainable,
        max_grad_norm=None,
        device=bench.device,
    )
    loss = result.loss.clone()
    dist.all_reduce(loss)
    return loss, result.grad_norm.to(loss.device)


def _plain_step(
    model: nn.Module, rows: list[Row], initial_a: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    model.requires_grad_(requires_grad=False)
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in initial_a}
    for weight in weights.values():
        whole = quantize_whole(weight.data, tiny_recipe().quantization)  # pyright: ignore[reportArgumentType]
        weight.data = whole.dequantize(torch.float32)
        weight.requires_grad_()
    device = next(iter(weights.values())).device
    total = torch.zeros((), device=device)
    for row in rows:
        ids = torch.tensor(row.input_ids, dtype=torch.int64, device=device)[None]
        kept = torch.tensor(row.loss_mask[1:], dtype=torch.bool, device=device)
        logits = model(input_ids=ids).logits[0, :-1][kept]
        total = total + nn.functional.cross_entropy(logits, ids[0, 1:][kept], reduction="sum")
    loss = total / sum(row.num_trained for row in rows)
    loss.backward()
    norms = [
        torch.linalg.matrix_norm(SCALE * weight.grad @ initial_a[name].T)
        for name, weight in weights.items()
        if weight.grad is not None
    ]
    return loss.detach(), torch.stack(norms).norm()


CHECKS = (Check(GROUP, "tiny Llama, one step", check_training, REMEDY),)
