"""Reads and checks the header of a safetensors file: names, dtypes, shapes, byte ranges. No torch.

A file is eight bytes of length, a JSON header of that length, and the tensors' bytes. Whatever it
claims is compared with the file's size before anybody reads by it, and all that is wrong is said at
once. Files come from strangers: memory and time are bounded by the header's own size, which the
format limits to 100 MB. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from fsdpq.errors import CheckpointError

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element of every dtype of the format."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_DIMS = 64
MAX_SHOWN = 20
DAMAGED_HINT = "delete the file and download the model again"

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        name: of the tensor.
        dtype: as the format calls it, a key of `DTYPE_BITS`.
        shape: in elements; empty for a scalar.
        start: offset of its first byte from the beginning of the file.
        stop: offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        path: the file.
        data_start: offset of the first tensor's bytes.
        metadata: free text by name.
        entries: the tensors by name.
    """

    path: Path
    data_start: int
    metadata: dict[str, str]
    entries: dict[str, Entry]


def read_header(path: Path) -> Header:
    """Returns the checked header of a safetensors file; the tensors' bytes are not read.

    Raises:
        CheckpointError: the file cannot be read, is no safetensors file, or is not whole; names
            all that is wrong, with tensors and byte offsets.
    """
    header, problems = check_header(path)
    if header is None or problems:
        raise CheckpointError(
            join_problems(f"`{path}` cannot be used", problems), hint=DAMAGED_HINT
        )
    return header


def check_header(path: Path) -> tuple[Header | None, list[str]]:
    """Returns the header and all that is wrong with the file.

    The header is None where nothing of it can be read. Tensors that are wrong by themselves (their
    dtype, their shape against their bytes) are left out of its ``entries``.
    """
    try:
        file_bytes, text = _read_text(path)
        document = _parse(text)
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"`{path.name}` {_reason(error)}"]
    data_start = _LENGTH_BYTES + len(text)
    metadata = document.pop(_METADATA, {})
    problems: list[str] = []
    if not _is_text_map(metadata):
        problems.append(f"`{path.name}`: `{_METADATA}` is no table of texts")
        metadata = {}
    entries: dict[str, Entry] = {}
    for name, value in document.items():
        found = _build_entry(name, value, data_start)
        if isinstance(found, Entry):
            entries[name] = found
        else:
            problems.append(f"`{path.name}`: tensor `{shorten(name)}` {found}")
    problems += _check_ranges(path.name, entries.values(), data_start, file_bytes, bool(problems))
    return Header(path, data_start, cast("dict[str, str]", metadata), entries), problems


def join_problems(what: str, problems: list[str]) -> str:
    """Returns ``what`` and the problems below it, one a line, at most `MAX_SHOWN`."""
    more = len(problems) - MAX_SHOWN
    lines = problems[:MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return f"{what}:\n  " + "\n  ".join(lines)


def shorten(name: str) -> str:
    """Returns a name out of a file as a message can show it."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:200])
    return name if len(name) <= 120 else f"{name[:117]}..."


def _read_text(path: Path) -> tuple[int, bytes]:
    """Returns the size of the file and the bytes of its JSON header."""
    status = path.stat()  # before opening: opening a pipe waits for a writer
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no regular file")
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        first = file.read(_LENGTH_BYTES)
        if len(first) < _LENGTH_BYTES:
            raise ValueError(f"ends at byte {file_bytes}, before the length of its header")
        length = int.from_bytes(first, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"claims a header of {length} bytes, the format allows {MAX_HEADER_BYTES}: it is "
                "no safetensors file, or damaged at byte 0"
            )
        if _LENGTH_BYTES + length > file_bytes:
            raise ValueError(
                f"ends at byte {file_bytes}, its header needs bytes {_LENGTH_BYTES} to "
                f"{_LENGTH_BYTES + length}"
            )
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"ended at byte {_LENGTH_BYTES + len(text)} while its header was read")
    return file_bytes, text


def _parse(text: bytes) -> dict[str, Any]:
    # A tensor takes three brackets in some 50 bytes; denser text is made to fill memory.
    if text.count(b"[") + text.count(b"{") > 64 + len(text) // 12:
        raise ValueError("has a header that is nested as no header of tensors is")
    try:
        document: Any = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_parse_int,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"has a header that is no UTF-8 text, at byte {_LENGTH_BYTES + error.start}"
        ) from error
    except json.JSONDecodeError as error:
        at = _LENGTH_BYTES + len(error.doc[: error.pos].encode())
        raise ValueError(f"has a header that is no JSON, at byte {at}: {error.msg}") from error
    if not isinstance(document, dict):
        raise ValueError("has a header that is no table of tensors")
    return cast("dict[str, Any]", document)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"has a header that names `{shorten(twice)}` twice")
    return found


def _parse_int(text: str) -> int:
    if len(text) > 20:  # long numbers cost quadratic time
        raise ValueError(f"has a header with a number of {len(text)} digits")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"has a header with the value {text}, which is no JSON")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "has a header that is nested as no header of tensors is"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error)


def _is_text_map(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(text, str) for text in cast("dict[str, Any]", value).values())


def _build_entry(name: str, value: Any, data_start: int) -> Entry | str:
    """Returns the entry, or what is wrong with it."""
    if not isinstance(value, dict):
        return "is described by no table"
    fields = cast("dict[str, Any]", value)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in fields]
    if missing:
        return f"has no {' and no '.join(f'`{key}`' for key in missing)}"
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"has the dtype `{shorten(str(dtype))}`, which the format does not have"
    shape, offsets = _numbers(fields["shape"]), _numbers(fields["data_offsets"])
    if shape is None:
        return f"has a `shape` that is no list of at most {MAX_DIMS} sizes"
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has `data_offsets` that are no beginning and end"
    start, stop = data_start + offsets[0], data_start + offsets[1]
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (stop - start):
        return (
            f"of shape {list(shape)} in {dtype} takes {_bytes_text(bits)} bytes, its range is "
            f"bytes {start} to {stop}"
        )
    return Entry(name, dtype, shape, start, stop)


def _numbers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(cast("list[Any]", value)) > MAX_DIMS:
        return None
    numbers = tuple(cast("list[Any]", value))
    valid = all(type(n) is int and 0 <= n <= _MAX_NUMBER for n in numbers)
    return numbers if valid else None


def _bytes_text(bits: int) -> str:
    whole, rest = divmod(bits, 8)
    return "more than 2^63" if whole > _MAX_NUMBER else f"{whole}{f' and {rest}/8' * bool(rest)}"


def _check_ranges(
    file: str, entries: Iterable[Entry], data_start: int, file_bytes: int, incomplete: bool
) -> Iterator[str]:
    """Yields tensors that lie over others or beyond the end, and bytes that are of no tensor.

    Args:
        file: name of the file.
        entries: its tensors.
        data_start: where the first one must start.
        file_bytes: where the last one must end.
        incomplete: some tensors are wrong themselves, so that gaps say nothing.
    """
    previous, stop = "", data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        place = f"tensor `{shorten(entry.name)}` needs bytes {entry.start} to {entry.stop}"
        if entry.start < stop and entry.num_bytes:
            yield f"`{file}`: {place}, `{shorten(previous)}` has bytes up to {stop}"
        elif entry.start > stop and not incomplete:
            yield f"`{file}`: bytes {stop} to {entry.start} belong to no tensor"
        if entry.stop > file_bytes:
            yield f"`{file}` ends at byte {file_bytes}, {place}"
        if entry.stop > stop:
            previous, stop = entry.name, entry.stop
    if stop < file_bytes and not incomplete:
        yield f"`{file}`: bytes {stop} to {file_bytes}, its last, belong to no tensor"
