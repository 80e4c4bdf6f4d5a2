"""Known GPUs: memory, products a second, and how fast bytes come and go.

From NVIDIA's datasheets and architecture papers (GA102, AD102, RTX Blackwell, A100, H100, Blackwell
datacenter), dense products of bf16 with sums in fp32, at the boost clock. GeForce cards sum in fp32
at half the rate that is advertised for fp16: an RTX 4090 does 165 TFLOP/s, not 330. Memory is what
torch says there is in its messages about memory that ran out, where people have posted them, else
what ``nvidia-smi`` says; that is up to 5% less than is printed on the box.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fsdpq.plan.hardware.machine import GIB, Gpu

PCIE = {
    "3.0 x16": 12.4e9,
    "4.0 x8": 12.5e9,
    "4.0 x16": 25.0e9,
    "5.0 x8": 27.0e9,
    "5.0 x16": 55.0e9,
    "C2C": 360e9,
}
"""Bytes/s of copies from pinned memory, one way. 5.0 x16 was measured (docs/benchmarks/gpu.md), the
others are four fifths of what the bus could do. Many boards give a second card 8 lanes or 4."""

NVLINK_SHARE = 0.8
"""Of an NVLink's nominal rate, what NCCL's gathers reach."""

Link = Literal["3.0 x16", "4.0 x8", "4.0 x16", "5.0 x8", "5.0 x16", "C2C"]


class Card(NamedTuple):
    """A row of the table.

    Attributes:
        name: as people write it.
        gib: memory.
        tflops: bf16, dense, sums in fp32; of fp16 where there is no bf16.
        bandwidth: of its memory, GB/s.
        link: to the host.
        nvlink: GB/s, one way, nominal; 0 where peers talk over the host.
        has_bf16: it computes in bf16.
        also: other names; ``nvidia``, ``geforce``, ``rtx`` and the like need not be there.
    """

    name: str
    gib: float
    tflops: float
    bandwidth: float
    link: Link
    nvlink: float = 0.0
    has_bf16: bool = True
    also: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu:
        """The card, in bytes and bytes/s."""
        return Gpu(
            name=self.name,
            memory_bytes=int(self.gib * GIB),
            bf16_flops=self.tflops * 1e12,
            memory_bandwidth=self.bandwidth * 1e9,
            link_bandwidth=PCIE[self.link],
            peer_bandwidth=self.nvlink * NVLINK_SHARE * 1e9 or None,
            has_bf16=self.has_bf16,
        )


GEFORCE = (
    Card("RTX 2080 Ti", 10.75, 53.8, 616, "3.0 x16", has_bf16=False),
    Card("TITAN RTX", 23.6, 130.5, 672, "3.0 x16", has_bf16=False),
    Card("RTX 3060", 11.76, 25.5, 360, "4.0 x16", also=("3060 12GB",)),
    Card("RTX 3060 Ti", 7.78, 32.4, 448, "4.0 x16"),
    Card("RTX 3070", 7.78, 40.6, 448, "4.0 x16"),
    Card("RTX 3070 Ti", 7.78, 43.5, 608, "4.0 x16"),
    Card("RTX 3080", 9.77, 59.5, 760, "4.0 x16", also=("3080 10GB",)),
    Card("RTX 3080 12GB", 11.76, 61.3, 912, "4.0 x16"),
    Card("RTX 3080 Ti", 11.76, 68.2, 912, "4.0 x16"),
    Card("RTX 3090", 23.69, 71.2, 936, "4.0 x16"),
    Card("RTX 3090 Ti", 23.69, 80.0, 1008, "4.0 x16"),
    Card("RTX 4060", 7.62, 30.2, 272, "4.0 x8"),
    Card("RTX 4060 Ti 8GB", 7.62, 44.1, 288, "4.0 x8"),
    Card("RTX 4060 Ti 16GB", 15.58, 44.1, 288, "4.0 x8"),
    Card("RTX 4070", 11.62, 58.3, 504, "4.0 x16"),
    Card("RTX 4070 Super", 11.62, 71.0, 504, "4.0 x16"),
    Card("RTX 4070 Ti", 11.62, 80.2, 504, "4.0 x16"),
    Card("RTX 4070 Ti Super", 15.58, 88.2, 672, "4.0 x16"),
    Card("RTX 4080", 15.58, 97.5, 717, "4.0 x16"),
    Card("RTX 4080 Super", 15.58, 104.4, 736, "4.0 x16"),
    Card("RTX 4090", 23.6, 165.2, 1008, "4.0 x16"),
    Card("RTX 5060 Ti 8GB", 7.53, 47.4, 448, "5.0 x8"),
    Card("RTX 5060 Ti 16GB", 15.47, 47.4, 448, "5.0 x8"),
    Card("RTX 5070", 11.5, 61.7, 672, "5.0 x16"),
    Card("RTX 5070 Ti", 15.47, 87.9, 896, "5.0 x16"),
    Card("RTX 5080", 15.47, 112.6, 960, "5.0 x16"),
    Card("RTX 5090", 31.36, 209.5, 1792, "5.0 x16"),
)

WORKSTATION = (
    Card("RTX A4000", 15.6, 76.7, 448, "4.0 x16"),
    Card("RTX A4500", 19.6, 94.6, 640, "4.0 x16", 56.25),
    Card("RTX A5000", 23.6, 111.1, 768, "4.0 x16", 56.25),
    Card("RTX A6000", 47.4, 154.8, 768, "4.0 x16", 56.25),
    Card("RTX 5000 Ada", 31.5, 261.1, 576, "4.0 x16"),
    Card("RTX 6000 Ada", 47.4, 364.2, 960, "4.0 x16"),
    Card("RTX PRO 5000", 47.3, 258.0, 1344, "5.0 x16", also=("PRO 5000 48GB",)),
    Card("RTX PRO 6000", 94.97, 503.8, 1792, "5.0 x16", also=("PRO 6000 96GB",)),
)

DATACENTER = (
    Card("T4", 14.56, 65.0, 320, "3.0 x16", has_bf16=False),
    Card("V100 16GB", 15.77, 125.0, 900, "3.0 x16", 150.0, False, ("V100-SXM2-16GB",)),
    Card("V100 32GB", 31.73, 125.0, 900, "3.0 x16", 150.0, False, ("V100-SXM2-32GB",)),
    Card("V100 PCIe 16GB", 15.77, 112.0, 900, "3.0 x16", 0.0, False, ("V100-PCIE-16GB",)),
    Card("V100 PCIe 32GB", 31.73, 112.0, 900, "3.0 x16", 0.0, False, ("V100-PCIE-32GB",)),
    Card("A10", 22.05, 125.0, 600, "4.0 x16"),
    Card("A10G", 22.05, 70.0, 600, "4.0 x16"),
    Card("A30", 23.5, 165.0, 933, "4.0 x16", 100.0),
    Card("A40", 44.4, 149.7, 696, "4.0 x16", 56.25),
    Card("L4", 22.03, 121.0, 300, "4.0 x16"),
    Card("L40", 44.4, 181.1, 864, "4.0 x16"),
    Card("L40S", 44.4, 362.1, 864, "4.0 x16"),
    Card("A100 40GB", 39.39, 312.0, 1555, "4.0 x16", 300.0, also=("A100-SXM4-40GB",)),
    Card("A100 80GB", 79.14, 312.0, 2039, "4.0 x16", 300.0, also=("A100-SXM4-80GB",)),
    Card("A100 PCIe 40GB", 39.39, 312.0, 1555, "4.0 x16", also=("A100-PCIE-40GB",)),
    Card("A100 PCIe 80GB", 79.14, 312.0, 1935, "4.0 x16", also=("A100 80GB PCIe",)),
    Card("H100", 79.11, 989.4, 3352, "5.0 x16", 450.0, also=("H100 80GB", "H100 80GB HBM3",)),
    Card("H100 PCIe", 79.11, 756.0, 2039, "5.0 x16", also=("H100 80GB PCIe",)),
    Card("H100 NVL", 93.1, 835.0, 3938, "5.0 x16", 300.0, also=("H100 94GB", "H100 NVL 94GB")),
    Card("H20", 95.0, 148.0, 4000, "5.0 x16", 450.0, also=("H20 96GB",)),
    Card("H200", 139.8, 989.4, 4800, "5.0 x16", 450.0, also=("H200 141GB", "H200 SXM 141GB")),
    Card("H200 NVL", 139.8, 835.0, 4800, "5.0 x16", 450.0),
    Card("GH200", 94.5, 989.4, 4022, "C2C", 450.0, also=("GH200 480GB", "GH200 96GB")),
    Card("B200", 178.4, 2250.0, 7700, "5.0 x16", 900.0, also=("B200 180GB", "B200 192GB")),
    Card("B300", 267.7, 2250.0, 7700, "5.0 x16", 900.0, also=("B300 288GB",)),
)  # fmt: skip

CARDS = (*GEFORCE, *WORKSTATION, *DATACENTER)
"""All of them."""
