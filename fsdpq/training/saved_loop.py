"""The loop's state as a checkpoint keeps it: JSON data, and each rank's shares of unread losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fsdpq.dist import rank, world_size
from fsdpq.protocols import Piece
from fsdpq.training.loop import LogWindow, LoopState, Progress
from fsdpq.training.step import StepResult

PREFIX = "window"


def window_pieces(window: LogWindow) -> dict[str, Piece]:
    """Returns this rank's shares of the losses that no log line has yet, ``(steps,)`` each."""
    found: dict[str, Piece] = {}
    for kind, shares in _shares(window).items():
        stacked = torch.stack(shares).float()
        found[_name(kind, rank())] = Piece(stacked, tuple(stacked.shape))
    return found


def loop_facts(state: LoopState) -> dict[str, Any]:
    """Returns all else that the loop knows, as plain JSON data; waits for the device."""
    window = state.window
    norms = [result.grad_norm for result in window.results]
    return {
        "progress": vars(state.progress).copy(),
        "eval_losses": {str(step): loss for step, loss in state.eval_losses.items()},
        "window": {
            "kinds": list(_shares(window)),
            "num_trained": window.num_trained,
            "grad_norms": torch.stack(norms).tolist() if norms else [],
            "skipped": [result.skipped for result in window.results],
            "tokens": window.tokens,
            "seconds": time.monotonic() - window.started,
            "data_wait_s": window.data_wait_s,
        },
    }


def restore_loop(
    facts: Mapping[str, Any],
    read: Callable[[list[str]], Mapping[str, Tensor]],
    *,
    saved_world_size: int,
    device: torch.device,
    norm_device: torch.device,
) -> LoopState:
    """Returns the state that `loop_facts` and `window_pieces` describe.

    Another number of ranks shares out the saved shares: their sum over ranks stays the loss.

    Ranks: all (collective).

    Args:
        facts: of rank 0.
        read: returns saved tensors by name, on the host; all ranks call it.
        saved_world_size: ranks that saved it.
        device: where losses are computed.
        norm_device: where gradient norms are computed: with the gradients.
    """
    window = facts["window"]
    count, own = len(window["num_trained"]), range(rank(), saved_world_size, world_size())
    names = {kind: [_name(kind, saver) for saver in own] for kind in window["kinds"]}
    saved = read([name for each in names.values() for name in each])
    shares = {
        kind: sum((saved[name] for name in each), torch.zeros(count)).to(device)
        for kind, each in names.items()
    }
    results = [
        StepResult(
            shares["loss"][index],
            torch.tensor(window["grad_norms"][index], device=norm_device),
            window["skipped"][index],
            shares["aux"][index] if "aux" in shares else None,
        )
        for index in range(count)
    ]
    return LoopState(
        Progress(**facts["progress"]),
        LogWindow(
            results,
            list(window["num_trained"]),
            window["tokens"],
            time.monotonic() - window["seconds"],
            window["data_wait_s"],
        ),
        {int(step): loss for step, loss in facts["eval_losses"].items()},
    )


def _shares(window: LogWindow) -> dict[str, list[Tensor]]:
    """Returns this rank's shares of every step, by kind; what is not computed is left out."""
    aux = [result.aux_loss for result in window.results if result.aux_loss is not None]
    kinds = {"loss": [result.loss for result in window.results], "aux": aux}
    return {kind: shares for kind, shares in kinds.items() if shares}


def _name(kind: str, saver: int) -> str:
    return f"{PREFIX}/{saver}/{kind}"
