"""The generators of a rank as a checkpoint keeps them: dropout goes on where it was."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fsdpq.dist import rank
from fsdpq.protocols import Piece

PREFIX = "random"


def random_pieces(device: torch.device) -> dict[str, Piece]:
    """Returns the states of torch's generators and Python's, as bytes."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    version, internal, gauss = random.getstate()
    text = json.dumps([version, list(internal), gauss]).encode()
    states["python"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return {_name(kind, rank()): Piece(state, tuple(state.shape)) for kind, state in states.items()}


def restore_random(
    read: Callable[[list[str]], Mapping[str, Tensor]],
    *,
    saved_world_size: int,
    has_cuda: bool,
    device: torch.device,
    seed: int,
    step: int,
) -> None:
    """Sets the generators to the saved states; of a rank that did not save, to other seeds.

    Ranks: all (collective).

    Args:
        read: returns saved tensors by name, on the host; all ranks call it.
        saved_world_size: ranks that saved.
        has_cuda: whether they did so on GPUs.
        device: this rank's device.
        seed: of the recipe.
        step: that was saved.
    """
    kinds = ["torch", "python", *(["cuda"] if has_cuda else [])]
    is_saved = rank() < saved_world_size
    saved = read([_name(kind, rank()) for kind in kinds] if is_saved else [])
    text = f"{seed} {step} {rank()}"
    fresh = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    random.seed(fresh)
    torch.manual_seed(fresh)  # the GPU's too
    if not is_saved:
        return
    version, internal, gauss = json.loads(bytes(saved[_name("python", rank())].tolist()))
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(saved[_name("torch", rank())])
    if has_cuda and device.type == "cuda":
        torch.cuda.set_rng_state(saved[_name("cuda", rank())], device)


def _name(kind: str, saver: int) -> str:
    return f"{PREFIX}/{saver}/{kind}"
