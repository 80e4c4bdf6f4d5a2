"""`fsdpq generate` and `fsdpq chat` with the real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines


@pytest.fixture(scope="module")
def trained(project: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run of the tiny project with checkpoints; one process, some steps."""
    files = RunFiles(tmp_path_factory.mktemp("trained") / "run")
    command = [
        sys.executable, "-m", "fsdpq", "train", "recipe.yaml", "launch.nproc_per_node=1",
        "checkpoint.interval=8", "checkpoint.keep_last=3", "--run-dir", str(files.root),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return files


def test_both_answer_as_the_run_did(
    fsdpq: Run, project: Path, environment: dict[str, str], trained: RunFiles, tmp_path: Path
) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "What is one?"}\n{"prompt": "What is two?", "system": "x"}\n')
    done = fsdpq("generate", str(trained.root), "--file", str(rows), "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    samples = [row for row in read_json_lines(trained.events) if row["event"] == "sample"]
    answers = {row["when"]: row["answer"] for row in samples}
    assert answers["after"] != answers["before"]
    # Unsharded and dequantized once, and yet the same as in the run.
    assert first["answer"] == answers["after"]
    assert second["num_tokens"] <= 8

    # The last checkpoint is what was exported; without it the model is as it was before.
    talk = subprocess.run(
        [
            sys.executable, "-m", "fsdpq", "chat", str(trained.root), "--checkpoint=newest",
            "--dequantize=never", "--temperature=0", "--max-new-tokens=8",
        ],
        cwd=project, env=environment, input="What is one?\n/base\n/retry\n", text=True,
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout == f"{answers['after']}\n{answers['before']}\n"
    assert "note: answers come from the checkpoint of step 24" in talk.stderr
