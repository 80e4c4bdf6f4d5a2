"""GPUs by name: every spelling finds its card, and what is wrong is said."""

from __future__ import annotations

import pytest

from fsdpq.errors import UsageError
from fsdpq.plan.hardware.gpu_cards import CARDS
from fsdpq.plan.hardware.gpus import find_gpu, normalize, parse_gpus
from fsdpq.plan.hardware.machine import GIB

SPELLINGS = {
    "2x24GiB": (2, "24 GiB GPU"),
    "24GB": (1, "24 GiB GPU"),
    "48 g": (1, "48 GiB GPU"),
    "1xRTX4090": (1, "RTX 4090"),
    "2\u00d7rtx-4090": (2, "RTX 4090"),
    "4090 x2": (2, "RTX 4090"),
    "4090, 4090": (2, "RTX 4090"),
    "2x RTX 3090": (2, "RTX 3090"),
    "RTX 5090 32GB": (1, "RTX 5090"),
    "rtx4060ti16gb": (1, "RTX 4060 Ti 16GB"),
    "8x4070TiS": (8, "RTX 4070 Ti Super"),
    "8xA100-80GB": (8, "A100 80GB"),
    "a6000": (1, "RTX A6000"),
    "RTX 6000 Ada": (1, "RTX 6000 Ada"),
    "L40S": (1, "L40S"),
    "h100": (1, "H100"),
    # as nvidia-smi has them
    "NVIDIA GeForce RTX 3090 Ti": (1, "RTX 3090 Ti"),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (1, "RTX 4070 Ti Super"),
    "NVIDIA A100-SXM4-80GB": (1, "A100 80GB"),
    "NVIDIA A100-PCIE-40GB": (1, "A100 PCIe 40GB"),
    "NVIDIA A100 80GB PCIe": (1, "A100 PCIe 80GB"),
    "NVIDIA H100 80GB HBM3": (1, "H100"),
    "NVIDIA H100 PCIe": (1, "H100 PCIe"),
    "NVIDIA H200": (1, "H200"),
    "Tesla V100-SXM2-16GB": (1, "V100 16GB"),
    "Tesla T4": (1, "T4"),
    "NVIDIA RTX A6000": (1, "RTX A6000"),
    "NVIDIA RTX 6000 Ada Generation": (1, "RTX 6000 Ada"),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (1, "RTX PRO 6000"),
}

WRONG = {
    "": ("names no GPU", "2x24GiB"),
    "A100": ("more than one", "`A100 80GB`"),
    "4060Ti": ("more than one", "`RTX 4060 Ti 16GB`"),
    "RTX 4091": ("no GPU that fsdpq knows", "did you mean `RTX 4090`"),
    "RTX 4090 48GB": ("no GPU that fsdpq knows", "24GiB"),
    "NVIDIA GeForce RTX 4090 Laptop GPU": ("no GPU that fsdpq knows", "24GiB"),
    "24": ("no GPU that fsdpq knows", "2x24GiB"),
    "0x4090": ("0 GPUs", "between 1 and"),
    "9999x24GiB": ("9999 GPUs", "between 1 and"),
    "0GiB": ("no GPU's memory", "2x24GiB"),
    "1x24GiB, 1x48GiB": ("2 kinds", "smallest"),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spelling_finds_its_card(text: str) -> None:
    gpus = parse_gpus(text)
    assert (len(gpus), gpus[0].name) == SPELLINGS[text]
    assert len(set(gpus)) == 1


@pytest.mark.parametrize("text", WRONG)
def test_wrong_gpu_is_said_to_be_wrong(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gpus(text)
    message, hint = WRONG[text]
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_memory_alone_says_nothing_of_speed() -> None:
    (gpu,) = parse_gpus("16.5GiB")
    assert gpu.memory_bytes == 16.5 * GIB
    assert (
        gpu.bf16_flops is gpu.memory_bandwidth is gpu.link_bandwidth is gpu.peer_bandwidth is None
    )


def test_no_two_cards_share_a_name() -> None:
    own = [{normalize(name) for name in (card.name, *card.also)} for card in CARDS]
    assert sum(map(len, own)) == len(set().union(*own)) > 60
    assert all(find_gpu(card.name) == card.gpu for card in CARDS)


def test_rates_are_those_of_tensor_cores_and_clock() -> None:
    """A GeForce's tensor core does 128 operations a clock with sums in fp32, a workstation's 256.

    An SM of an A100 does 2048, of an H100 4096. Cores and boost clocks are those of NVIDIA's
    architecture papers.
    """
    counted = {
        "RTX 3090": 328 * 128 * 1.695e9,
        "RTX 3060": 112 * 128 * 1.777e9,
        "RTX 4090": 512 * 128 * 2.52e9,
        "RTX 4060 Ti 16GB": 136 * 128 * 2.535e9,
        "RTX 5090": 680 * 128 * 2.407e9,
        "RTX A6000": 336 * 256 * 1.8e9,
        "RTX 6000 Ada": 568 * 256 * 2.505e9,
        "A100 80GB": 108 * 2048 * 1.41e9,
        "H100": 132 * 4096 * 1.83e9,
    }
    for name, flops in counted.items():
        gpu = find_gpu(name)
        assert gpu is not None
        assert gpu.bf16_flops == pytest.approx(flops, rel=0.01), name  # rounded to 0.1 TFLOP/s
