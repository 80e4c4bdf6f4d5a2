"""Ranges of bytes of 4-bit matrices, and what of their parts may be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.bnb_files import BnbFiles

NAME = "layer.weight"
SHAPE = (12, 100)


def parts(*, nested: bool, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Returns the tensors that bitsandbytes saves of a random matrix."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=nested, quant_storage=storage
    )
    others = state.as_dict(packed=True)
    return {NAME: codes} | {f"{NAME}.{part}": tensor for part, tensor in others.items()}


def opened(directory: Path, tensors: dict[str, Tensor]) -> BnbFiles:
    save_file(tensors, directory / "model.safetensors")
    return BnbFiles(directory)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_any_range_of_codes_is_read_whatever_they_are_stored_as(
    tmp_path: Path, storage: torch.dtype
) -> None:
    files = opened(tmp_path, parts(nested=True, storage=storage))
    codes = parts(nested=True)[NAME].flatten()
    assert files.names == {NAME}
    assert files.shape(NAME) == SHAPE
    for start, stop in [(0, 600), (0, 1), (1, 2), (3, 598), (599, 600)]:
        assert torch.equal(files.read_bytes(NAME, "codes", start, stop), codes[start:stop])


def test_scales_stored_in_16_bits_come_as_fp32(tmp_path: Path) -> None:
    tensors = parts(nested=False)
    stored = tensors[f"{NAME}.absmax"].to(torch.bfloat16)
    files = opened(tmp_path, tensors | {f"{NAME}.absmax": stored})
    expected = stored.float().view(torch.uint8)
    assert torch.equal(files.read_bytes(NAME, "absmax", 6, 75), expected[6:75])


def test_the_subtracted_mean_comes_as_fp32(tmp_path: Path) -> None:
    tensors = parts(nested=True)
    state = json.loads(bytes(tensors[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist()))
    files = opened(tmp_path, tensors)
    found = files.read_bytes(NAME, "nested_offset", 0, 4).view(torch.float32)
    assert found.item() == pytest.approx(state["nested_offset"], rel=1e-7)


def test_everything_that_is_wrong_with_a_matrix_is_named_at_once(tmp_path: Path) -> None:
    tensors = parts(nested=True)
    del tensors[f"{NAME}.nested_quant_map"]
    tensors[NAME] = tensors[NAME][:-1].contiguous()
    tensors[f"{NAME}.absmax"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, tensors)
    for words in (
        f"missing `{NAME}.nested_quant_map`",
        f"`{NAME}.absmax` has shape [3], its matrix needs [19]",
        "codes of a [12, 100] matrix need 600 bytes",
    ):
        assert words in caught.value.message


@pytest.mark.parametrize("text", ["{", "{}", '{"shape": null}', '{"blocksize": 0}'])
def test_a_quant_state_that_says_nothing_is_named(tmp_path: Path, text: str) -> None:
    tensors = parts(nested=False)
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    if "blocksize" in text:
        text = json.dumps(json.loads(bytes(tensors[key].tolist())) | json.loads(text))
    tensors[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="cannot be read"):
        opened(tmp_path, tensors)
