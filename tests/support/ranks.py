"""Runs functions on gloo ranks that are started once per session.

Importing the libraries costs seconds of computing: a server process does it once, ranks are forks
of it that share its memory. Joining a process group costs milliseconds: the ranks stay, every call
makes a new group of the first ``world_size`` of them.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

TIMEOUT_S = 240
MAX_THREADS = 20
LIBRARIES = [
    "torch",
    "fsdpq.worker.assemble",
    "fsdpq.training.step",
    "fsdpq.quantization.bnb",
    "transformers.cache_utils",
    "transformers.models.llama.modeling_llama",
]
"""What the server imports before the first fork; what is missing here, every rank imports itself.

Of the packages that are installed only: the server does not know pytest's ``pythonpath``.
"""


def _serve(rank: int, connection: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, world_size, store = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            file_store = dist.FileStore(store, world_size)
            dist.init_process_group("gloo", store=file_store, rank=rank, world_size=world_size)
            dist.barrier()  # a rank that has nothing to do must not leave before all are there
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # torch 2.13 remembers the mesh of a DTensor by its shape: one of the last call's would
            # come back in the next call, and its groups are gone, or are other groups by now.
            _clear_sharding_prop_cache()
        connection.send_bytes(pickle.dumps(answer))


class RankPool:
    """Rank processes, started when they are first needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES)
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        atexit.register(self.close)

    def shed(self) -> None:
        """Ends ranks that have gathered threads; new ones are forked when they are needed.

        Groups of a model's meshes outlive it (torch 2.13 keeps meshes), and each has three threads
        that wake a hundred times a second: after some hundred groups, half a core's time.
        """
        with contextlib.suppress(psutil.NoSuchProcess):  # the next call says that one has died
            if any(
                psutil.Process(each.pid).num_threads() > MAX_THREADS for each in self._processes
            ):
                self.close()

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Returns ``function(*arguments)`` of every rank; the function must be importable."""
        while len(self._connections) < world_size:
            self._start()
        with tempfile.TemporaryDirectory() as directory:
            task = (function, arguments, world_size, str(Path(directory) / "store"))
            for connection in self._connections[:world_size]:
                connection.send_bytes(pickle.dumps(task))
            answers = [self._receive(c) for c in self._connections[:world_size]]
        for rank, (good, answer) in enumerate(answers):
            if not good:
                raise AssertionError(f"rank {rank} failed:\n{answer}")
        return [answer for _, answer in answers]

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(len(self._connections), theirs), daemon=True
        )
        process.start()
        theirs.close()
        self._connections.append(ours)
        self._processes.append(process)

    def _receive(self, connection: Connection) -> Any:
        if not connection.poll(TIMEOUT_S):
            self.close()
            raise AssertionError(f"a rank did not answer within {TIMEOUT_S} s")
        return pickle.loads(connection.recv_bytes())

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes:
            process.kill()
        self._connections, self._processes = [], []
