"""A GPU that is not there, for fake tensors, and a process group whose other ranks are not.

FSDP2 asks a device for streams and events, and autograd for a guard of it. torch has a place for
devices of other makers (``PrivateUse1``) that Python can fill: this one has a name, streams that do
nothing, and no memory. Tensors on it are fake tensors only, so that a machine without a GPU tells
device memory and host memory apart. A fake ``cuda`` tensor does not do: in a build of torch for
CPUs autograd aborts the process (torch 2.13), and streams cannot be made.

Ranks: one process stands for rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # c10d's collectives of fake tensors
from torch.testing._internal.distributed import fake_pg
from torch.utils import backend_registration

NAME = "gpu"
BACKEND = "unreal"


class _Device:
    """What torch asks of a device's module, ``torch.gpu``."""

    Stream = torch.cpu.Stream
    Event = torch.cpu.Event

    def is_available(self) -> bool:
        """No: else fake tensors would try to make real ones for constants."""
        return False

    def is_initialized(self) -> bool:
        """Whether it was started."""
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """Number of such devices."""
        return 1

    def current_device(self) -> int:
        """Index of the device of this process."""
        return 0

    def set_device(self, device: Any) -> None:
        """Chooses a device; there is one."""

    def manual_seed_all(self, seed: int) -> None:
        """Seeds generators; there are none."""

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:  # noqa: ARG002
        """Returns the state of a generator, for checkpointed layers with dropout."""
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        """Takes a state of `get_rng_state`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Returns the dtypes of autocast."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def current_stream(self, device: Any = None) -> torch.cpu.Stream:  # noqa: ARG002
        """Returns the one stream."""
        return torch.cpu.current_stream()

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Returns a context that runs on ``stream``."""
        return torch.cpu.stream(stream)

    def synchronize(self, device: Any = None) -> None:
        """Waits for nothing."""


def register_unreal_gpu() -> torch.device:
    """Registers the device in this process, once and for good, and returns it."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Device())
        # FSDP2 makes an empty tensor per group outside of any mode (torch 2.13).
        _LIBRARY.impl("empty.memory_format", _empty_on_meta)
        # One kernel on a GPU; without one autograd would take it apart.
        _LIBRARY.impl("silu_backward", lambda grad, x: torch.empty_like(grad + x))
    return torch.device(NAME, 0)


_LIBRARY = torch.library.Library("aten", "IMPL", "PrivateUse1")


def _empty_on_meta(
    size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any
) -> torch.Tensor:
    del options
    return torch.empty(size, dtype=dtype, device="meta")


def start_unreal_group(num_ranks: int) -> None:
    """Makes this process rank 0 of ``num_ranks``; collectives do nothing, on any device."""
    if BACKEND not in dist.Backend.backend_list:
        devices = ["cpu", "cuda", *([NAME] if hasattr(torch, NAME) else [])]
        dist.Backend.register_backend(
            BACKEND, fake_pg._create_fake_pg, extended_api=True, devices=devices
        )
    dist.init_process_group(BACKEND, store=fake_pg.FakeStore(), rank=0, world_size=num_ranks)
