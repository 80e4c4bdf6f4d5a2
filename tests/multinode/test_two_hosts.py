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


def test_a_killed_host_comes_back_and_nothing_is_lost(
    hosts: Hosts, project: Path, undisturbed: RunFiles, tmp_path: Path
) -> None:
    command = ["train", "recipe.yaml", "launch.max_restarts=1", "--run-dir", "killed"]
    launchers = [hosts.start(host, *command, **waiting(tmp_path)) for host in (0, 1)]
    wait_until((tmp_path / "here").exists, f"step {AT_STEP}")
    launchers[1].kill_all()
    (tmp_path / "go").touch()
    launchers[1] = hosts.start(1, *command)
    assert_ended(launchers, [0, 0])
    files = RunFiles(project / "killed")
    assert losses(files) == losses(undisturbed), "to the last bit"
    first, other = (launcher.text for launcher in launchers)
    assert f"({ADDRESSES[1]}), machine 1 beside the first, is lost: its launcher ended: " in first
    assert "restart 1 of 1, going on from step 4" in first
    assert "step 8/8" in first
    assert "step " not in other, "only the first host shows the progress"
    assert "the run has finished: the first machine tells how it went" in other
    lock = json.loads(files.lock.read_text())
    assert [node["address"] for node in lock["nodes"]] == list(ADDRESSES)
    assert lock["world_size"] == 4


def test_shards_stay_on_their_host_and_the_other_one_can_do_without_it(
    hosts: Hosts, project: Path, undisturbed: RunFiles, tmp_path: Path
) -> None:
    command = [
        "train", "recipe.yaml", "launch.nnodes='1:2'", "launch.max_restarts=1", "--run-dir", "cut",
        "fsdp.strategy=hybrid_full_shard",
    ]  # fmt: skip
    before = hosts.sent_bytes()
    launchers = [
        hosts.start(host, *command, "--node-rank", str(host), **waiting(tmp_path))
        for host in (0, 1)
    ]
    wait_until((tmp_path / "here").exists, f"step {AT_STEP}")
    sent = hosts.sent_bytes() - before
    hosts.cut()
    (tmp_path / "go").touch()
    try:
        assert_ended(launchers[:1], [0])
        wait_until(lambda: "is lost" in launchers[1].text, "the other host to notice")
        launchers[1].ask(signal.SIGTERM)
        assert launchers[1].end() != 0
    finally:
        hosts.mend()
    files = RunFiles(project / "cut")
    # Sums over groups of two ranks, and then over two ranks, are added in another order.
    assert losses(files) == pytest.approx(losses(undisturbed), rel=1e-6)
    first, other = (launcher.text for launcher in launchers)
    assert "is lost: it was not heard from for 4 s: it was switched off, is stopped, or" in first
    assert "starting on 1 machine of 2" in first
    assert f"the first machine ({ADDRESSES[0]}:29500) is lost: it was not heard from" in other
    setups = [row for row in read_json_lines(files.events) if row["event"] == "setup"]
    assert [row["world_size"] for row in setups] == [4, 2]
    held = [row["base_bytes_per_rank"] for row in setups]
    assert held[1] == held[0][:2], "a host that is alone holds its copy in as many shards"
    # Shards over both hosts would bring half of the base to each host, forward and backward.
    a_step = 2 * sum(held[0]) // 2
    assert sent < (AT_STEP - 1) * a_step
