"""Runs a function in a process of its own, forked where the libraries are imported already.

For what a process can do only once: registering devices, process groups of a kind of their own.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from support.ranks import LIBRARIES, TIMEOUT_S


def _answer(connection: Connection, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        connection.send((True, function(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)``; it must be importable, and its result picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_S):
            raise AssertionError(f"no answer within {TIMEOUT_S} s")
        good, found = ours.recv()
    except EOFError:
        raise AssertionError("the process died") from None
    finally:
        process.kill()
    if not good:
        raise AssertionError(found)
    return found
