"""A short campaign: one run is killed again and again, and comes out as if nothing had happened.

``make chaos`` is the long one, see ``docs/developing/chaos.md``.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chaos.blows import Blow
from chaos.compare import compare
from chaos.project import CONFIGURATIONS, write_project
from chaos.runs import Ground, run_disturbed, run_undisturbed

from fsdpq.run_files.writing import read_json_lines

PACKED_WITH_DROPOUT = CONFIGURATIONS[0]
BLOWS = [
    Blow("load", 0, 0.3, "rank 1", signal.SIGKILL),
    Blow("write", 4, 0.005, "everything", signal.SIGKILL),
    Blow("write", 5, 0.01, "launcher and rank 0", signal.SIGKILL),
]


@pytest.mark.timeout(900)  # five commands, beside other files
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    ground = Ground(write_project(tmp_path / "project"), tmp_path)
    peaceful = run_undisturbed(ground, PACKED_WITH_DROPOUT)
    run = run_disturbed(ground, PACKED_WITH_DROPOUT, BLOWS, name="killed")
    assert run.findings == []
    assert [struck.blow for struck in run.struck] == BLOWS
    assert run.commands == len(BLOWS) + 1
    largest, problems = compare(peaceful, run.files, same_world=True)
    assert (largest, problems) == (0.0, [])

    resumed = [row["step"] for row in read_json_lines(run.files.events) if row["event"] == "resume"]
    assert len(resumed) == 2, "the first blow fell before anything was saved"
    assert 0 < resumed[0] < resumed[1]
