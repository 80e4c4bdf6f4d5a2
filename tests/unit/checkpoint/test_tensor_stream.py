"""Files written tensor by tensor are what safetensors itself reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fsdpq.checkpoint.tensor_stream import TensorSpec, TensorStream


def test_safetensors_reads_back_odd_sizes_and_dtypes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1,), (3,), (7, 5), (8, 2), (2, 3, 4), (), (0, 4)]
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.float16, torch.bool]
    tensors = {
        f'{index}.{dtype} "é': torch.randint(0, 2, size, generator=generator).to(dtype)
        for index, size in enumerate(sizes)
        for dtype in dtypes
    }
    path = tmp_path / "model.safetensors"
    with TensorStream(path, tensors) as stream:
        written = sum(stream.write(name, tensor) for name, tensor in tensors.items())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert written == sum(tensor.nbytes for tensor in tensors.values())


def test_transposed_tensors_are_written_by_rows(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    path = tmp_path / "model.safetensors"
    with TensorStream(path, ["w"]) as stream:
        stream.write("w", tensor)
    assert torch.equal(load_file(path)["w"], tensor)


def test_an_error_leaves_no_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(KeyError), TensorStream(path, ["w"]) as stream:
        stream.write("w", {}["no such tensor"])
    assert path.read_bytes()[:8] == bytes(8)


def test_pieces_make_up_a_tensor_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "odd": torch.arange(15.0).view(5, 3).bfloat16(),
        "even": torch.arange(24.0).view(8, 3),
    }
    with TensorStream(path, tensors) as stream:
        for name, tensor in tensors.items():
            spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            assert stream.write_pieces(spec, tensor.split(2)) == tensor.nbytes
    found = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    spec = TensorSpec("short", torch.float32, (8, 3))
    with pytest.raises(ValueError, match="its pieces 48"), TensorStream(path, ["short"]) as stream:
        stream.write_pieces(spec, [torch.zeros(4, 3)])
