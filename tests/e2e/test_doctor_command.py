"""``fsdpq doctor --self-test`` as a user runs it: every check on two real ranks."""

from __future__ import annotations

import json

from support.commands import Run


def test_self_test_passes_on_two_cpu_ranks(fsdpq: Run) -> None:
    done = fsdpq("doctor", "--self-test", "--device", "cpu", "--json", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["num_ranks"], found["device"]) == (True, 2, "cpu")
    checks = found["checks"]
    skipped = [check["name"] for check in checks if check["status"] == "skipped"]
    assert skipped == ["host memory", "activations"]
    assert sum(check["status"] == "passed" for check in checks) == len(checks) - 2
    groups = [check["group"] for check in checks]
    assert groups.count("bytes") == 4
    # Five cases of bitsandbytes and five of hqq: shards, dequantized weights, gradients.
    # Then the tiny Llama, and what is offloaded.
    assert len(checks) == 3 + 4 + 3 * 10 + 1 + 2
