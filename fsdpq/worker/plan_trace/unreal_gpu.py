"""A GPU that is not there, for fake tensors, and a process group whose other ranks are not.

FSDP2 asks a device for streams and events, and autograd for a guard of it. torch has a place for
devices of other makers (``PrivateUse1``) that Python can fill: this one has a name, streams that do
nothing, and no memory. Tensors on it are fake tensors only, so that a machine without a GPU tells
device memory and host memory apart. A fake ``cuda`` tensor does not do: in a build of torch for
CPUs autograd aborts the process (torch 2.13), and streams cannot be made.

Ranks: one process stands for rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # c10d's collectives of fake tensors
from torch.testing._internal.distributed import fake_pg
from torch.utils import backend_registration

from fsdpq.plan.workload import Workload

NAME = "gpu"
BACKEND = "unreal"
LOCAL_RANKS = "LOCAL_WORLD_SIZE"
"""What torchrun tells a rank of its machine; `fsdpq.fsdp.mesh` reads it."""


class _Event:
    """A point of a stream; it is always past."""

    def record(self, stream: Any = None) -> None:
        """Puts the event into ``stream``."""

    def wait(self, stream: Any = None) -> None:
        """Makes ``stream`` wait."""

    def synchronize(self) -> None:
        """Waits."""


class _Stream:
    """A queue of work, of which there is none."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        del device, priority

    def record_event(self, event: _Event | None = None) -> _Event:
        """Returns an event at the end of what is queued."""
        return event or _Event()

    def wait_event(self, event: _Event) -> None:
        """Waits for an event."""

    def wait_stream(self, stream: _Stream) -> None:
        """Waits for all of another stream."""

    def synchronize(self) -> None:
        """Waits for all of it."""


class _Device:
    """What torch asks of a device's module, ``torch.gpu``."""

    Stream = _Stream
    Event = _Event

    def __init__(self) -> None:
        self._stream = _Stream()

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

    def current_stream(self, device: Any = None) -> _Stream:  # noqa: ARG002
        """Returns the stream that work goes to."""
        return self._stream

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Returns a context that runs on ``stream``."""
        return nullcontext(stream)

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


@contextmanager
def unreal_group(workload: Workload) -> Iterator[None]:
    """Makes this process rank 0 of a run's ranks; collectives do nothing, on any device."""
    has_gpu = hasattr(torch, NAME)
    backend = f"{BACKEND}_{NAME}" if has_gpu else BACKEND
    if backend not in dist.Backend.backend_list:
        devices = ["cpu", NAME] if has_gpu else ["cpu", "cuda"]
        dist.Backend.register_backend(
            backend, fake_pg._create_fake_pg, extended_api=True, devices=devices
        )
    before = os.environ.get(LOCAL_RANKS)
    os.environ[LOCAL_RANKS] = str(workload.num_local_ranks)
    store, num_ranks = fake_pg.FakeStore(), workload.num_ranks
    dist.init_process_group(backend, store=store, rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        os.environ.pop(LOCAL_RANKS)
        if before is not None:
            os.environ[LOCAL_RANKS] = before
