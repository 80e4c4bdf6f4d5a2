"""What a rank that runs out of memory says: where, what it held, and what would help.

Numbers are taken while the exception is on its way: tensors that the failed step made are alive, as
the frames of the traceback hold them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed.tensor import DTensor

from fsdpq.dist import launched_rank, rank
from fsdpq.errors import CheckpointError, PlanError
from fsdpq.plan.changes.savings import RunPhase, Saving, list_savings
from fsdpq.plan.shapes.from_directory import shape_from_directory
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.amounts import format_bytes
from fsdpq.run_files.paths import RunFiles
from fsdpq.training.loop import Trainer
from fsdpq.worker.assemble import Assembled
from fsdpq.worker.keeping.heartbeat import Heartbeat

MAX_EDITS = 6
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
HOST_HINT = (
    "use less memory: a smaller `training.micro_batch_size` or `data.seq_len`; on a CPU also fewer "
    "ranks (`launch.nproc_per_node`)"
)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (GiB|MiB|KiB|bytes)")
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "bytes": 1}
_PARTS: dict[str, RunPhase] = {
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "evaluate": "evaluation",
}


@dataclass(frozen=True)
class DeviceMemory:
    """What a device and torch's allocator say, in bytes.

    Attributes:
        name: of the device.
        total: memory of the device.
        free: not used by anybody.
        allocated: held by tensors of this process.
        reserved: held by torch for this process.
    """

    name: str
    total: int
    free: int
    allocated: int
    reserved: int


def read_device(device: torch.device) -> DeviceMemory:
    """Returns the memory of a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    stats = torch.cuda.memory_stats(device)
    return DeviceMemory(
        torch.cuda.get_device_name(device),
        total,
        free,
        stats.get("allocated_bytes.all.current", 0),
        stats.get("reserved_bytes.all.current", 0),
    )


@dataclass
class PostMortem:
    """Explains that this rank ran out of memory; filled as the run comes about.

    Attributes:
        files: the run directory.
        heartbeat: knows the phase.
        recipe: resolved.
        assembled: once it is loaded.
        trainer: once it is built.
        model_dir: of the base, once it is loaded.
        read: reads the device.
    """

    files: RunFiles
    heartbeat: Heartbeat
    recipe: Recipe | None = None
    assembled: Assembled | None = None
    trainer: Trainer | None = None
    model_dir: Path | None = None
    read: Callable[[torch.device], DeviceMemory] = read_device
    _sharded: frozenset[str] = field(default_factory=frozenset[str])
    _shards: dict[str, int] = field(default_factory=dict[str, int])

    def learn(
        self, recipe: Recipe, assembled: Assembled, trainer: Trainer, model_dir: Path
    ) -> None:
        """Takes what the run consists of, between two steps: all weights are sharded then."""
        self.model_dir = model_dir
        self.recipe, self.assembled, self.trainer = recipe, assembled, trainer
        named = dict(assembled.model.named_parameters())
        self._sharded = frozenset(name for name, p in named.items() if isinstance(p, DTensor))
        self._shards = {"frozen": 0, "trained": 0}
        for parameter in named.values():
            kind = "trained" if parameter.requires_grad else "frozen"
            self._shards[kind] += _on(parameter, trainer.device.type)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns an error for want of memory into a PlanError that says all that is known."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self._explain(error) from error
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            message = f"rank {_me()} ran out of host memory {self._where(error)}"
            raise PlanError(f"{message}: {_first_line(str(error))}", hint=HOST_HINT) from error

    def _explain(self, error: torch.OutOfMemoryError) -> PlanError:
        message = f"rank {_me()} ran out of GPU memory {self._where(error)}"
        asked = _asked_bytes(str(error))
        message += f": it asked for {format_bytes(asked)} more" if asked else f": {error}"
        held = self._held()
        memory = self.read(self._device())
        lines = [f"{memory.name}, {format_bytes(memory.total)}; rank {_me()} held"]
        lines += _table(_rows(held, memory))
        edits = self._edits(asked)
        unused = memory.reserved - memory.allocated
        if unused >= (asked or 1) and unused > memory.total // 50:
            edits.insert(0, Saving((ALLOCATOR,), unused, "in front of the command"))
        hint = "more GPUs: each keeps a smaller share"
        if edits:
            best = " ".join(edits[0].overrides)
            where = "put in front of the command" if best == ALLOCATOR else "add"
            hint = f"{where} `{best}`: about {format_bytes(edits[0].saved_bytes)} less"
            lines += ["", "what would help, by arithmetic over this run"]
            lines += _table([(" ".join(e.overrides), _saves(e)) for e in edits[:MAX_EDITS]])
        return PlanError(message, hint=hint, details="\n".join(lines))

    def _phase(self) -> RunPhase:
        """Returns what the run did, as far as memory goes."""
        beat = self.heartbeat
        if beat.phase == "eval":
            return "evaluation"
        return _PARTS.get(beat.part, "load") if beat.phase == "train" else "load"

    def _where(self, error: BaseException) -> str:
        beat, phase = self.heartbeat, self._phase()
        if beat.phase == "load":
            return "while it loaded the base"
        if beat.phase not in ("train", "eval"):
            return f"in the phase `{beat.phase}`"
        place = "in the evaluation" if phase == "evaluation" else f"in the {phase} pass"
        place = "in the optimizer's step" if phase == "optimizer" else place
        if beat.phase == "train" and phase == "load":
            place = f"in the part `{beat.part}`"
        place += f" of step {beat.step}" if beat.phase == "train" and beat.step else ""
        layer = self._layer(error.__traceback__)
        return place if layer is None else f"{place}, layer {layer}"

    def _layer(self, traceback: TracebackType | None) -> int | None:
        """Returns the decoder layer that an exception came through, None outside of them."""
        if self.assembled is None:
            return None
        layers = {id(m): index for index, m in enumerate(self.assembled.model.decoder_layers)}
        found = None
        while traceback is not None:
            found = layers.get(id(traceback.tb_frame.f_locals.get("self")), found)
            traceback = traceback.tb_next
        return found

    def _device(self) -> torch.device:
        if self.trainer is not None:
            return self.trainer.device
        return torch.device("cuda", torch.cuda.current_device())

    def _held(self) -> dict[str, int]:
        """Returns the bytes on the device by what they are for; empty before the model is there."""
        if self.assembled is None or self.trainer is None:
            return {}
        device = self.trainer.device.type
        held = {**self._shards, "gradients": 0, "optimizer": 0, "gathered": 0}
        for name, parameter in self.assembled.model.named_parameters():
            if name in self._sharded and not isinstance(parameter, DTensor):
                held["gathered"] += _on(parameter, device)  # beside its shard
        for parameter in self.trainer.parameters:
            if parameter.grad is not None:
                held["gradients"] += _on(parameter.grad, device)
        for state in self.trainer.optimizer.state.values():
            tensors = (value for value in state.values() if isinstance(value, torch.Tensor))
            held["optimizer"] += sum(_on(each, device) for each in tensors)
        return held

    def _edits(self, asked_bytes: int) -> list[Saving]:
        if self.recipe is None or self.model_dir is None:
            return []
        try:
            shape = shape_from_directory(self.model_dir)
        except CheckpointError:
            return []  # a model that no plan knows
        phase, base_dir = self._phase(), self.files.root
        return list_savings(self.recipe, shape, phase, base_dir=base_dir, asked_bytes=asked_bytes)


def _rows(held: dict[str, int], memory: DeviceMemory) -> list[tuple[str, str]]:
    names = {
        "frozen": "frozen base",
        "trained": "trained weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "gathered": "gathered weights of the layers in use",
    }
    rows = [(names[kind], held[kind]) for kind in held]
    rest = memory.allocated - sum(held.values())
    rows.append(("activations and the rest" if held else "tensors", rest))
    rows.append(("kept by torch, unused (fragments)", memory.reserved - memory.allocated))
    others = memory.total - memory.free - memory.reserved
    rows.append(("other processes, and CUDA itself", others))
    rows.append(("free", memory.free))
    return [(name, format_bytes(max(0, number))) for name, number in rows]


def _saves(edit: Saving) -> str:
    text = f"about {format_bytes(edit.saved_bytes)} less"
    return f"{text} ({edit.note})" if edit.note else text


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _me() -> int:
    """Returns this rank, also where there is no process group yet."""
    return rank() or launched_rank()


def _on(tensor: torch.Tensor, device_type: str) -> int:
    """Returns the bytes of this rank's part of a tensor that lie on a device."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.nbytes if local.device.type == device_type else 0


def _asked_bytes(text: str) -> int:
    found = _ASKED.search(text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no memory is left"
