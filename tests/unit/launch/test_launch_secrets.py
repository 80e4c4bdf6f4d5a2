"""The front half and a rank: tokens stay out of the run, trust in code comes from a flag only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.screens import Lines

from fsdpq.launch.inputs import prepare
from fsdpq.launch.train import train

TOKEN = "hf_secretSecretSecretSecretSecretSecret"
RANK = """\
import json, os, sys
from pathlib import Path

run_dir = Path(sys.argv[-1])
print(dict(os.environ), flush=True)
if os.environ["RANK"] == "0":
    (run_dir / "argv.json").write_text(json.dumps(sys.argv[1:-1]))
    (run_dir / "environ.json").write_text(json.dumps(dict(os.environ)))
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "done", "time": 0}) + "\\n")
"""
RECIPE = """\
version: 1
name: tiny
model: {name_or_path: model}
data: {path: rows.jsonl}
launch: {nproc_per_node: 1, device: cpu}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSDPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    preparer = (str(Path(__file__).with_name("fake_preparer.py")),)
    monkeypatch.setattr(prepare, "PREPARER", preparer)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, TOKEN)
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "modeling_x.py"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path


def test_tokens_of_the_environment_reach_no_file_and_trust_only_the_ranks_arguments(
    project: Path,
) -> None:
    screen = Lines()
    worker = (str(project / "rank.py"),)
    plain = train(Path("recipe.yaml"), ["name=plain"], run_dir=None, screen=screen, worker=worker)
    trusting = train(
        Path("recipe.yaml"), [], run_dir=None, screen=screen, trust_remote_code=True, worker=worker
    )
    written = [path for path in (project / "runs").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "recipe.resolved.yaml", "run.lock.json", "torchrun.log"} <= {
        path.name for path in written
    }
    assert [path for path in written if TOKEN in path.read_text(errors="replace")] == []
    assert TOKEN not in "\n".join(screen.lines)
    environ = json.loads((plain.root / "environ.json").read_text())
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in environ

    calls = (project / "calls").read_text().splitlines()
    assert [" trusts" in call for call in calls] == [False, True]
    assert not any(TOKEN in call for call in calls)
    assert json.loads((plain.root / "argv.json").read_text()) == []
    assert json.loads((trusting.root / "argv.json").read_text()) == ["--trust-remote-code"]
    locks = [json.loads(files.lock.read_text()) for files in (plain, trusting)]
    assert [lock["trust_remote_code"] for lock in locks] == [False, True]
    hashes = [lock["inputs"]["model"]["sha256"] for lock in locks]
    assert hashes[0] != hashes[1], "code that may run is part of the model's hash"
    assert "trust_remote_code" not in trusting.resolved.read_text()
