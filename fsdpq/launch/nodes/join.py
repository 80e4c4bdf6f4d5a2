"""Which part this machine has in a run: the only one, the first one, or another."""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fsdpq.errors import EnvironmentProblemError, UsageError
from fsdpq.launch.nodes.address import Endpoint, find_endpoint, is_own, own_address
from fsdpq.launch.nodes.facts import facts_of
from fsdpq.launch.nodes.first import First
from fsdpq.launch.nodes.member import Part
from fsdpq.launch.ready import Settled
from fsdpq.launch.screen import Screen

_HINT = "the machine whose address `launch.rdzv_endpoint` is comes first; the others are 1, 2, ..."


@contextmanager
def joined(
    settled: Settled,
    *,
    node_rank: int | None,
    run_dir: Path | None,
    screen: Screen,
    worker: Sequence[str],
) -> Generator[First | Part | None, None, None]:
    """Gives the part of this machine in the run; None where it is the only one.

    The first machine has waited for the others, and tells them at the end how the block ended.

    Args:
        settled: what is to run.
        node_rank: the place that the user gave this machine, None for any.
        run_dir: as the user gave it.
        screen: shows what happens.
        worker: arguments of torchrun that name the worker.

    Raises:
        UsageError: this machine cannot have this place.
        LaunchError: the others do not come.
    """
    launch = settled.recipe.launch
    if launch.max_nodes == 1 or launch.rdzv_endpoint is None:
        if node_rank is not None:
            message = f"`--node-rank {node_rank}` has no effect with `launch.nnodes: 1`"
            raise UsageError(message, hint="leave it out, or write `launch.nnodes`")
        yield None
        return
    endpoint = find_endpoint(launch.rdzv_endpoint)
    listener = _listen(endpoint, node_rank)
    if listener is None:
        yield Part(settled, endpoint, node_rank, run_dir, worker, screen)
        return
    facts = facts_of(settled, address=own_address(endpoint), process=os.getpid(), node_rank=0)
    first = First(listener, endpoint, facts, launch, screen)
    try:
        first.gather()
        yield first
    except BaseException as error:
        first.close(error)
        raise
    first.close(None)


def _listen(endpoint: Endpoint, node_rank: int | None) -> socket.socket | None:
    """Returns a socket at the endpoint where this is the first machine, None where it is not."""
    own = is_own(endpoint)
    if node_rank == 0 and not own:
        message = f"`--node-rank 0`: this machine has no address {endpoint.address[0]}"
        raise UsageError(message, hint=_HINT)
    if not own or node_rank not in (None, 0):
        return None
    listener = socket.socket(endpoint.family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((endpoint.own_host, endpoint.port))
        listener.listen()
    except OSError as error:
        listener.close()
        if node_rank is None:
            return None  # another launcher of this machine is the first one
        message = f"`launch.rdzv_endpoint`: {endpoint.text} cannot be used: {error.strerror}"
        raise EnvironmentProblemError(message, hint="choose another port") from None
    return listener
