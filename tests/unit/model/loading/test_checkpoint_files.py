"""Rows are read as the library reads them; what does not fit is explained before any is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny import save_tiny_llama
from transformers import AutoModelForCausalLM

from fsdpq.errors import CheckpointError
from fsdpq.model.loading.checkpoint_files import DTYPES, CheckpointFiles, check_tensors
from fsdpq.model.loading.checkpoint_names import ModelTensors
from fsdpq.tensor_files.header import DTYPE_BITS


def _save(directory: Path) -> Path:
    save_file(
        {"a": torch.arange(12.0).reshape(6, 2), "b": torch.ones(3)},
        directory / "model.safetensors",
    )
    return directory


def test_rows_of_every_dtype_are_the_librarys(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (7, 3, 16), generator=generator, dtype=torch.uint8)
    for name in ("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"):
        assert DTYPES[name].itemsize == 1
    tensors = {str(d): raw.clone().view(d) for d in DTYPES.values()} | {"empty": torch.empty(0, 3)}
    tensors["scalar"] = torch.tensor(3.0, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)
    assert files.names == set(tensors)
    for name, tensor in tensors.items():
        stop = min(5, len(tensor)) if tensor.dim() else 1
        rows = files.read_rows(name, min(2, stop), stop)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as library:
            part = library.get_slice(name)
            expected = part[2:5] if tensor.dim() else part[...]
        assert rows.dtype == expected.dtype
        assert rows.shape == expected.shape
        assert rows.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
    assert all(DTYPE_BITS[name] == 8 * dtype.itemsize for name, dtype in DTYPES.items())


def test_rows_of_stacked_matrices_are_read_alone(tmp_path: Path) -> None:
    stack = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
    save_file({"a": stack}, tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)
    assert files.num_rows("a") == 30
    assert files.read_matrix_rows("a", 7, 22).equal(stack.reshape(-1, 4)[7:22])
    assert files.num_read_bytes == 15 * 4 * 4


def test_a_rank_without_rows_reads_none(tmp_path: Path) -> None:
    """It still asks for them: where rows are read to is where they are quantized."""
    name, hidden = "model.layers.0.self_attn.q_proj.weight", 192
    hf = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path, tied=False))
    shapes = {key: tuple(tensor.shape) for key, tensor in hf.state_dict().items()}
    tensors = ModelTensors(CheckpointFiles(tmp_path), hf, shapes, ignored=set())
    rows = tensors.read_matrix_rows(name, hidden, hidden)
    assert rows.shape == (0, hidden)
    assert rows.dtype == torch.float32
    assert tensors.num_read_bytes == 0


def test_read_bytes_are_counted(tmp_path: Path) -> None:
    files = CheckpointFiles(_save(tmp_path))
    files.read_rows("a", 2, 4)
    assert files.num_read_bytes == 2 * 2 * 4
    files.read_rows("b", 0, 3)
    assert files.num_read_bytes == 2 * 2 * 4 + 3 * 4


def test_resident_memory_is_what_was_asked_for(tmp_path: Path) -> None:
    """A mapping would show the touched pages in the file-backed part of resident memory."""
    save_file({"a": torch.zeros(1 << 14, 1 << 10)}, tmp_path / "model.safetensors")
    files = CheckpointFiles(tmp_path)

    def file_backed_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssFile"))
        return 1024 * int(line.split()[1])

    files.read_rows("a", 0, 1)  # whatever code this touches is resident from here on
    before = file_backed_bytes()
    total = sum(float(files.read_rows("a", r, r + 1024).sum()) for r in range(0, 1 << 14, 1024))
    assert total == 0
    assert file_backed_bytes() - before < 4 << 20, "64 MiB were read"


def test_rows_are_read_from_several_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    files = CheckpointFiles(tmp_path)
    assert files.read_rows("a", 1, 2).tolist() == [[0.0, 0.0]]
    assert files.read_rows("b", 1, 3).tolist() == [1.0, 1.0]


def test_all_misfits_and_all_damage_are_named_at_once(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(6, 2)}, tmp_path / "model-1.safetensors")
    path = tmp_path / "model-2.safetensors"
    save_file({"b": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:-5])
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    weight_map["gone"] = "model-3.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files, found = CheckpointFiles(tmp_path), {"a": (6, 2), "b": (3,)}
    expected = {"a": (6, 3), "c": (1,), "gone": (2,)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(files, found, expected, ignored=set(), lost=files.lost)
    size = path.stat().st_size
    assert caught.value.message.splitlines()[1:] == [
        "  `model-3.safetensors` is missing, the index names it",
        (f"  `model-2.safetensors` ends at byte {size}, tensor `b` needs bytes {size - 7} to "
        f"{size + 5}"),
        "  missing `c`",
        "  unexpected `b`",
        "  `a` has shape [6, 2], the model needs [6, 3]",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="damaged"):
        files.read_rows("a", 0, 1)


def test_what_fits_passes(tmp_path: Path) -> None:
    files = CheckpointFiles(_save(tmp_path))
    check_tensors(files, {"a": (6, 2), "b": (3,)}, {"a": (6, 2)}, ignored={"b"})


def test_a_file_cut_after_opening_is_named_with_rank_tensor_and_offset(tmp_path: Path) -> None:
    path = _save(tmp_path) / "model.safetensors"
    files = CheckpointFiles(tmp_path)
    assert files.read_rows("a", 0, 1).tolist() == [[0.0, 1.0]]
    size = path.stat().st_size
    os.truncate(path, size - 30)
    with pytest.raises(CheckpointError) as caught:
        files.read_rows("a", 2, 6)
    start = files.matrix_range("a", 2, 6).start
    assert caught.value.message == (
        f"rank 0: `{path}` ends at byte {size - 30}, while bytes {start} to {start + 32} of tensor "
        "`a` were read"
    )
    assert caught.value.hint


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = _save(tmp_path) / "model.safetensors"
    files = CheckpointFiles(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"rank 0: .* cannot be read at byte \d+: No such"):
        files.read_rows("a", 0, 1)


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    entry = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(CheckpointError, match="is in F6_E2M3, which torch cannot read"):
        check_tensors(CheckpointFiles(tmp_path), {"a": (4,)}, {"a": (4,)}, ignored=set())


def test_pickles_are_refused_with_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle weights only") as caught:
        CheckpointFiles(tmp_path)
    assert "save_pretrained" in caught.value.hint
