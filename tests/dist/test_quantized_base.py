"""A base on disk: the library's bytes for any number of ranks, and the same model from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hqq.core.quantize import Quantizer as HqqLibrary
from safetensors import safe_open
from safetensors.torch import load_file
from support import bases
from support.ranks import RankPool
from support.tiny import save_tiny_llama, tiny_recipe
from torch import Tensor

from fsdpq.plan.base_file import base_bytes
from fsdpq.plan.shapes import shape_from_directory
from fsdpq.quantization.hqq import unpack_rows
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, read_manifest

BF16 = {"model": {"name_or_path": "tiny", "dtype": "bf16"}}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "nf4, scales quantized too": {"kind": "bnb"},
    "fp4, blocks cross rows": {
        "kind": "bnb",
        "quant_type": "fp4",
        "block_size": 128,
        "double_quant": False,
    },
    "hqq, 3 bits": {"kind": "hqq", "nbits": 3},
    "none": {"kind": "none"},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_against_library(
    found: dict[str, Tensor], name: str, weight: Tensor, options: dict[str, Any]
) -> None:
    """Compares the byte tensors of one matrix with what its library makes of the whole of it."""
    if options["kind"] == "hqq":
        codes, meta = HqqLibrary.quantize(
            weight, nbits=3, group_size=64, axis=1, bitpack=False, device="cpu"
        )
        unpacked = unpack_rows(found[f"{name}.codes"], 3, weight.shape[1])
        assert torch.equal(unpacked.flatten(), codes.to(torch.uint8).flatten()), name
        for part in ("scale", "zero"):
            stored = found[f"{name}.{part}"].view(torch.float16)
            assert torch.equal(stored.flatten(), meta[part].half().flatten()), name
        return
    codes, state = bnb.quantize_4bit(
        weight,
        blocksize=options.get("block_size", 64),
        quant_type=options.get("quant_type", "nf4"),
        compress_statistics=options.get("double_quant", True),
    )
    assert torch.equal(found[f"{name}.codes"].flatten(), codes.flatten()), name
    scales = found[f"{name}.absmax"].flatten().view(state.absmax.dtype)
    assert torch.equal(scales, state.absmax.flatten()), name


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_file_is_the_same_for_any_number_of_ranks_and_what_the_library_makes(
    ranks: RankPool, tmp_path: Path, quantizer: str
) -> None:
    directory = save_tiny_llama(tmp_path / "model", tied=False)
    sections = {"quantization": QUANTIZERS[quantizer], **BF16}
    written: set[bytes] = set()
    for num_ranks in (1, 2, 3, 4):
        out = tmp_path / f"base-{num_ranks}"
        ranks.run(num_ranks, bases.write, directory, out, sections)
        names = sorted(path.name for path in out.iterdir())
        assert names == ["base.json", "base.safetensors", "checksums.bin"]
        written.add(b"".join((out / name).read_bytes() for name in names))
    assert len(written) == 1
    sizes = [(tmp_path / "base-1" / name).stat().st_size for name in names[1:]]
    assert sum(sizes) == base_bytes(tiny_recipe(**sections), shape_from_directory(directory))
    found = load_file(tmp_path / "base-1" / WEIGHTS_NAME)
    for name, original in load_file(directory / "model.safetensors").items():
        weight = original.bfloat16()
        if name.split(".")[-2] in PROJECTIONS and quantizer != "none":
            check_against_library(found, name, weight, QUANTIZERS[quantizer])
        else:
            assert torch.equal(found[name], weight), name


def test_tensors_begin_at_multiples_of_64_bytes(ranks: RankPool, tmp_path: Path) -> None:
    directory, out = save_tiny_llama(tmp_path / "model"), tmp_path / "base"
    ranks.run(1, bases.write, directory, out, {})
    content = (out / WEIGHTS_NAME).read_bytes()
    data = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
    assert (len(content) - len(data)) % 4096 == 0
    with safe_open(out / WEIGHTS_NAME, framework="np") as file:
        names = list(file.keys())
        offset = 0
        for name in file.offset_keys():
            if not name.startswith("__pad__"):
                assert offset % 64 == 0, name
            value = file.get_tensor(name)
            assert bytes(data[offset : offset + value.nbytes]) == value.tobytes()
            offset += value.nbytes
        assert offset == len(data)
    assert any(name.startswith("__pad__") for name in names)
    manifest = read_manifest(out)
    assert manifest.num_bytes == len(content)


def compare(base: Path, directory: Path, sections: dict[str, Any]) -> list[str]:
    """Returns the names of tensors that differ between the base and the checkpoint."""
    found = bases.gather(bases.assemble_from(base, directory, sections))
    expected = bases.gather(bases.assemble_from(None, directory, sections))
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(value, found[name])]


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "lora, without quantization": ({}, {"quantization": {"kind": "none"}, **BF16}),
    "some modules stay": (
        {"tied": False},
        {"quantization": {"kind": "hqq", "modules_to_not_convert": ("o_proj",)}},
    ),
    "biases": ({"family": "qwen2"}, {}),
    "new layers, some trained": (
        {},
        {"adapter": {"kind": "llama_pro", "num_new_layers": 1}, **BF16},
    ),
    "experts": (
        {"family": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 48},
        {"adapter": {"kind": "lora", "rank": 4, "alpha": 8.0, "target_modules": ("q_proj",)}},
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_is_the_same_from_base_and_from_checkpoint(
    ranks: RankPool, tmp_path: Path, case: str
) -> None:
    changes, sections = MODELS[case]
    directory = save_tiny_llama(tmp_path / "model", **changes)
    frozen = {name: section for name, section in sections.items() if name != "adapter"}
    ranks.run(2, bases.write, directory, tmp_path / "base", frozen)
    for differing in ranks.run(3, compare, tmp_path / "base", directory, sections):
        assert differing == []
