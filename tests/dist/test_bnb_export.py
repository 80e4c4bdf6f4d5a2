"""What is written in bitsandbytes' format is what transformers writes, and what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference
from support.bnb_repository import EXPERTS, load_stock, save_quantized, stored_tensors
from support.ranks import RankPool
from support.tiny import save_tiny_llama, tiny_recipe

from fsdpq.errors import ExportError, FsdpqError
from fsdpq.model.meta import build_meta_model
from fsdpq.quantization.bnb import BnbQuantizer
from fsdpq.recipe.sections.quantization import BnbOptions
from fsdpq.worker.export.bnb import save_bnb_checkpoint, write_recipe_bnb

CPU = torch.device("cpu")
PROMPT = [5, 17, 230, 44, 9, 101, 77, 300]


def export(directory: Path, out: Path, options: dict[str, Any], dtype: torch.dtype) -> str:
    """Exports on this rank; returns the error's message, if any."""
    quantizer = BnbQuantizer(BnbOptions.model_validate({"kind": "bnb"} | options))
    model = build_meta_model(
        directory, dtype=dtype, attn_implementation="sdpa", quantizer=quantizer
    )
    try:
        save_bnb_checkpoint(
            model, directory, out, quantizer=quantizer, dtype=dtype, device=CPU,
            max_file_bytes=200_000,
        )  # fmt: skip
    except ExportError as error:
        return error.message
    return ""


@pytest.mark.parametrize(
    ("family", "sizes", "options"),
    [
        ("llama", {}, {"double_quant": True}),
        ("phi3", {"hidden_size": 100, "num_attention_heads": 2}, {"double_quant": True}),
        ("llama", {}, {"double_quant": False, "quant_type": "fp4"}),
    ],
)
def test_written_tensors_are_those_of_transformers(
    ranks: RankPool, tmp_path: Path, family: str, sizes: dict[str, Any], options: dict[str, Any]
) -> None:
    quantized = save_quantized(
        tmp_path, family=family, sizes=sizes, dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=options["double_quant"],
        bnb_4bit_quant_type=options.get("quant_type", "nf4"),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    expected = stored_tensors(quantized)
    out = tmp_path / "out"
    assert ranks.run(2, export, tmp_path / "plain", out, options, torch.bfloat16) == ["", ""]
    found = stored_tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert len(list(out.glob("model-*.safetensors"))) > 1
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        ours = load_stock(out, torch.bfloat16).eval()(input_ids=ids).logits
        theirs = load_stock(quantized, torch.bfloat16).eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs)


def test_blocks_of_128_and_unconverted_layers_load_in_transformers(
    ranks: RankPool, tmp_path: Path
) -> None:
    directory = save_tiny_llama(tmp_path / "plain", tied=True)
    options = {"block_size": 128, "modules_to_not_convert": ["o_proj"]}
    assert ranks.run(1, export, directory, tmp_path / "out", options, torch.float32) == [""]
    model = load_stock(tmp_path / "out").eval()
    layer: Any = model.get_submodule("model.layers.0")
    assert layer.mlp.up_proj.weight.quant_state.blocksize == 128
    assert type(layer.self_attn.o_proj) is torch.nn.Linear
    plain = reference.load_plain(directory)
    weight = plain.model.layers[0].mlp.up_proj.weight.data  # pyright: ignore
    bnb = reference.bnb
    wanted = bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, blocksize=128, compress_statistics=True, quant_type="nf4")
    )
    held = layer.mlp.up_proj.weight
    assert torch.equal(bnb.dequantize_4bit(held.data, held.quant_state), wanted)
    assert model(input_ids=torch.tensor([PROMPT])).logits.isfinite().all()


def test_quantized_experts_are_refused_and_plain_ones_load(ranks: RankPool, tmp_path: Path) -> None:
    directory = save_tiny_llama(tmp_path / "plain", tied=False, family="mixtral", **EXPERTS)
    out = tmp_path / "out"
    [message] = ranks.run(1, export, directory, out, {}, torch.float32)
    assert "cannot read quantized experts, and 6 stacks" in message
    assert not out.exists()
    kept = {"modules_to_not_convert": ["experts"]}
    assert ranks.run(1, export, directory, out, kept, torch.float32) == [""]
    stacks = {n: p for n, p in load_stock(out).named_parameters() if p.dim() == 3}
    original = dict(reference.load_plain(directory).named_parameters())
    assert len(stacks) == 6
    assert all(torch.equal(stack, original[name]) for name, stack in stacks.items())


def refusal(directory: Path, out: Path, sections: dict[str, Any]) -> str:
    """Returns what this rank says of a recipe that cannot be written."""
    try:
        write_recipe_bnb(
            tiny_recipe(**sections), directory, out, device=CPU, report=lambda _done, _total: None
        )
    except FsdpqError as error:
        return f"{type(error).__name__} {error.message}"
    return ""


def test_what_is_not_bitsandbytes_or_quantized_already_is_refused(
    ranks: RankPool, tmp_path: Path
) -> None:
    quantized, out = save_quantized(tmp_path), tmp_path / "out"
    hqq = {"quantization": {"kind": "hqq"}}
    [message] = ranks.run(1, refusal, tmp_path / "plain", out, hqq)
    assert message.startswith("UsageError `--format bnb` writes 4-bit weights of bitsandbytes")
    [message] = ranks.run(1, refusal, quantized, out, {})
    assert message.startswith("CheckpointError")
    assert "quantized already" in message
    assert not out.exists()
