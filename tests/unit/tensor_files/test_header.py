"""Headers of safetensors files: the library's own answer, and files that lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fsdpq.errors import CheckpointError
from fsdpq.tensor_files.header import DTYPE_BITS, MAX_HEADER_BYTES, check_header, read_header

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64,
]  # fmt: skip


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_entries_are_the_librarys(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    shapes = [(), (0, 3), (5,), (2, 3), (2, 1, 4)]
    tensors = {
        f"{dtype}-{shape}": torch.ones(shape).to(dtype) for dtype in DTYPES for shape in shapes
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header, raw = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt"}
    with safe_open(path, framework="pt") as library:
        assert header.entries.keys() == set(library.keys())
        for name, found in header.entries.items():
            assert list(found.shape) == library.get_slice(name).get_shape()
            assert found.dtype == library.get_slice(name).get_dtype()
            flat = tensors[name].reshape(-1)
            assert raw[found.start : found.stop] == flat.view(torch.uint8).numpy().tobytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_refused_whenever_the_library_refuses_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int8)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)) | st.just(len(raw)))
    path.write_bytes(raw[:cut])
    header, problems = check_header(path)
    assert header is not None or problems
    try:
        with safe_open(path, framework="np") as library:
            names = set(library.keys())
    except SafetensorError:
        assert problems
    else:
        if not problems:
            assert header is not None
            assert header.entries.keys() == names


def test_everything_wrong_is_said_with_tensor_and_offset(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"x": 1},
        "cut": entry("F32", [4], 24, 40),
        "dtype": entry("F33", [1], 0, 4),
        "late": entry("U8", [8], 16, 24),
        "no": {"dtype": "U8"},
        "over": entry("U8", [10], 8, 18),
        "short": entry("F32", [3], 0, 8),
        "turned": entry("U8", [0], 8, 4),
    }
    path = write(tmp_path / "m.safetensors", header, bytes(30))
    start = path.stat().st_size - 30
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.message.splitlines() == [
        f"`{path}` cannot be used:",
        "  `m.safetensors`: `__metadata__` is no table of texts",
        "  `m.safetensors`: tensor `dtype` has the dtype `F33`, which the format does not have",
        "  `m.safetensors`: tensor `no` has no `shape` and no `data_offsets`",
        (
            "  `m.safetensors`: tensor `short` of shape [3] in F32 takes 12 bytes, its range is bytes "
            f"{start} to {start + 8}"
        ),
        "  `m.safetensors`: tensor `turned` has `data_offsets` that are no beginning and end",
        (
            f"  `m.safetensors`: tensor `late` needs bytes {start + 16} to {start + 24}, `over` has "
            f"bytes up to {start + 18}"
        ),
        (
            f"  `m.safetensors` ends at byte {start + 30}, tensor `cut` needs bytes {start + 24} to "
            f"{start + 40}"
        ),
    ]


def test_bytes_of_no_tensor_are_refused_as_the_library_does(tmp_path: Path) -> None:
    gap = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 8, 12)}
    path = write(tmp_path / "gap.safetensors", gap, bytes(12))
    with pytest.raises(CheckpointError, match=r"bytes \d+ to \d+ belong to no tensor"):
        read_header(path)
    tail = write(tmp_path / "tail.safetensors", {"a": entry("U8", [4], 0, 4)}, bytes(5))
    with pytest.raises(CheckpointError, match=r"its last, belong to no tensor"):
        read_header(tail)
    for refused in (path, tail):
        with pytest.raises(SafetensorError), safe_open(refused, framework="np"):
            pass


HOSTILE = {
    "length of 2^63": (b"{}", 2**63, f"claims a header of {2**63} bytes"),
    "length beyond the file": (b"{}", 500, "ends at byte 10, its header needs bytes 8 to 508"),
    "deep": (b"[" * 100_000, None, "nested as no header"),
    "deep beside much text": (b'{"a":' * 20_000 + b" " * 400_000, None, "nested as no header"),
    "twice": (b'{"a":{"dtype":"U8"},"a":{"dtype":"U8"}}', None, "names `a` twice"),
    "NaN": (b'{"a":NaN}', None, "the value NaN"),
    "no text": (b'{"\xff":1}', None, "no UTF-8 text, at byte 10"),
    "no JSON": (b'{"a" 1}', None, "no JSON, at byte 13"),
    "no table": (b"[1]", None, "no table of tensors"),
    "negative": (json.dumps({"a": entry("U8", [4], -4, 0)}).encode(), None, "`data_offsets`"),
    "negative size": (json.dumps({"a": entry("U8", [-4], 0, 4)}).encode(), None, "`shape`"),
    "true size": (json.dumps({"a": entry("U8", [True], 0, 1)}).encode(), None, "`shape`"),
    "huge": (json.dumps({"a": entry("U8", [2**62] * 64, 0, 1)}).encode(), None, "more than 2^63"),
    "long number": (b'{"a":%s}' % (b"9" * 100_000), None, "a number of 100000 digits"),
    "control characters": (b'{"\\u001b[2J":1}', None, "\N{REPLACEMENT CHARACTER}[2J"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    text, length, message = HOSTILE[case]
    path = write(tmp_path / "m.safetensors", text, length=length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in caught.value.message
    assert "\x1b" not in caught.value.message


def test_time_and_memory_are_bounded_by_the_header(tmp_path: Path) -> None:
    """2.5 MB of the worst texts: a process reads each of them in at most 60 MB."""
    size = 2_500_000
    texts = {
        "lists": b"[" + b"[]," * (size // 3),
        "tables": b'{"a":[' + b"{}," * (size // 3),
        "numbers": b'{"a":[' + b"0," * (size // 2),
        "sparse tables": b'{"a":[' + b'{"aaaaaaaaaaaaaaaaaa":0},' * (size // 25),
        "names": b"{" + b",".join(b'"%d":0' % n for n in range(size // 11)) + b"}",
    }
    paths = [write(tmp_path / f"{name}.safetensors", text) for name, text in texts.items()]
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from fsdpq.tensor_files.header import check_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert all(check_header(Path(path))[1] for path in sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 60_000, "KiB; some 20 times the header"
    assert time.monotonic() - started < 60, "a hang, not a slow machine"


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_header(tmp_path / "m.safetensors")


def test_short_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="ends at byte 3, before the length of its header"):
        read_header(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "b.safetensors")
    assert DTYPE_BITS["BF16"] == 16
    assert MAX_HEADER_BYTES == 100_000_000
