"""A sweep is read like a recipe: strictly, with a place and a hint for every mistake at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fsdpq.errors import Problem, RecipeError, UsageError
from fsdpq.recipe.source import read_source
from fsdpq.sweep.choosing.document import sweep_schema, sweep_schema_text
from fsdpq.sweep.choosing.expand import expand
from fsdpq.sweep.choosing.spec import (
    LoadedSpec,
    dump_spec,
    is_sweep_file,
    read_spec,
    recipe_spec,
)

ROOT = Path(__file__).parents[3]
RECIPE = """\
version: 1
name: tiny
model: {name_or_path: org/model}
data: {dataset: pypi:chatterbot-english}
adapter: {kind: lora, rank: 8, alpha: 8, target_modules: [q_proj]}
"""
SWEEP = """\
sweep: 1
recipe: r.yaml
"""
TOKEN = "hf_" + "a1B2" * 6
UNEVEN = "keys that vary together need as many values each"
Read = Callable[..., LoadedSpec]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "r2.yaml").write_text(RECIPE.replace("rank: 8", "rank: 9"), encoding="utf-8")

    def write_and_read(text: str, *words: str, **changes: Any) -> LoadedSpec:
        (tmp_path / "sweep.yaml").write_text(text, encoding="utf-8")
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        return read_spec(tmp_path / "sweep.yaml", words, dotted)

    return write_and_read


def problems(read: Read, text: str, *words: str, **changes: Any) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        read(text, *words, **changes)
    return caught.value.problems


def told(found: list[Problem]) -> list[tuple[str, int, str]]:
    lines = [problem.location.line if problem.location else 0 for problem in found]
    return [(p.message, line, p.hint) for p, line in zip(found, lines, strict=True)]


def settings(loaded: LoadedSpec) -> list[dict[str, Any]]:
    return [dict(trial.settings) for trial in expand(loaded).trials]


def test_values_and_texts_make_the_same_trials(read: Read) -> None:
    lists = read(SWEEP + "parameters:\n  adapter.rank: [1, 2]\n  quantization: [bnb, none]\n")
    texts = read(SWEEP + "parameters:\n  adapter.rank: range(1,3)\n  quantization: bnb,none\n")
    assert settings(lists) == settings(texts)
    assert [trial.id for trial in expand(lists).trials] == [t.id for t in expand(texts).trials]
    assert settings(lists)[:2] == [
        {"adapter.rank": 1, "quantization": "bnb"},
        {"adapter.rank": 1, "quantization": "none"},
    ]


def test_no_parameters_is_one_trial(read: Read) -> None:
    assert settings(read(SWEEP)) == [{}]


def test_every_mistake_is_told_at_its_line(read: Read) -> None:
    text = (
        "sweep: 1\nrecipe: [3]\nparameterss: {}\nparameters:\n  adapter.rank: []\n"
        "  adapter: {rank: 3}\n  optimizer.lr: [{a: 1}]\nzip: [[a, 3]]\n"
        "strategy: {kind: random}\ngoal: {direction: up}\nparallel: 0\n"
    )
    assert told(problems(read, text)) == [
        (
            "`recipe` must be a string that is not empty or a list of strings, not `[3]`",
            2,
            "for example `recipe.yaml`",
        ),
        ("unknown key `parameterss`", 3, "did you mean `parameters`?"),
        ("`adapter.rank` has no values", 5, "list them, or delete the key"),
        (
            "`adapter` must be a list of values, not a mapping",
            6,
            "write whole keys: `adapter.rank: [...]`",
        ),
        (
            "value 1 of `optimizer.lr` is a mapping",
            7,
            "one value is one word, number or list: for more, list recipe files (`recipe`)",
        ),
        (
            "`zip` must be a list of lists of strings; item 1 is `3`",
            8,
            "for example `[['adapter.rank', 'adapter.alpha']]`",
        ),
        (
            "missing key `trials` in `strategy`",
            9,
            "add `trials:` with a whole number from 1 to 10000",
        ),
        ("`goal.direction` must be `minimize`, `maximize` or `auto`, not `up`", 10, "change it"),
        (
            "`parallel` must be a whole number from 1 to 1024 or `auto`, not `0`",
            11,
            "change it",
        ),
    ]


def test_what_does_not_go_together_is_told_at_its_line(read: Read) -> None:
    text = (
        "sweep: 1\nrecipe: [nope.yaml, 'https://x/r.yaml', glob(q*)]\nparameters:\n"
        "  adapter.rank: 8,16,32\n  adapter.alpha: [8, 9]\n"
        "  optimizer.lr: interval(1e-5, 1e-3)\n  data.path: glob(*)\n  defaults: [a, b]\n"
        "  quantization: glob(x*)\n  quantization.kind: [bnb]\n  a/b: [1]\n  seed: [1\n,2]\n"
        "zip: [[adapter.rank, adapter.alpha], [optimizer.lr, adapter.rnk], [adapter.rank]]\n"
        "overrides: ['seed=3', 'x']\n"
    )
    found = [(message, line) for message, line, _ in told(problems(read, text))]
    missing = [(message.rpartition("/")[2], line) for message, line in found[:1]]
    assert missing == [("nope.yaml`", 2)]
    assert found[1:] == [
        ("`https://x/r.yaml` is not on this machine: recipes are local files", 2),
        ("`glob(q*)` finds no recipe", 2),
        ("`optimizer.lr` is an interval, and a grid needs values", 6),
        ("`glob` finds recipe files and kinds of a section, not values of `data.path`", 7),
        ("`defaults` cannot be varied", 8),
        ("no kind of `quantization` is called so", 9),
        ("`quantization.kind` is set by `quantization` too", 10),
        ("`a/b` is no key of a recipe", 11),
        ("`seed` is set by the override `seed=3` too", 12),
        (f"{UNEVEN}: `adapter.rank` has 3, `adapter.alpha` has 2", 14),
        ("`optimizer.lr` is an interval: it has no first value to put beside others", 14),
        ("`adapter.rnk` does not vary, so it cannot vary with others", 14),
        ("`adapter.rank` is in two groups", 14),
        ("`x` is no override: it has no `=`", 15),
    ]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("parameters: [1]\n", (), "`parameters` must be a mapping of keys"),
        ("parameters: {recipe: [r.yaml]}\n", (), "`recipe` stands beside `parameters`"),
        ("parameters: {adapter.rank: 'shuffle(1,2)'}\nstrategy: {kind: random, trials: 2}\n", (),
         "`shuffle` of `adapter.rank` says nothing: `random` has its own order"),
        ("parameters: {a: 'shuffle(1,2)', b: [1, 2]}\nzip: [[a, b]]\n", (),
         "`shuffle` would pair the values of `a` at random"),
        ("", ("adapter.rank=[1,,2]",), "`adapter.rank=[1,,2]` cannot be read as an override"),
        ("", ("adapter.rank=range(1,",), "`adapter.rank=range(1,` cannot be read"),
        ("", ("recipe=glob(**)",), "`glob(**)` would look through whole directories"),
        ("", ("x",), "`x` is no override: it has no `=`"),
        ("", ("seed=1,2", "~seed"), "`seed` is set by the override `~seed` too"),
        ("", ("recipe=x.yaml",), "there is no recipe `x.yaml`"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_problem(
    read: Read, text: str, words: tuple[str, ...], message: str
) -> None:
    [problem] = problems(read, SWEEP + text, *words)
    assert problem.message == message
    assert problem.hint


def test_a_secret_in_a_sweep_is_not_shown(read: Read) -> None:
    text = f"# {TOKEN}\nparameters: {{adapter.rank: [0, 1], description: [{TOKEN}, b]}}\n"
    found = problems(read, SWEEP + text)
    assert [problem.location.line for problem in found if problem.location] == [3, 4]
    assert TOKEN not in str(found)


def test_a_secret_that_is_written_in_escapes_is_not_shown(read: Read) -> None:
    escaped = "".join(f"\\x{ord(character):02x}" for character in TOKEN)
    loaded = read(SWEEP + f'parameters: {{description: ["{escaped}", b]}}\n')
    with pytest.raises(RecipeError) as caught:
        expand(loaded)
    assert TOKEN not in str(caught.value.problems)


def test_a_newer_format_wants_a_newer_program(read: Read) -> None:
    [problem] = problems(read, "sweep: 2\nanything: {}\n")
    assert problem.hint == "install a newer fsdpq"


def test_the_command_line_wins_over_the_file(read: Read) -> None:
    text = SWEEP + (
        "parameters:\n  adapter.rank: [1, 2]\n  adapter.alpha: [3, 4]\n  optimizer.lr: [1.0e-4]\n"
        "zip: [[adapter.rank, adapter.alpha]]\nstrategy: {kind: random, trials: 3, seed: 5}\n"
    )
    loaded = read(
        text, "optimizer.lr=1e-5,1e-6", "adapter.rank=7", strategy__kind="grid", parallel=2
    )
    assert settings(loaded) == [
        {"adapter.alpha": alpha, "optimizer.lr": lr} for alpha in (3, 4) for lr in (1e-5, 1e-6)
    ]
    ranks = [getattr(trial.recipe.adapter, "rank", None) for trial in expand(loaded).trials]
    assert ranks == [7] * 4
    assert (loaded.spec.parallel, loaded.spec.strategy.kind) == (2, "grid")


def test_a_wrong_option_is_told_on_the_command_line(read: Read) -> None:
    [problem] = problems(read, SWEEP, parallel=0)
    assert problem.location is not None
    assert (problem.location.source, problem.location.text) == ("command line", "--parallel 0")


def test_a_number_of_trials_needs_a_strategy(read: Read) -> None:
    [problem] = problems(read, SWEEP, strategy__trials=3)
    assert problem.message == "`--trials 3` says nothing about a grid, which tries all"
    assert "--strategy random" in problem.hint


def test_zipped_keys_vary_together(tmp_path: Path, read: Read) -> None:
    words = ["adapter.rank=1,2", "quantization=bnb,none", "adapter.alpha=3,4"]
    changes = {"zip": [["adapter.rank", "adapter.alpha"]]}
    _ = read(SWEEP)
    loaded = recipe_spec(tmp_path / "r.yaml", words, changes)
    found = [tuple(entry.values()) for entry in settings(loaded)]
    assert found == [(1, 3, "bnb"), (1, 3, "none"), (2, 4, "bnb"), (2, 4, "none")]


@pytest.mark.parametrize("named", ["[r.yaml, r2.yaml]", "glob(r*)", "glob(*)"])
def test_recipe_files_are_a_choice(read: Read, named: str) -> None:
    loaded = read(f"sweep: 1\nrecipe: {named}\n")
    found = expand(loaded).trials
    assert [trial.settings for trial in found] == [{"recipe": "r.yaml"}, {"recipe": "r2.yaml"}]
    assert [getattr(trial.recipe.adapter, "rank", None) for trial in found] == [8, 9]
    assert [trial.source.name for trial in found] == ["r.yaml", "r2.yaml"]


def test_recipe_on_the_command_line_starts_from_this_directory(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "r3.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "deep")
    assert read(SWEEP, "recipe=glob(*.yaml)").recipes == (Path("r3.yaml"),)
    assert read(SWEEP, "recipe=r3.yaml,../r.yaml").recipes == (Path("r3.yaml"), Path("../r.yaml"))


def test_kinds_are_found_by_pattern(read: Read) -> None:
    loaded = read(SWEEP, "quantization=glob(*,exclude=n*)", "adapter.rank=4")
    assert [entry["quantization"] for entry in settings(loaded)] == ["bnb", "hqq"]


def test_a_section_with_one_kind_is_an_override(read: Read) -> None:
    text = SWEEP + "parameters: {quantization: [bnb, none]}\n"
    for word in ("quantization=hqq", "quantization.kind=hqq"):
        loaded = read(text, word)
        assert [override.text for override in loaded.fixed] == ["quantization.kind=hqq"]
        assert settings(loaded) == [{}]
    assert settings(read(text, "quantization.kind=hqq,none")) == [
        {"quantization.kind": "hqq"}, {"quantization.kind": "none"},
    ]  # fmt: skip


def test_wide_intervals_that_are_drawn_evenly_are_noted(read: Read) -> None:
    strategy = {"strategy__kind": "random", "strategy__trials": 2}
    even = read(SWEEP, "optimizer.lr=interval(1e-5,1e-3)", **strategy)
    log = read(SWEEP, "optimizer.lr=tag(log,interval(1e-5,1e-3))", **strategy)
    assert "tag(log,interval(1e-05,0.001))" in even.notices[0]
    assert log.notices == ()


@pytest.mark.parametrize(
    "named", ["r.yaml", "glob(r*)", "[r2.yaml, r.yaml]", "glob([r*],exclude=r2*)"]
)
def test_a_dumped_sweep_is_the_same_sweep(read: Read, tmp_path: Path, named: str) -> None:
    text = (
        f"sweep: 1\nrecipe: {named}\nparameters:\n  adapter.rank: range(1,4)\n"
        "  adapter.target_modules: [[q_proj], ['k_proj', v_proj]]\n"
    )
    loaded = read(text, "training.seed=1,2", "optimizer.lr=1e-3")
    directory = tmp_path / "sweeps" / "one"
    directory.mkdir(parents=True)
    (directory / "sweep.yaml").write_text(dump_spec(loaded, directory), encoding="utf-8")
    again = read_spec(directory / "sweep.yaml")
    first, second = expand(loaded).trials, expand(again).trials
    assert [trial.id for trial in first] == [trial.id for trial in second]
    assert (again.name, len(first) >= 12) == (loaded.name, True)
    if named == "r.yaml":
        assert again.digest == loaded.digest


def test_the_digest_stays_when_values_are_added(read: Read) -> None:
    one = read(SWEEP, "adapter.rank=1,2")
    more = read(SWEEP, "adapter.rank=1,2,3", "training.steps=4")
    assert read(SWEEP, "adapter.rank=1,2,3").digest == one.digest != more.digest


def test_a_recipe_is_no_sweep(tmp_path: Path, read: Read) -> None:
    _ = read(SWEEP)
    assert is_sweep_file(tmp_path / "sweep.yaml")
    assert not is_sweep_file(tmp_path / "r.yaml")
    with pytest.raises(UsageError, match="there is no sweep"):
        read_spec(tmp_path / "nope.yaml")


def test_committed_schema_is_fresh() -> None:
    committed = (ROOT / "schemas" / "sweep.schema.json").read_text(encoding="utf-8")
    assert committed == sweep_schema_text(), "run `make schema`"


def test_the_schema_accepts_what_is_read_and_rejects_what_is_refused(
    read: Read, tmp_path: Path
) -> None:
    validator = jsonschema.Draft202012Validator(sweep_schema())
    good = dump_spec(
        read(SWEEP, "adapter.rank=1,2", strategy__kind="random", strategy__trials=1), tmp_path
    )
    document = yaml.safe_load(good)
    assert validator.is_valid(document)
    for key, value in {
        "strategy": {"kind": "grid", "trials": 2}, "parameters": {"a": {"b": 1}}, "zip": "a",
        "goal": {"measure": 3}, "early_stopping": {"kind": "mean"}, "sweep": 2, "nope": 1,
    }.items():  # fmt: skip
        changed = json.dumps(document | {key: value})
        assert not validator.is_valid(json.loads(changed)), key
        (tmp_path / "changed.yaml").write_text(changed, encoding="utf-8")
        with pytest.raises(RecipeError):
            read_spec(tmp_path / "changed.yaml")


def test_the_guide_s_sweep_is_valid(tmp_path: Path, read: Read) -> None:
    guide = (ROOT / "docs" / "guides" / "sweeps.md").read_text(encoding="utf-8")
    text = guide.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert len(expand(read(text)).trials) == 20
    assert read_source(tmp_path / "sweep.yaml").data["name"] == "ranks"
