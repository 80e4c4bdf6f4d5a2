"""Before any worker starts, `fsdpq merge` says what cannot be merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.screens import Lines
from support.tiny import tiny_recipe

from fsdpq.cli.merge import receipt_lines
from fsdpq.errors import LaunchError, UsageError
from fsdpq.launch.merge import MergeChoices, merge, merge_trained
from fsdpq.recipe.load import dump_recipe
from fsdpq.run_files.paths import RunFiles

NUMBERS = {
    "change_norm": 0.5, "survived_norm": 0.5, "base_norm": 10.0, "kept": 0.999,
    "relative_error": 0.0123, "lost": 0.0,
}  # fmt: skip
RECEIPT = {
    "onto": "original", "dtype": "bf16", "requantize": None, "num_bytes": 2_200_000_000,
    "files": ["model.safetensors"], "requantized": None, "notices": ["a note"],
    "merged": {"all": NUMBERS, "kinds": {"mlp.up_proj": NUMBERS}, "weights": {}},
    "likeness": {
        "tokens": 12, "text": "held-out rows of the run",
        "models": {"trained": {"loss": 1.5, "mean_kl": 0.0, "max_kl": 0.0}},
    },
    "verdict": ["It is."],
}  # fmt: skip
WORKER = f"""
import json, pathlib, sys, time
out = pathlib.Path(next(a for a in sys.argv if a.startswith("--out="))[6:])
for what in ("comparing: one", "comparing: two"):
    print(json.dumps({{"what": what, "done": 0, "total": 0}}), flush=True)
    time.sleep(0.3)
out.mkdir()
(out / "merge.json").write_text({json.dumps(json.dumps(RECEIPT))})
(out / "arguments").write_text(" ".join(sys.argv[1:]))
"""


def make_run(root: Path, **sections: dict[str, str]) -> RunFiles:
    files = RunFiles(root)
    base = root.parent / "base"
    base.mkdir(exist_ok=True)
    files.adapter.mkdir(parents=True)
    files.resolved.write_text(
        dump_recipe(tiny_recipe(**({"export": {"format": "peft"}} | sections)))
    )
    files.lock.write_text(json.dumps({"inputs": {"model": {"directory": str(base)}}}))
    return files


def test_the_worker_gets_what_was_asked_for_and_its_receipt_comes_back(tmp_path: Path) -> None:
    files, screen = make_run(tmp_path / "run"), Lines()
    choices = MergeChoices("original", "nf4", "bf16", 64)
    out = tmp_path / "out"
    receipt = merge(files.root, out, choices, screen=screen, worker=("-c", WORKER))
    assert receipt == RECEIPT
    root, error, *others = (out / "arguments").read_text().split()
    assert root == str(files.root)
    assert error.startswith(f"--error={files.logs}/merge-")
    assert not list(files.logs.iterdir()), "nothing is left of a merge that went well"
    assert " ".join(others) == (
        f"--out={out} --onto=original --device=cpu --compare-tokens=64 "
        "--requantize=nf4 --dtype=bf16"
    )
    assert screen.lines == ["comparing: one", "comparing: two"]
    shown = "\n".join(receipt_lines(receipt))
    assert "merged onto the original weights in bf16: 2.2 GB in 1 file\n" in shown
    assert "  mlp.up_proj       0.5     5.00%   99.90%    1.23%\n" in shown
    assert "  on 12 tokens of held-out rows of the run" in shown
    assert shown.endswith("\na note\n\nIt is.")


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    def message(run: Path, out: Path = tmp_path / "out") -> str:
        with pytest.raises(UsageError) as caught:
            merge(run, out, MergeChoices(), screen=Lines(), worker=("-c", "1/0"))
        assert caught.value.hint
        return caught.value.message

    assert "is no run directory" in message(tmp_path)
    whole = make_run(tmp_path / "whole", export={"format": "transformers"})
    whole.model.mkdir()
    assert "the run left a whole model" in message(whole.root)
    files = make_run(tmp_path / "run")
    assert "exists and is not empty" in message(files.root, tmp_path)
    (tmp_path / "base").rmdir()
    assert "the base model of the run" in message(files.root)
    files.adapter.rmdir()
    assert "has exported nothing" in message(files.root)


def test_a_merge_that_fails_after_training_says_that_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_run(tmp_path / "run")
    monkeypatch.setattr("fsdpq.launch.merge.MERGER", ("-c", "raise SystemExit(7)"))
    recipe = tiny_recipe(export={"format": "peft", "merge": True})
    with pytest.raises(LaunchError, match="exit code 7") as caught:
        merge_trained(files, recipe, screen=Lines(), trust_remote_code=False)
    assert f"the training itself is done; to merge again: `fsdpq merge {files.root}" in str(
        caught.value
    )
