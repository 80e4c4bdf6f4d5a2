"""What a plan says. Bytes are whole numbers, times are seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fsdpq.plan.hardware.machine import Machine
from fsdpq.plan.workload import Workload

Category = Literal[
    "codes", "scales", "plain", "trained", "gradients", "optimizer", "gathered", "communication",
    "dequantized", "layer_inputs", "recomputed", "attention", "loss", "load", "workspace",
    "context", "fragmentation", "measured",
]  # fmt: skip
"""What memory is used for.

    codes, scales   the quantized base, sharded
    plain           frozen weights that are not quantized, sharded
    trained         trained weights, sharded
    gradients       of trained weights: sharded, and those that wait to be reduced
    optimizer       its states, sharded
    gathered        the FSDP groups that are unsharded, the one that is fetched ahead included
    communication   buffers of gathers and reductions beside the gathered weights
    dequantized     the matrix of one product
    layer_inputs    what checkpointing keeps: the inputs of the decoder layers
    recomputed      what a layer makes for its own backward, attention's left out
    attention       what attention makes
    loss            logits of one chunk, and what becomes of them
    load            working memory of loading and quantizing
    workspace       what libraries of matrix products ask torch's allocator for
    context         what CUDA, NCCL and the libraries take; on a CPU the process itself
    fragmentation   memory that the allocator holds and cannot use
    measured        all of it: a measurement tells nothing apart (no plan has it)
"""

Phase = Literal["load", "init", "forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Moment:
    """A point of a run at which memory may be at its most.

    Attributes:
        phase: as `metrics.log_memory` names it.
        name: for people: ``backward of the last layer``.
        parts: category -> bytes; what is not named is 0.
    """

    phase: Phase
    name: str
    parts: Mapping[Category, int]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """Bytes that the allocator hands out: without context and fragmentation."""
        return self.total - self.parts.get("context", 0) - self.parts.get("fragmentation", 0)


@dataclass(frozen=True)
class RankMemory:
    """Memory of rank 0 on its device.

    Attributes:
        moments: in the order of a run.
    """

    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment with the most."""
        return max(self.moments, key=lambda moment: moment.total)

    def phase_peak(self, phase: Phase) -> Moment | None:
        """Returns the moment of ``phase`` with the most, None where there is none."""
        found = [moment for moment in self.moments if moment.phase == phase]
        return max(found, key=lambda moment: moment.total, default=None)


@dataclass(frozen=True)
class HostMemory:
    """Host memory of one machine.

    Attributes:
        parts: what for -> bytes over all ranks of the machine.
        file_backed_bytes: pages of the quantized base that want to be in memory and need not.
        load_bytes: the most while loading, all of it.
    """

    parts: Mapping[str, int]
    file_backed_bytes: int = 0
    load_bytes: int = 0

    @property
    def total(self) -> int:
        """Bytes that must be there while training."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """Bytes that must be there at any time."""
        return max(self.total, self.load_bytes)


@dataclass(frozen=True)
class DiskUse:
    """Disk space of one machine.

    Attributes:
        download_bytes: of the model and known data.
        cache_bytes: of the quantized base and prepared rows.
        checkpoint_bytes: of all checkpoints that are kept, and one that is being written.
        export_bytes: of what the run leaves behind.
    """

    download_bytes: int = 0
    cache_bytes: int = 0
    checkpoint_bytes: int = 0
    export_bytes: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(
            (self.download_bytes, self.cache_bytes, self.checkpoint_bytes, self.export_bytes)
        )


@dataclass(frozen=True)
class Transfer:
    """Bytes that rank 0 moves over one link in a step, and how long that takes alone.

    Attributes:
        link: ``host to device`` and ``device to host`` are shards and gradients, ``activations``
            are inputs of layers there and back; ``gather``, ``reduce``, ``network``, ``disk``.
        num_bytes: of one rank in one step; of ``network`` and ``disk`` those of one machine.
        seconds: alone, None where the link is not known.
        hiding_tokens: tokens of a micro-batch from which it hides behind the computation; None
            where one of both is not known.
        hides: it runs beside the computation, today (`fsdpq.plan.time.estimate`); else it adds to
            it.
        hiding_bandwidth: bytes/s of the link from which on it takes less than computing; None where
            the GPU is not known.
    """

    link: str
    num_bytes: int
    seconds: float | None = None
    hiding_tokens: int | None = None
    hides: bool = True
    hiding_bandwidth: float | None = None


@dataclass(frozen=True)
class StepTime:
    """How long a step takes.

    Attributes:
        flops: of one rank in one step, recomputation included.
        compute_s: of one rank in one step; None where the GPU is not known.
        transfers: of one rank in one step.
        step_s: estimated; None where something is not known.
        tokens_per_s: over all ranks.
        total_steps: optimizer steps, None where the rows are not known.
        total_s: of all of them.
        price: of all of them, None without a price.
        advice: settings that hide a transfer, as ``key=value``, with a reason; empty where none
            helps.
    """

    flops: float
    compute_s: float | None
    transfers: tuple[Transfer, ...]
    step_s: float | None = None
    tokens_per_s: float | None = None
    total_steps: int | None = None
    total_s: float | None = None
    price: float | None = None
    advice: tuple[tuple[tuple[str, ...], str], ...] = ()


@dataclass(frozen=True)
class Edit:
    """A change of the recipe that makes it fit.

    Attributes:
        settings: overrides, ``section.field=value``; several where one does not do.
        peak_bytes: of the device with them.
        host_bytes: of the host with them.
        slowdown: time a token as a multiple of the recipe's own; None where it is not known.
        changes_result: another model comes out of it, and not the same one more slowly.
    """

    settings: tuple[str, ...]
    peak_bytes: int
    host_bytes: int
    slowdown: float | None = None
    changes_result: bool = False


@dataclass(frozen=True)
class Limit:
    """How far one setting can go on the machine.

    Attributes:
        setting: ``section.field``.
        now: what the recipe says.
        value: the largest that fits; None where not even the smallest does.
        settings: the overrides that give it.
        bound: what stops it there, for people.
        peak_bytes: of the device with it.
        tokens_per_s: with it, None where it is not known.
    """

    setting: str
    now: int
    value: int | None
    settings: tuple[str, ...] = ()
    bound: str = ""
    peak_bytes: int = 0
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Variant:
    """The recipe with another way of holding the model.

    Attributes:
        strategy: ``fsdp.strategy``.
        offload: ``fsdp.offload``.
        activation_checkpointing: ``fsdp.activation_checkpointing``.
        settings: the overrides that give it; empty for the recipe as it is.
        peak_bytes: of the device.
        host_bytes: of the host.
        fits: None where the machine is not known.
        tokens_per_s: None where it is not known.
    """

    strategy: str
    offload: str
    activation_checkpointing: str
    settings: tuple[str, ...]
    peak_bytes: int
    host_bytes: int
    fits: bool | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        name: of the recipe.
        model: its name, and where its shape is from.
        device: memory of rank 0.
        host: memory of one machine.
        disk: of one machine.
        time: of a step and of the run.
        fits: None where the machine is not known.
        shortages: what does not fit, one sentence each.
        edits: the smallest that make it fit, fastest first; those that change results come last.
        notes: what the reader should know about the numbers.
        machine: what it is for.
        workload: ranks, rows and tokens of a step; None where nobody asked.
        device_type: ``cuda``, or ``cpu``, where memory of the device is memory of the host.
        fits_on: other hardware on which the recipe fits as it is, smallest first.
        limits: how far its settings can go, where that was asked.
        variants: other ways of holding the model, where that was asked.
    """

    name: str
    model: str
    device: RankMemory
    host: HostMemory
    disk: DiskUse
    time: StepTime
    fits: bool | None = None
    shortages: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    notes: tuple[str, ...] = field(default=())
    machine: Machine = field(default_factory=Machine)
    workload: Workload | None = None
    device_type: Literal["cuda", "cpu"] = "cuda"
    fits_on: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    variants: tuple[Variant, ...] = ()
