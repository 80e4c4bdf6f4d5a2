"""`fsdpq push` against a stand-in for the hub, with the real huggingface_hub client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub_stand_in import COMMIT, TOKEN, HubStandIn, Repository, hub_stand_in

from fsdpq.errors import FsdpqError, UsageError
from fsdpq.fetch.hub_push import list_upload
from fsdpq.run_files.paths import RunFiles

CARD = """\
---
library_name: peft
---

base = AutoModelForCausalLM.from_pretrained("BASE")

`THIS` is this directory; `BASE` is a directory with the base model.
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with hub_stand_in() as server:
        yield server


def make_run(root: Path, *, revision: str | None = None, **changes: Any) -> Path:
    """Returns a finished run over a local base, or over one at a revision of the hub."""
    adapter = root / "adapter"
    adapter.mkdir(parents=True)
    base = "org/base" if revision else str(root.parent / "model")
    config = {"base_model_name_or_path": base, "revision": revision}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (adapter / "README.md").write_text(CARD)
    rows = [{"event": "export", "format": "peft", "verified": True} | changes, {"event": "done"}]
    (root / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def push(hub: HubStandIn, run: Path, *arguments: str, token: str = TOKEN) -> Any:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(run / "hf"), "HF_TOKEN": token}
    return subprocess.run(
        [sys.executable, "-m", "fsdpq", "push", str(run), *arguments],
        env=os.environ | environment | {"HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"},
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_an_export_arrives_private_and_names_its_base(hub: HubStandIn, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done = push(hub, run, "--to", "me/mine", "--base", "org/base", "--yes", "--revision", "first")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/mine/commit/{COMMIT}\n"
    assert "to me/mine (private, branch first):" in done.stderr
    assert "adapter_model.safetensors  6.84 KiB" in done.stderr
    repository = hub.repositories["me/mine"]
    assert repository.private
    files = repository.branches["first"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == b"weights" * 1000
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    card = files["README.md"].decode()
    assert card.startswith("---\nbase_model: org/base\nbase_model_relation: adapter\n")
    assert 'from_pretrained("org/base")' in card
    assert "BASE" not in card
    assert (run / "adapter" / "README.md").read_text() == CARD, "here all is as it was"
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verified": False}, "nobody checked that stock libraries load what this run exported"),
        ({"event": "phase"}, "is not finished: there is nothing to push"),
        ({"format": "transformers"}, "model is gone"),
        ({}, "which nobody else has"),
    ],
)
def test_what_should_not_be_pushed_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FsdpqError, match=message):
        list_upload(RunFiles(make_run(tmp_path / "run", **changes)), base=None)


def test_a_path_of_this_machine_is_not_pushed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", revision=COMMIT)
    assert len(list_upload(RunFiles(run), base=None)) == 3
    (run / "adapter" / "README.md").write_text(f"trained in {run}")
    with pytest.raises(UsageError, match=r"`README\.md` names a directory of this machine"):
        list_upload(RunFiles(run), base=None)
    with pytest.raises(UsageError, match="is `org/base`, not `org/other`"):
        list_upload(RunFiles(run), base="org/other")


def test_nothing_is_uploaded_without_a_yes(hub: HubStandIn, tmp_path: Path) -> None:
    before = len(hub.requests)
    run = make_run(tmp_path / "run", revision=COMMIT)
    unasked = push(hub, run, "--to", "me/other")
    assert (unasked.returncode, "nobody is there to ask" in unasked.stderr) == (2, True)
    assert len(hub.requests) == before


def test_the_hubs_refusals_say_what_to_do(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repositories["me/seen"] = Repository(private=False)
    run = make_run(tmp_path / "run", revision=COMMIT)
    seen = push(hub, run, "--to", "me/seen", "--yes")
    assert (seen.returncode, "everybody sees `me/seen`" in seen.stderr) == (2, True), seen.stderr
    assert hub.repositories["me/seen"].branches == {"main": {}}
    public = push(hub, run, "--to", "me/seen", "--yes", "--public")
    assert public.returncode == 0, public.stderr
    assert hub.repositories["me/seen"].branches["main"]
    foreign = push(hub, run, "--to", "you/theirs", "--yes")
    assert (foreign.returncode, "does not let you write" in foreign.stderr) == (4, True)
    wrong = push(hub, run, "--to", "me/mine2", "--yes", token="hf_other")
    assert (wrong.returncode, "does not let you write" in wrong.stderr) == (4, True)
    assert not {TOKEN, "hf_other"} & set((seen.stderr + foreign.stderr + wrong.stderr).split())
