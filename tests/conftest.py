"""Fixtures of the whole suite, and how many of its files run at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from support.ranks import RankPool

WORKER_BYTES = 3 * 1024**3
"""What one of `make test`'s workers may need with its ranks, rounded up."""
MAX_WORKERS = 8
"""Few files take long: more workers would import torch for nothing."""

# Ranks and workers are processes enough: threads of torch would only wait for one another's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("FORCE_COLOR", None)  # a CI that wants colours from pytest wants none in our texts


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Returns the workers of ``-n auto``: one a usable core, as far as memory lasts."""
    by_memory = psutil.virtual_memory().available // WORKER_BYTES
    return max(1, min(len(os.sched_getaffinity(0)), by_memory, MAX_WORKERS))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes that live as long as the session."""
    from support.ranks import RankPool

    pool = RankPool()
    _POOLS.append(pool)
    yield pool
    _POOLS.remove(pool)
    pool.close()


_POOLS: list[RankPool] = []


@pytest.fixture(scope="module", autouse=True)
def rested_ranks() -> Iterator[None]:
    """Gives every file fresh ranks where the last one's have gathered threads."""
    yield
    for pool in _POOLS:
        pool.shed()
