"""What a check of the self-test is, and how it compares.

A check passes by returning what it compared. Every difference is an exception that says where the
first one is: a check that cannot run here says why, and is never counted as passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class CheckFailedError(Exception):
    """Something is not what it should be; the text says what."""


class CheckSkippedError(Exception):
    """The check cannot run here; the text says why."""


@dataclass(frozen=True)
class Bench:
    """What every check runs on.

    Attributes:
        device: this rank's device.
        mesh: all ranks, along one axis.
    """

    device: torch.device
    mesh: DeviceMesh


@dataclass(frozen=True)
class Check:
    """One line of the self-test.

    Attributes:
        group: heading that it stands under.
        name: unique within the group.
        run: does it and returns what was compared. Ranks: all (collective).
        remedy: what the user can do where it fails.
    """

    group: str
    name: str
    run: Callable[[Bench], str]
    remedy: str


def require_same_bytes(what: str, found: Tensor, expected: Tensor) -> int:
    """Compares two tensors byte by byte, flattened; returns how many bytes there are.

    Raises:
        CheckFailedError: they differ; names the first byte that does.
    """
    ours, theirs = as_bytes(found), as_bytes(expected)
    if ours.numel() != theirs.numel():
        text = f"{what} has {ours.numel()} bytes instead of {theirs.numel()}"
        raise CheckFailedError(text)
    different = (ours != theirs).nonzero().flatten()
    if different.numel():
        first = int(different[0])
        raise CheckFailedError(
            f"{what}: {different.numel()} of {ours.numel()} bytes differ, the first is byte "
            f"{first}: {int(ours[first]):#04x} instead of {int(theirs[first]):#04x}"
        )
    return ours.numel()


def require_close(what: str, found: Tensor, expected: Tensor, *, tolerance: float) -> float:
    """Compares two tensors of one shape; returns their relative difference.

    Args:
        what: named in the error.
        found: to be checked.
        expected: the reference.
        tolerance: most that the norm of the difference may be, relative to the reference's norm.

    Raises:
        CheckFailedError: they differ by more, or one is not finite.
    """
    scale = expected.double().norm()
    difference = float((found.double() - expected.double()).norm() / scale)
    if not difference <= tolerance:  # NaN is a failure too
        raise CheckFailedError(
            f"{what} differs by {difference:.1e} of its norm, more than {tolerance:.0e}"
        )
    return difference


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of ``tensor``, uint8 and flat."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def count_text(num_bytes: int) -> str:
    """Returns ``num_bytes`` for a line of the self-test, ``262,146 bytes``."""
    return f"{num_bytes:,} bytes"
