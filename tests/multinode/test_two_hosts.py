"""Two hosts train one recipe, with two ranks each, and one of them gets into trouble.

The hosts are network namespaces: their own loopback, their own address, a cable between them. The
launchers, torchrun, the ranks and gloo are the real ones.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from support.hosts import ADDRESSES, Hosts, Launcher, wait_until

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

AT_STEP = 6


def losses(files: RunFiles) -> dict[int, float]:
    """Returns the training losses; of a step that was done twice, the later one."""
    rows = read_json_lines(files.metrics)
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def waiting(tmp_path: Path) -> dict[str, str]:
    """Returns what makes rank 0 wait at `AT_STEP`."""
    return {
        "MISBEHAVE": f"wait:0:{AT_STEP}",
        "MISBEHAVE_HERE": str(tmp_path / "here"),
        "MISBEHAVE_GO": str(tmp_path / "go"),
    }


def assert_ended(launchers: list[Launcher], codes: list[int]) -> None:
    found = [launcher.end() for launcher in launchers]
    assert found == codes, "\n---\n".join(launcher.text for launcher in launchers)


def test_shards_stay_on_their_host_and_losses_are_those_of_one(
    hosts: Hosts, project: Path, undisturbed: RunFiles
) -> None:
    before = hosts.sent_bytes()
    command = ["train", "recipe.yaml", "fsdp.strategy=hybrid_full_shard", "--run-dir", "hybrid"]
    launchers = [hosts.start(host, *command, "--node-rank", str(host)) for host in (1, 0)]
    assert_ended(launchers, [0, 0])
    sent = hosts.sent_bytes() - before
    files = RunFiles(project / "hybrid")
    # Sums over two groups of two ranks are added in another order than over four ranks.
    assert losses(files) == pytest.approx(losses(undisturbed), rel=1e-6)
    lock = json.loads(files.lock.read_text())
    assert [node["address"] for node in lock["nodes"]] == list(ADDRESSES)
    assert lock["world_size"] == 4
    print("SENT", sent)
    other, first = launchers
    assert "step 8/8" in first.text
    assert "step" not in other.text, "only the first host shows the progress"
    assert "the run has finished: the first machine tells how it went" in other.text


def test_a_killed_host_comes_back_and_nothing_is_lost(
    hosts: Hosts, project: Path, undisturbed: RunFiles, tmp_path: Path
) -> None:
    command = ["train", "recipe.yaml", "launch.max_restarts=1", "--run-dir", "killed"]
    before = hosts.sent_bytes()
    launchers = [hosts.start(host, *command, **waiting(tmp_path)) for host in (0, 1)]
    wait_until((tmp_path / "here").exists, f"step {AT_STEP}")
    print("SENT", hosts.sent_bytes() - before)
    launchers[1].kill_all()
    (tmp_path / "go").touch()
    launchers[1] = hosts.start(1, *command)
    assert_ended(launchers, [0, 0])
    files = RunFiles(project / "killed")
    assert losses(files) == losses(undisturbed)
    text = launchers[0].text
    print(text)
    assert f"({ADDRESSES[1]}), machine 1 beside the first, is lost: its launcher ended: " in text
    assert "restart 1 of 1, going on from step 4" in text


def test_a_host_that_is_cut_off_is_left_behind(
    hosts: Hosts, project: Path, undisturbed: RunFiles, tmp_path: Path
) -> None:
    command = [
        "train", "recipe.yaml", "launch.nnodes='1:2'", "launch.max_restarts=1", "--run-dir", "cut",
        "fsdp.strategy=hybrid_full_shard",
    ]  # fmt: skip
    launchers = [hosts.start(host, *command, **waiting(tmp_path)) for host in (0, 1)]
    wait_until((tmp_path / "here").exists, f"step {AT_STEP}")
    hosts.cut()
    (tmp_path / "go").touch()
    try:
        code = launchers[0].end()
        launchers[1].ask(signal.SIGTERM)
    finally:
        hosts.mend()
    print(launchers[0].text, "=====", launchers[1].text)
    assert code == 0
    files = RunFiles(project / "cut")
    assert losses(files) == pytest.approx(losses(undisturbed), rel=1e-5)
