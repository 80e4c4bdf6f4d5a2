"""Work in several processes: results in order, errors as they were raised, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from fsdpq.data.preparing.processes import MAX_EARLY_RESULTS, map_in_order
from fsdpq.errors import LaunchError, Problem, RecipeError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process outlives a test; those that other tests share may be there."""
    before = set(psutil.Process().children())
    yield
    assert set(psutil.Process().children()) <= before


def square_slowly(number: int) -> tuple[int, int]:
    time.sleep(0.02 if number % 3 == 0 else 0)
    return number * number, os.getpid()


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_results_come_in_order(num_processes: int) -> None:
    results = list(map_in_order(square_slowly, range(40), num_processes=num_processes))
    assert [square for square, _ in results] == [number * number for number in range(40)]
    pids = {pid for _, pid in results}
    assert (os.getpid() in pids) == (num_processes == 1)
    assert num_processes == 1 or len(pids) > 1


def test_one_item_starts_no_process() -> None:
    assert list(map_in_order(square_slowly, [7], num_processes=4)) == [(49, os.getpid())]
    assert list(map_in_order(square_slowly, [], num_processes=4)) == []


def test_items_are_read_as_results_are_taken() -> None:
    num_read = 0

    def items() -> Iterator[int]:
        nonlocal num_read
        for number in range(1000):
            num_read += 1
            yield number

    results = map_in_order(square_slowly, items(), num_processes=2)
    for number in range(10):
        assert next(results)[0] == number * number
        assert num_read <= number + 2 + 2 * MAX_EARLY_RESULTS
    results.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_large_items_and_results_do_not_block_each_other() -> None:
    items = [bytes([number]) * 3_000_000 for number in range(8)]
    assert list(map_in_order(lambda item: item[::-1], items, num_processes=2)) == items


def fail_at_three(number: int) -> int:
    if number == 3:
        raise RecipeError([Problem("row 3 is bad", "data")])
    if number == 5:
        raise ValueError("unexpected")
    return number


def test_errors_arrive_as_they_were_raised() -> None:
    with pytest.raises(RecipeError) as caught:
        list(map_in_order(fail_at_three, range(3, 5), num_processes=2))
    assert [problem.message for problem in caught.value.problems] == ["row 3 is bad"]
    with pytest.raises(RuntimeError, match=r"(?s)fail_at_three.*ValueError: unexpected"):
        list(map_in_order(fail_at_three, range(4, 9), num_processes=2))


def die_at_four(number: int) -> int:
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_killed_process_is_explained() -> None:
    with pytest.raises(LaunchError, match=r"was killed \(SIGKILL\).*memory runs out") as caught:
        list(map_in_order(die_at_four, range(20), num_processes=2))
    assert "--processes 1" in caught.value.hint


IN_A_PROCESS = """
import sys, time
from fsdpq.data.preparing.processes import map_in_order
def work(number):
    print(number, flush=True)
    time.sleep(0.2)
    return number
for _ in map_in_order(work, range(1000), num_processes=2):
    pass
"""


def test_processes_end_with_the_one_that_started_them() -> None:
    command = [sys.executable, "-c", IN_A_PROCESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:
            child.kill()
    assert not alive
