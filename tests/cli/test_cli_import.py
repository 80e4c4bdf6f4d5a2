"""``fsdpq import``: what goes where, exit codes, and input that means harm."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fsdpq.cli.main import cli, main
from fsdpq.errors import ExitCode
from fsdpq.importing.convert import import_config
from fsdpq.importing.write import write_recipe
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.source import read_source

TRL = """\
model_name_or_path: org/small
dataset_name: rows.jsonl
use_peft: true
max_length: 256
neftune_noise_alpha: 5
pushh_to_hub: true
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def invoke(*words: str) -> Result:
        return CliRunner().invoke(cli, ["import", *words])

    return invoke


def test_recipe_on_stdout_and_findings_on_stderr(run: Run, tmp_path: Path) -> None:
    Path("trl.yaml").write_text(TRL, encoding="utf-8")
    result = run("trl.yaml", "--from", "trl")
    assert result.exit_code == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(result.stdout, encoding="utf-8")
    assert load_resolved(recipe).model.name_or_path == "org/small"
    assert "# yaml-language-server: $schema=" in result.stdout
    assert "name_or_path: org/small                       # model_name_or_path" in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0] == "not taken by trl itself (1)"
    assert lines[1].startswith("  trl.yaml:6  pushh_to_hub: true  TRL does not know it")
    assert "did you mean `push_to_hub`?" in lines[1]
    assert "no counterpart in fsdpq (1)" in lines
    assert "  trl.yaml:5  neftune_noise_alpha: 5  no noise is added to embeddings" in lines


def test_comment_names_what_was_left_behind(run: Run) -> None:
    Path("trl.yaml").write_text(TRL, encoding="utf-8")
    text = run("trl.yaml").stdout
    assert "#   line 5: `neftune_noise_alpha: 5`: no noise is added to embeddings" in text


def test_out_writes_a_new_file_and_keeps_an_old_one(run: Run) -> None:
    Path("trl.yaml").write_text(TRL, encoding="utf-8")
    result = run("trl.yaml", "--out", "mine.yaml")
    assert (result.exit_code, result.stdout) == (0, "mine.yaml\n")
    written = Path("mine.yaml").read_text(encoding="utf-8")
    assert "fsdpq train mine.yaml" in written
    with pytest.raises(SystemExit) as stop:
        main(["import", "trl.yaml", "--out", "mine.yaml"])
    assert stop.value.code == ExitCode.RECIPE
    assert Path("mine.yaml").read_text(encoding="utf-8") == written


def test_json_holds_recipe_and_findings(run: Run) -> None:
    Path("trl.yaml").write_text(TRL, encoding="utf-8")
    fields = json.loads(run("trl.yaml", "--json").stdout)
    assert fields["tool"] == "trl"
    assert fields["recipe"]["data"]["seq_len"] == 256
    [dropped] = [f for f in fields["findings"] if f["outcome"] == "dropped"]
    assert (dropped["key"], dropped["line"], dropped["column"]) == ("pushh_to_hub", 6, 1)
    told = {finding["key"] for finding in fields["findings"]}
    assert {"model_name_or_path", "dataset_name", "use_peft", "max_length"} <= told


def test_command_after_two_dashes(run: Run) -> None:
    words = ("--", "python", "train.py", "--train_type", "hqq_lora", "--n_bits=3")
    fields = json.loads(run("--from", "fsdp_qlora", "--json", *words).stdout)
    assert fields["recipe"]["quantization"] == {"kind": "hqq", "nbits": 3, "group_size": 64}


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (TRL, ["--from", "axolotl"], "is not a config of axolotl: it looks like one of trl"),
        ("a: 1\nb: 2\n", [], "is not a config of any tool that is known here: its keys are `a`"),
        ("distributed_type: FSDP\nmixed_precision: 'no'\ndebug: false\nnum_machines: 1\n", [],
         "it looks like an accelerate config"),
        ("version: 1\nname: x\nmodel: {}\ndata: {}\n", [], "it looks like a recipe of fsdpq"),
        ("sequence_len: 5\nnum_epochs: 2\n", ["--from", "axolotl"], "`model.name_or_path`"),
        (TRL, ["--accelerate", "gone.yaml"], "gone.yaml"),
        ("", [], "empty"),
        ("[]", [], "mapping"),
    ],
)  # fmt: skip
def test_what_is_no_config_ends_with_exit_code_2(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: list[str],
    message: str,
) -> None:
    Path("c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["import", "c.yaml", *words])
    captured = capsys.readouterr()
    assert stop.value.code == ExitCode.RECIPE
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def _exit_code(words: list[str]) -> int:
    try:
        main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


HOSTILE = [
    "base_model: !!python/object/apply:os.system ['touch harm']\n",
    "base_model: ${oc.env:HOME}\n",
    'base_model: "a\\u2028b: c\\n  harm: true"\nlora_r: "\\e[31m"\nfoo\\x85: 1\n',
    "base_model: a/b\n" + "x: " + "[" * 3000 + "\n",
    "base_model: a/b\nlora_r: 999999999999999999999999999\nsequence_len: .nan\nnum_epochs: .inf\n",
    "base_model: a/b\nplugins: [os.system]\n_target_: os.system\nfsdp_config: [1]\ndatasets: 7\n",
    "base_model: a/b\nbase_model: c/d\n? [complex]\n: 1\n1: 2\n",
    "base_model: a/b\ndatasets: [{path: '../../../../etc/passwd', type: {a: {b: c}}}]\n",
    "base_model: \x00\n",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_config_runs_nothing_and_gives_no_traceback(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    Path("c.yaml").write_text("micro_batch_size: 1\nadapter: lora\n" + text, encoding="utf-8")
    code = _exit_code(["import", "c.yaml", "--from", "axolotl", "--out", "out.yaml"])
    assert code in (ExitCode.OK, ExitCode.RECIPE)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert not (tmp_path / "harm").exists()
    if Path("out.yaml").exists():
        load_resolved(Path("out.yaml"))
        assert "harm" not in read_source(Path("out.yaml")).data


def test_written_recipe_reads_back_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "trl.yaml"
    path.write_text(TRL + "run_name: 'yes: # no'\nreport_to: wandb\n", encoding="utf-8")
    result = import_config(path)
    out = tmp_path / "out.yaml"
    out.write_text(write_recipe(result, out=out), encoding="utf-8")
    assert read_source(out).data == result.document
    assert result.document["metrics"]["wandb"]["name"] == "yes: # no"


def test_json_config_is_read_as_the_yaml_that_it_is(run: Run) -> None:
    Path("c.json").write_text(
        json.dumps({"model_name_or_path": "a/b", "stage": "sft", "dataset": "x", "cutoff_len": 64}),
        encoding="utf-8",
    )
    assert json.loads(run("c.json", "--json").stdout)["tool"] == "llamafactory"
