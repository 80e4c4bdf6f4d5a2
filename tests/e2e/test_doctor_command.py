"""``fsdpq doctor`` as a user runs it: devices and ranks tried, and the whole self-test."""

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


def test_machine_is_tried_and_can_train(fsdpq: Run) -> None:
    done = fsdpq("doctor", "--json", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    values = {(f["subject"], f["name"]): f["value"] for f in found["findings"]}
    assert len(values) == len(found["findings"]), "names are unique within their subject"
    assert all(f["status"] == "ok" or f["remedy"] for f in found["findings"])
    tried = [name for subject, name in values if subject == "ranks"]
    assert tried == [
        "all-reduce", "gather", "bnb nf4, double: shards", "bnb nf4, double: dequantized",
        "bnb nf4, double: gradients", "speed",
    ]  # fmt: skip
    assert values["device", "bf16 products"] == "exact (CPU)"
    assert "sums of 4 MiB exact" in values["ranks", "speed"]
    assert {subject for subject, _ in values} >= {"software", "host", "network", "disk", "device"}
