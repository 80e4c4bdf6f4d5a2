"""What ``docs/guides/ci.md`` tells people to write is what fsdpq takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from fsdpq.cli.main import cli
from fsdpq.sweep.choosing.expand import expand
from fsdpq.sweep.choosing.spec import read_spec
from fsdpq.sweep.results.baseline import parse_tolerances
from fsdpq.sweep.results.conditions import parse_condition
from fsdpq.sweep.results.measures import KNOWN

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "guides" / "ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.S)
DOCUMENTS = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
WORKFLOW = next(found for found in DOCUMENTS if "jobs" in found)
STEPS = WORKFLOW["jobs"]["sweep"]["steps"]


def commands() -> Iterator[list[str]]:
    """Yields every ``fsdpq`` command of the page, as words."""
    for step in STEPS:
        if step.get("run", "").startswith("fsdpq"):
            yield shlex.split(step["run"])
    for language, text in BLOCKS:
        if language == "console":
            lines = (line.removeprefix("$ ") for line in text.splitlines())
            yield from (shlex.split(line) for line in lines if line.startswith("fsdpq"))
    for text in re.findall(r"`(fsdpq [^`]+)`", PAGE):
        yield shlex.split(text)


COMMANDS = list(commands())


def test_page_has_the_commands_that_are_looked_at():
    assert len(COMMANDS) >= 6
    assert any("--baseline" in words for words in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_have_only_options_that_exist(words):
    command = cli.commands[words[1]]
    options = {
        name: parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
    }
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if not word.startswith("--"):
            continue
        assert word in options, word
        if word == "--fail-if":
            parse_condition(value)
        elif word == "--tolerance":
            parse_tolerances([value])


def test_workflow_is_one_that_github_runs():
    assert set(WORKFLOW) == {"name", True, "permissions", "jobs"}  # YAML 1.1 reads `on` as true
    assert WORKFLOW[True].keys() == {"pull_request", "workflow_dispatch"}
    assert all(len({"uses", "run"} & set(step)) == 1 for step in STEPS)
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)
    upload = next(step for step in STEPS if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"  # of failed sweeps above all
    sweep = next(step for step in STEPS if step.get("name") == "Sweep")
    directory = sweep["run"].split("--out ")[1].split()[0]
    assert all(path.startswith(f"{directory}/") for path in upload["with"]["path"].split())


def test_workflow_installs_what_the_recipes_need():
    install = shlex.split(next(step for step in STEPS if step.get("name") == "Install")["run"])
    assert install[:4] == ["pip", "install", "-c", "constraints.txt"]
    assert (ROOT / "constraints.txt").is_file()
    assert install[-1] == ".[hqq]"
    assert "\nhqq = [" in (ROOT / "pyproject.toml").read_text()


def test_sweep_of_the_page_has_six_valid_trials(tmp_path):
    document = next(found for found in DOCUMENTS if "sweep" in found)
    document["recipe"] = str(ROOT / "recipes" / document["recipe"])
    path = tmp_path / "ci.yaml"
    path.write_text(yaml.safe_dump(document))
    loaded = read_spec(path)
    assert loaded.spec.smoke
    assert len(expand(loaded).trials) == 6


def test_every_measure_is_on_the_page():
    assert [name for name in KNOWN if f"`{name}`" not in PAGE] == []
