"""The machine that a plan is for: this one, or one that somebody thinks of renting."""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: ``RTX 4090``, or ``24 GiB GPU`` where only its memory is known.
        memory_bytes: of the device.
        bf16_flops: dense bf16 products with sums in fp32, FLOP/s by its maker; None: not known.
        memory_bandwidth: bytes/s; None: not known.
        link_bandwidth: bytes/s to and from the host, one way; None: not known.
        peer_bandwidth: bytes/s to another GPU of the machine, one way; None: over the host.
        has_bf16: it computes in bf16; where it does not, ``bf16_flops`` is fp16's.
    """

    name: str
    memory_bytes: int
    bf16_flops: float | None = None
    memory_bandwidth: float | None = None
    link_bandwidth: float | None = None
    peer_bandwidth: float | None = None
    has_bf16: bool = True


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Attributes:
        gpus: of one machine, all of a kind; empty on a CPU, None where nobody said.
        ram_bytes: host memory of one machine, None where nobody said.
        disk_bandwidth: bytes/s that the disk of the base reads; None: not known.
        network_bandwidth: bytes/s between two machines, one way; None: not known.
        price_per_hour: of all machines together, in any currency; None: not asked for.
        is_this: it is the machine that this program runs on.
    """

    gpus: tuple[Gpu, ...] | None = None
    ram_bytes: int | None = None
    disk_bandwidth: float | None = None
    network_bandwidth: float | None = None
    price_per_hour: float | None = None
    is_this: bool = False

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of the smallest GPU; None where there is none, or where nobody said."""
        return min((gpu.memory_bytes for gpu in self.gpus or ()), default=None)
