"""A training step on a device that does not exist: which tensor is where, and do they meet.

torch's fake tensors have a shape and a device and no values; operations between two devices are
refused as on a real one. With FSDP2's streams and collectives made up as well, a sharded model with
CPU offload goes through forward, backward and the optimizer as on a GPU.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

from fsdpq.data.dealing.collate import Step, build_step
from fsdpq.dist import own_shard
from fsdpq.fsdp import offload, wrap
from fsdpq.fsdp.activations import HostActivations
from fsdpq.fsdp.mesh import build_mesh
from fsdpq.model.loading.buffers import allocate
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.registry import resolve_builder
from fsdpq.training.step import train_step
from fsdpq.worker.assemble import apply_adapter, build_model, shard_model
from support.tiny import random_rows, tiny_recipe

Sections = dict[str, dict[str, Any]]

NUM_RANKS = 2
HOST = torch.device("cpu")


class PretendEvent:
    """An event that is always over."""

    def record(self, *_arguments: object) -> None:
        """Does nothing."""

    def wait(self, *_arguments: object) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""


class PretendStream:
    """A stream on which nothing takes time."""

    def __init__(self, *_arguments: object, **_settings: object) -> None:
        pass

    def wait_stream(self, _other: object) -> None:
        """Does nothing."""

    def wait_event(self, _event: object) -> None:
        """Does nothing."""

    def record_event(self, *_arguments: object) -> PretendEvent:
        """Returns an event that is over."""
        return PretendEvent()


class PretendHandle:
    """What FSDP2 asks of ``torch.cuda``."""

    Stream = PretendStream
    Event = PretendEvent

    @staticmethod
    def current_device() -> int:
        """Returns the only one."""
        return 0

    @staticmethod
    def current_stream(*_arguments: object) -> PretendStream:
        """Returns a stream."""
        return PretendStream()

    @staticmethod
    def stream(_stream: object) -> AbstractContextManager[None]:
        """Returns a context that changes nothing."""
        return nullcontext()


class PretendModule(backend_registration._DummyBackendModule):
    """What torch asks of ``torch.cuda``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Returns what autocast may be asked for: checkpoints save and restore it."""
        return [torch.bfloat16]


class CountingTransfer:
    """Copies at once and counts where to."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def host_memory(self, num_bytes: int) -> Tensor:
        """Returns memory of the host."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, source: Tensor, target: Tensor) -> None:
        """Copies."""
        self.targets.append(target.device.type)
        target.copy_(source)

    def wait(self, _copied: object) -> None:
        """Does nothing: copies are done."""


def start_pretending() -> torch.device:
    """Makes this process see a device, and be rank 0 of a group that answers at once.

    There is no way back: for a process that ends afterwards.
    """
    backend_registration._setup_privateuseone_for_python_backend("pretend", PretendModule())
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    for name, module in list(sys.modules.items()):
        of_fsdp = name.startswith("torch.distributed.fsdp._fully_shard")
        if of_fsdp and hasattr(module, "_get_device_handle"):
            vars(module)["_get_device_handle"] = lambda *_arguments: PretendHandle
    vars(torch.accelerator)["current_stream"] = lambda *_arguments: PretendStream()
    return torch.device("pretend", 0)


def shard_on_meta(recipe: Recipe, directory: Path, device: torch.device) -> Any:
    """Returns the recipe's model, sharded for ``device``, without memory."""
    adapter = resolve_builder("adapter", recipe.adapter)(recipe.adapter)
    dtype = torch.bfloat16
    model = build_model(recipe, directory, adapter, dtype=dtype, trust_remote_code=False)
    apply_adapter(model, adapter)
    vars(offload)["why_not_pinned"] = lambda: "fake tensors cannot be pinned"
    mesh = build_mesh(device, recipe.fsdp)  # reads the values of a tensor
    vars(wrap)["build_mesh"] = lambda *_arguments: mesh
    with FakeTensorMode(allow_non_fake_inputs=True):
        shard_model(model, recipe, device, precision=precision_of(recipe))
    return model


def places_in_steps(directory: Path, recipes: list[Sections]) -> list[dict[str, Any]]:
    """Does a step of each recipe; returns where things were. This process is of no use afterwards.

    Args:
        directory: a tiny checkpoint.
        recipes: sections of the tiny recipe.
    """
    device = start_pretending()
    return [places_in_a_step(directory, sections, device) for sections in recipes]


def places_in_a_step(directory: Path, sections: Sections, device: torch.device) -> dict[str, Any]:
    """Does a step with two micro-batches; returns the device types of what trains and what not."""
    transfer = CountingTransfer()
    host = HostActivations(device, transfer, min_bytes=0)
    vars(wrap)["build_host_activations"] = lambda _device: (host, "")
    recipe = tiny_recipe(**({"model": {"dtype": "bf16"}} | sections))
    model = shard_on_meta(recipe, directory, device)
    rows = random_rows(4 * NUM_RANKS)
    step = build_step(rows, micro_batch_size=2, rank=0, world_size=NUM_RANKS)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        kept = None if recipe.fsdp.offload_trained else device
        allocate(model, HOST, buffers=device, trained=kept)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = resolve_builder("optimizer", recipe.optimizer)(recipe.optimizer, trained)
        gradients: set[str] = set()
        optimizer.register_step_pre_hook(
            lambda *_: gradients.update(_types(p.grad for p in trained.values()))
        )
        result = train_step(
            model, fake_batches(step, mode), optimizer=optimizer,
            parameters=list(trained.values()), device=device,
            max_grad_norm=1.0 if kept else None,  # on the host clipping reads the norm's value
        )  # fmt: skip
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "trained": _types(trained.values()),
        "frozen": _types(p for p in model.parameters() if not p.requires_grad),
        "gradients": gradients,
        "states": {value.device.type for value in states if isinstance(value, Tensor)},
        "norm": result.grad_norm.device.type,
        "activations": {kind: transfer.targets.count(kind) for kind in ("cpu", "pretend")},
    }


def fake_batches(step: Step, mode: FakeTensorMode) -> Step:
    """Returns ``step`` without the values of its tensors."""
    batches = [
        dataclasses.replace(
            batch,
            **{
                field.name: mode.from_tensor(value)
                for field in dataclasses.fields(batch)
                if isinstance(value := getattr(batch, field.name), Tensor)
            },
        )
        for batch in step.micro_batches
    ]
    return dataclasses.replace(step, micro_batches=batches)


def _types(parameters: Any) -> set[str]:
    return {own_shard(parameter).rows.device.type for parameter in parameters}
