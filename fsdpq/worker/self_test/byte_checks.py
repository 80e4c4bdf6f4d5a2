"""Do bytes survive FSDP's gather on this device?

FSDP2 copies shards with ``torch._foreach_copy_``, whose CUDA kernel reads bf16 as numbers and
rewrites the bit patterns of NaN (https://github.com/pytorch/pytorch/issues/159333,
https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945). Codes are stored as uint8, so
that it cannot; whether that holds on the device at hand is what these checks find out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsdpq.fsdp.offload import offload_policy
from fsdpq.worker.self_test.check import (
    Bench,
    Check,
    CheckFailedError,
    count_text,
    require_same_bytes,
)
from fsdpq.worker.self_test.groups import gather_group, shard_tensors

GROUP = "bytes"
REMEDY = (
    "do not train quantized bases on this device: their weights would be rewritten; try another "
    "version of torch or of the driver, and report this output"
)
NUM_PATTERNS = 1 << 16
"""Bit patterns of 16 bits, of which bf16 has 254 NaNs and fp16 2046."""


def byte_tensors() -> dict[str, Tensor]:
    """Returns uint8 matrices with every byte value in every position of a word, CPU.

    ``words`` and ``shifted`` hold all patterns of 16 bits, the latter at odd addresses; rows of 129
    bytes start at every alignment. ``positions`` holds all values of a byte at all 8 places of a
    64-bit word whose other bytes are ``7f`` or ``ff``, which are NaN in every floating format. The
    rows of none divide by 2, 3 or 4, and ``few`` has fewer rows than many a run has ranks.
    """
    words = torch.arange(NUM_PATTERNS, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    places = torch.arange(8).repeat_interleave(256)
    values = torch.arange(256, dtype=torch.uint8).repeat(8)
    positions = torch.cat([torch.full((2048, 8), fill, dtype=torch.uint8) for fill in (0x7F, 0xFF)])
    for half in (0, 2048):
        positions[torch.arange(2048) + half, places] = values
    few = torch.arange(255, 234, -1, dtype=torch.uint8).reshape(3, 7)
    return {
        "words": _as_rows(words, 129),
        "shifted": _as_rows(torch.cat([words[:1], words]), 129),
        "positions": torch.cat([positions, positions[:1]]),
        "few": few,
        "one": few[:1, :5].contiguous(),
    }


def number_tensors() -> dict[str, Tensor]:
    """Returns a norm in bf16 and LoRA matrices in fp32, with zeros of both signs and subnormals."""
    generator = torch.Generator().manual_seed(5)
    norm = torch.randn(511, generator=generator).to(torch.bfloat16)
    lora_a, lora_b = (torch.randn(shape, generator=generator) for shape in ((3, 65), (257, 3)))
    norm[:3] = torch.tensor([-0.0, 1e-39, -1e-40])
    lora_b[:3, 0] = torch.tensor([-0.0, 1e-40, -1e-45])
    return {"norm": norm, "lora_A": lora_a, "lora_B": lora_b}


def _as_rows(data: Tensor, width: int) -> Tensor:
    """Returns ``data`` in rows of ``width``, an odd number of them, filled up with ``ff``."""
    num_rows = -(-data.numel() // width) | 1
    rows = torch.full((num_rows * width,), 0xFF, dtype=torch.uint8)
    rows[: data.numel()] = data
    return rows.reshape(num_rows, width)


def check_copy_kernel(bench: Bench) -> str:
    """Copies all 16-bit patterns by ``torch._foreach_copy_``: as bytes they must stay as they are.

    What the same kernel does to bf16 is told, and is no failure: nothing is stored so.
    """
    source = byte_tensors()["words"].to(bench.device)
    pieces = list(source.flatten().split([1, 2, 129, 4096, source.numel() - 4228]))
    copies = [torch.empty_like(piece) for piece in pieces]
    torch._foreach_copy_(copies, pieces)
    num_bytes = require_same_bytes("a copy", torch.cat(copies), source)
    patterns = torch.arange(NUM_PATTERNS, dtype=torch.int32, device=bench.device).to(torch.int16)
    as_bf16 = [patterns.view(torch.bfloat16)]
    copied = [torch.empty_like(as_bf16[0])]
    torch._foreach_copy_(copied, as_bf16)
    rewritten = int((copied[0].view(torch.int16) != patterns).sum())
    told = f"rewrites {rewritten}" if rewritten else "keeps all"
    return f"{count_text(num_bytes)} equal (as bf16 this device {told} of {NUM_PATTERNS} patterns)"


def check_gather_of_bytes(bench: Bench) -> str:
    """Gathers a group of bytes alone."""
    return _check_gather(byte_tensors(), bench)


def check_gather_of_mixed_group(bench: Bench) -> str:
    """Gathers bytes, bf16 norms and fp32 LoRA as one group, as a decoder layer is gathered."""
    return _check_gather(byte_tensors() | number_tensors(), bench) + ", beside bf16 and fp32"


def check_offload(bench: Bench) -> str:
    """Gathers the mixed group twice from host memory, pinned where that is possible."""
    policy, notice = offload_policy("cpu", bench.device)
    tensors = byte_tensors() | number_tensors()
    group = shard_tensors(tensors, bench, policy=policy)
    away = sorted({parameter.device.type for parameter in group.parameters()} - {"cpu"})
    if away:
        raise CheckFailedError(f"shards lie on {', '.join(away)} instead of in host memory")
    num_bytes = 0
    for _ in range(2):
        num_bytes = _compare(gather_group(group), tensors)
    pinned = getattr(policy, "pin_memory", False)
    where = "pinned memory" if pinned else notice or "host memory, not pinned on a CPU"
    return f"{count_text(num_bytes)} equal, twice, from {where}"


def _check_gather(tensors: dict[str, Tensor], bench: Bench) -> str:
    num_bytes = _compare(gather_group(shard_tensors(tensors, bench)), tensors)
    return f"{count_text(num_bytes)} equal, every value in every place of a word"


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    return sum(
        require_same_bytes(f"`{name}`", found[name].cpu(), tensor)
        for name, tensor in expected.items()
    )


CHECKS = (
    Check(GROUP, "copy kernel", check_copy_kernel, REMEDY),
    Check(GROUP, "gather", check_gather_of_bytes, REMEDY),
    Check(GROUP, "gather, mixed group", check_gather_of_mixed_group, REMEDY),
    Check(
        GROUP, "offload to the host", check_offload, "train with `fsdp.offload: none`; " + REMEDY
    ),
)
