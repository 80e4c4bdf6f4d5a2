"""A worker that prepares nothing real, without torch: ``FAKE_PREPARER`` says how it behaves."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from fsdpq.errors import Location, Problem, RecipeError
from fsdpq.rows.prepared_files import ITEM_BYTES, PreparedManifest, StoredFile, write_manifest
from fsdpq.rows.report import DataReport, SourceCounts
from fsdpq.worker.guard import end_with_launcher, recorded_errors


def prepare(job: Path, directory: Path) -> None:
    task = json.loads(job.read_text())
    files = {}
    for name, size in ITEM_BYTES.items():
        content = bytes(size) * 10
        (directory / name).write_bytes(content)
        files[name] = StoredFile(len(content), hashlib.sha256(content).hexdigest())
    behaviour = os.environ.get("FAKE_PREPARER", "")
    if behaviour == "wait":
        (directory / "waits").touch()
        time.sleep(3600)
    while behaviour == "wait for go" and not Path(os.environ["FAKE_GO"]).exists():
        time.sleep(0.05)
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "bad row":
        place = Location("rows.jsonl", 3, 1)
        raise RecipeError([Problem("the template refuses it", "data", place, "change the row")])
    if behaviour == "bug":
        raise OSError(errno.EIO, "a disk that lies")
    rows = task["sources"]["train"][0]["num_rows"]
    counts = SourceCounts("rows", num_rows=rows)
    report = DataReport(task["data"]["seq_len"], (counts,), num_train_rows=rows, num_tokens=5000)
    write_manifest(directory, PreparedManifest(task["key"], False, report, files))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--error", type=Path)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    parsed = parser.parse_args()
    trust = " trusts" if parsed.trust_remote_code else ""
    with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
        calls.write(f"{os.getpid()} {parsed.processes}{trust} {os.environ.get('HF_TOKEN', '')}\n")
    end_with_launcher()
    with recorded_errors(parsed.error, 0):
        prepare(parsed.job, parsed.directory)
    sys.stdout.flush()


main()
