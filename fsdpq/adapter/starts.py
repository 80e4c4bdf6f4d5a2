"""First values of low-rank matrices: ``adapter.init``.

``default`` and ``gaussian`` leave the base as it is (B is zero). ``pissa`` and ``olora`` take both
matrices from the base and leave it the rest, ``W - s B A``: the model computes what it did. All
four are PEFT's (``peft/tuners/lora/layer.py``, 0.21).
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor, nn

Init = Literal["default", "gaussian", "pissa", "olora"]


def draw_a(name: str, shape: tuple[int, ...], *, seed: int, init: Init) -> Tensor:
    """Returns the whole of A, fp32 on the host: the same on every rank.

    Args:
        name: of the parameter; with ``seed`` it decides the values.
        shape: ``(rank, in_features)``.
        seed: of the recipe.
        init: ``default`` is uniform, Kaiming's with a = sqrt(5); ``gaussian`` is N(0, 1 / rank^2).
    """
    own = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(own, "big") >> 1)
    empty = torch.empty(shape)
    if init == "gaussian":
        return nn.init.normal_(empty, std=1 / shape[0], generator=generator)
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


def factor_base(weight: Tensor, *, rank: int, scaling: float, init: Init) -> tuple[Tensor, Tensor]:
    """Returns A and B from the base, fp32, ``(rank, in_features)`` and ``(out_features, rank)``.

    Memory: about three times the matrix in fp32.

    Args:
        weight: ``(out_features, in_features)``, fp32.
        rank: at most the smaller side of ``weight``.
        scaling: factor on ``B A`` in the forward pass.
        init: ``pissa`` for the largest singular values (https://arxiv.org/abs/2404.02948), else
            ``olora``: the first columns of a QR decomposition (https://arxiv.org/abs/2406.01775).
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
