"""`fsdpq prepare` with the real worker, and `fsdpq train` over what it made."""

from __future__ import annotations

import json
from pathlib import Path

from support.commands import Run

from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.writing import read_json_lines

DATA = ("data.packing=best_fit", "data.seq_len=60")


def test_training_uses_prepared_data_and_reports_it(
    fsdpq: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["FSDPQ_CACHE"] = str(tmp_path / "cache")
    done = fsdpq("prepare", "recipe.yaml", *DATA, "--json")
    assert done.returncode == 0, done.stderr
    assert "preparing the data: the cache has none of these rows" in done.stderr
    found = json.loads(done.stdout)
    report = found["report"]
    assert (report["num_train_rows"], report["num_held_out"]) == (24, 8)
    assert Path(found["directory"]).parent == tmp_path / "cache" / "prepared"

    files = RunFiles(tmp_path / "run")
    done = fsdpq("train", "recipe.yaml", *DATA, "training.steps=2", "--run-dir", str(files.root))
    assert done.returncode == 0, done.stderr
    assert "the data is prepared already: 24 rows" in done.stderr
    assert "preparing the data" not in done.stderr
    assert json.loads(files.lock.read_text())["inputs"]["prepared"] == found
    assert json.loads(files.report_json.read_text())["data"] == report
    assert f"{report['num_tokens']:,} tokens, {report['num_trained']:,} of them trained" in (
        files.report_html.read_text()
    )
    notices = [row["message"] for row in read_json_lines(files.events) if row["event"] == "notice"]
    assert any(message.startswith("packed 24 training rows into") for message in notices)


def test_mistake_in_a_row_is_shown_with_its_line(
    fsdpq: Run, project: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["FSDPQ_CACHE"] = str(tmp_path / "cache")
    rows = (project / "rows.jsonl").read_text().splitlines()
    long = {"role": "user", "content": "one " * 200}
    rows[6] = json.dumps({"messages": [long, {"role": "assistant", "content": "one"}]})
    (tmp_path / "long.jsonl").write_text("\n".join(rows) + "\n")
    done = fsdpq(
        "prepare", "recipe.yaml", f"data.path={tmp_path}/long.jsonl", "data.truncation=error"
    )
    assert done.returncode == 2
    assert "tokens, and `data.seq_len` is 64" in done.stderr
    assert f"--> {tmp_path}/long.jsonl:7:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "cache" / "prepared").glob("[!.]*"))
