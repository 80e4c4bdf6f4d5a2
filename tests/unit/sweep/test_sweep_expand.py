"""Trials are what `load_recipe` makes of their overrides, each once, quickly, with stable ids."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import Recipe
from fsdpq.sweep.choosing.expand import expand, make_space, make_trial
from fsdpq.sweep.choosing.grammar import write_override
from fsdpq.sweep.choosing.options import MAX_TRIALS
from fsdpq.sweep.choosing.spec import LoadedSpec, recipe_spec
from fsdpq.sweep.trial import trial_id

HEAD = """\
version: 1
name: tiny
model: {name_or_path: meta-llama/Llama-2-7b-hf}
data: {dataset: pypi:chatterbot-english, format: text}
"""
FRAGMENT = """\
quantization: {kind: bnb, block_size: 128}
adapter: {kind: lora, rank: 8, alpha: 8, target_modules: [q_proj]}
training: {steps: 10}
"""
RECIPE = "defaults: [./part.yaml]\n" + HEAD + "optimizer: {kind: adamw, lr: 1e-4}\n"
OTHER = HEAD + "description: seed ${training.seed}\nquantization: {kind: none}\nnonsense: 1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes")
    for name, text in (("r", RECIPE), ("part", FRAGMENT), ("other", OTHER)):
        (path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return path


def spec(folder: Path, *words: str, **changes: Any) -> LoadedSpec:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return recipe_spec(folder / "r.yaml", words, dotted)


def mistakes(folder: Path, *words: str, **changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        expand(spec(folder, *words, **changes))
    return [problem.message for problem in caught.value.problems]


def random(trials: int, seed: int = 0) -> dict[str, Any]:
    return {"strategy__kind": "random", "strategy__trials": trials, "strategy__seed": seed}


VALUES: dict[str, list[Any]] = {
    "adapter": ["lora", "dora", "none", "lroa"],
    "adapter.rank": [4, 8, 0, "4", 16.0, None],
    "adapter.target_modules": [["q_proj"], [], "all", ["x", 1]],
    "quantization": ["bnb", "hqq", "none"],
    "quantization.block_size": [64, 65],
    "quantization.nbits": [4, 5],
    "optimizer.lr": [1e-4, 1, -1.0, "${training.seed}", "${nope}"],
    "training.seed": [1, 2],
    "training.steps": [10, 0],
    "data.path": ["https://x/y.jsonl", "rows.jsonl"],
    "data.seq_len": [64, 1_000_000],
    "evaluation.nope": [1],
    "metrics.wandb.project": ["p q"],
    "metrics.nope.project": [True],
    "description": ["true", "it's, $5", "1e-4"],
}
"""Good and bad ones: alone or together they are refused by every stage of loading."""


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_trial_is_what_load_recipe_makes_of_its_overrides(folder: Path, data: Any) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True))
    picked = {key: data.draw(st.sampled_from(VALUES[key])) for key in keys}
    fixed = data.draw(st.sampled_from([(), ("training.steps=3",), ("~training.steps", "x=1")]))
    name = data.draw(st.sampled_from(["r", "r", "r", "other"]))
    if {key.partition("=")[0].lstrip("~") for key in fixed} & set(keys):
        return
    paths = {key: f"{key}.kind" if "." not in key and key != "description" else key for key in keys}
    texts = [*fixed, *(write_override(paths[key], picked[key]) for key in keys)]
    words = [f"{key}={','.join([write_override('', picked[key])[1:]] * 2)}" for key in keys]
    space = make_space(recipe_spec(folder / f"{name}.yaml", [*fixed, *words]))
    theirs = _outcome(lambda: load_recipe(folder / f"{name}.yaml", texts).recipe)
    assert _outcome(lambda: make_trial(space, picked).recipe) == theirs
    if isinstance(theirs, Recipe):
        assert (
            load_recipe(folder / f"{name}.yaml", make_trial(space, picked).overrides).recipe
            == theirs
        )


def _outcome(load: Any) -> Recipe | list[tuple[str, str, str]]:
    try:
        return load()
    except RecipeError as error:
        return sorted(map(_plain, error.problems))


def _plain(problem: Problem) -> tuple[str, str, str]:
    return problem.key, problem.message, problem.hint


def test_a_grid_has_every_combination_the_last_key_fastest(folder: Path) -> None:
    trials = expand(spec(folder, "adapter.rank=8,16", "quantization=bnb,hqq", "training.steps=3"))
    assert [(dict(trial.settings), trial.overrides) for trial in trials.trials] == [
        (
            {"adapter.rank": rank, "quantization": kind},
            ("training.steps=3", f"adapter.rank={rank}", f"quantization.kind={kind}"),
        )
        for rank in (8, 16)
        for kind in ("bnb", "hqq")
    ]
    assert trials.trials[0].label == "adapter.rank=8, quantization=bnb"
    [notice] = [notice for notice in trials.notices if "drops" in notice]
    assert notice.startswith("`quantization.kind=hqq` drops `block_size`")
    assert notice.endswith("(in 2 of 4)")


def test_a_thousand_trials_are_expanded_in_five_seconds(folder: Path) -> None:
    """Seconds of the CPU; half a second on two shared cores of an EPYC."""
    loaded = spec(folder, "adapter.rank=range(1,101)", "optimizer.lr=range(1e-4,11e-4,step=1e-4)")
    start = time.process_time()
    trials = expand(loaded).trials
    assert time.process_time() - start < 5
    assert len({trial.id for trial in trials}) == 1000


def test_a_trial_is_there_once(folder: Path) -> None:
    found = expand(spec(folder, "adapter.rank=8,16,8", "training.micro_batch_size=1,2"))
    assert (len(found.trials), found.duplicates) == (4, 2)
    default = expand(spec(folder, "description=a,b"))  # says nothing about what is trained
    assert (len(default.trials), default.duplicates) == (1, 1)


def test_ids_do_not_depend_on_how_a_recipe_is_written(folder: Path, tmp_path: Path) -> None:
    plain = expand(spec(folder, "adapter.rank=16")).trials[0]
    swept = expand(spec(folder, "optimizer.lr=1e-4,1e-5", "adapter.rank=16,32")).trials[0]
    assert plain.id == swept.id
    (tmp_path / "r.yaml").write_text(RECIPE.replace("1e-4", "0.0001"), encoding="utf-8")
    (tmp_path / "part.yaml").write_text(FRAGMENT + "launch: {nnodes: 1}\n", encoding="utf-8")
    moved = expand(spec(tmp_path, "adapter.rank=16")).trials[0]
    assert (moved.id, moved.base_dir == plain.base_dir) == (plain.id, False)


def test_an_id_stays_what_it_was_when_fsdpq_gets_new_keys(folder: Path) -> None:
    """Sweeps that exist lie under these ids: a default that changes may change them, no new key."""
    [trial] = expand(spec(folder, "adapter.rank=16")).trials
    assert trial.id == "5ac06c36d4"


def test_ids_depend_on_the_directory_where_paths_start_from_it(folder: Path) -> None:
    recipe = load_recipe(folder / "r.yaml").recipe
    local = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"path": "rows.jsonl", "dataset": None})}
    )
    places = [folder, folder / "elsewhere"]
    assert len({trial_id(recipe, base_dir=place) for place in places}) == 1
    assert len({trial_id(local, base_dir=place) for place in places}) == 2
    assert trial_id(recipe, base_dir=folder) != trial_id(recipe, base_dir=folder, smoke=True)


@pytest.mark.parametrize("number", [1, 5, 20])
def test_more_random_trials_begin_with_the_fewer(folder: Path, number: int) -> None:
    words = ["adapter.rank=range(1,60)", "optimizer.lr=tag(log,interval(1e-5,1e-3))"]
    few = expand(spec(folder, *words, **random(number))).trials
    many = expand(spec(folder, *reversed(words), **random(30))).trials
    assert [trial.id for trial in few] == [trial.id for trial in many[:number]]
    assert len({trial.id for trial in many}) == 30


def test_another_seed_draws_other_trials(folder: Path) -> None:
    words = ["adapter.rank=range(1,60)", "training.seed=range(1,60)"]
    drawn = [
        {trial.id for trial in expand(spec(folder, *words, **random(20, seed))).trials}
        for seed in (0, 1)
    ]
    assert len(drawn[0] & drawn[1]) < 5


def test_random_ends_where_everything_was_drawn(folder: Path) -> None:
    found = expand(spec(folder, "adapter.rank=1,2,3", "training.seed=1,1", **random(50)))
    assert sorted(trial.settings["adapter.rank"] for trial in found.trials) == [1, 2, 3]
    assert "there are 3 different trials, not 50" in found.notices


def test_shuffle_follows_the_seed_and_keeps_the_values(folder: Path) -> None:
    ranks = list(range(1, 21))
    orders = [
        [
            t.settings["adapter.rank"]
            for t in expand(spec(folder, "adapter.rank=shuffle(range(1,21))")).trials
        ]
        for _ in range(2)
    ]
    assert orders[0] == orders[1] != ranks
    assert sorted(orders[0]) == ranks


def test_a_mistake_of_one_value_is_told_once(folder: Path) -> None:
    assert mistakes(folder, "adapter.rank=8,0,x", "training.seed=1,2,3") == [
        "`adapter.rank` must be a whole number from 1 to 4096, not `0`",
        "`adapter.rank` must be a whole number from 1 to 4096, not `x`",
    ]


def test_a_mistake_of_some_combinations_says_which(folder: Path) -> None:
    [message] = mistakes(folder, "quantization=bnb,none", "quantization.block_size=64,128")
    assert message == (
        "unknown key `block_size` in `quantization` (kind `none`) (with `quantization=none`)"
    )


def test_a_mistake_of_all_combinations_is_told_as_the_recipe_s(folder: Path) -> None:
    [message] = mistakes(folder, "training.seed=1,2", "training.stepz=3")
    assert message == "unknown key `stepz` in `training`"


def test_many_mistakes_of_one_key_are_counted(folder: Path) -> None:
    found = mistakes(folder, "adapter.rank=range(-20,1)")
    assert len(found) == 4
    assert found[-1] == "18 other values of `adapter.rank` have mistakes too"


def test_a_mistake_is_located_in_the_sweep_or_in_the_recipe(folder: Path, tmp_path: Path) -> None:
    from fsdpq.sweep.choosing.spec import read_spec

    text = f"sweep: 1\nrecipe: {folder / 'r.yaml'}\nparameters:\n  adapter.rank:\n  - 8\n  - 0\n"
    (tmp_path / "sweep.yaml").write_text(text + "  quantization: bnb,hqq\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        expand(read_spec(tmp_path / "sweep.yaml", ["quantization.block_size=3,4"]))
    places = {(p.key, Path(p.location.source).name, p.location.line)
              for p in caught.value.problems if p.location}  # fmt: skip
    assert places == {
        ("adapter.rank", "sweep.yaml", 6), ("quantization.block_size", "command line", 0),
    }  # fmt: skip


def test_invalid_combinations_can_be_left_out(folder: Path) -> None:
    words = ["quantization=bnb,none", "quantization.block_size=64,128"]
    found = expand(spec(folder, *words, skip_invalid=True))
    assert [trial.settings["quantization"] for trial in found.trials] == ["bnb", "bnb"]
    assert [(dict(left.settings), left.reason) for left in found.left_out] == [
        (
            {"quantization": "none", "quantization.block_size": size},
            "unknown key `block_size` in `quantization` (kind `none`)",
        )
        for size in (64, 128)
    ]
    assert mistakes(folder, "adapter.rank=0,-1", skip_invalid=True)  # nothing is left


def test_random_draws_others_for_combinations_that_are_left_out(folder: Path) -> None:
    words = ["quantization=bnb,none", "quantization.block_size=64,128,256"]
    found = expand(spec(folder, *words, skip_invalid=True, **random(3)))
    assert len(found.trials) == 3
    assert {trial.settings["quantization"] for trial in found.trials} == {"bnb"}


def test_a_grid_that_is_too_large_is_refused_before_it_is_made(folder: Path) -> None:
    start = time.process_time()
    [message] = mistakes(folder, *(f"{key}=range(1,5000)" for key in ("adapter.rank", "data.seed")))
    assert message == f"the grid has {4999**2} combinations, more than {MAX_TRIALS}"
    assert time.process_time() - start < 5


def test_a_broken_recipe_file_is_told_before_combinations(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [\n", encoding="utf-8")
    assert mistakes(tmp_path, "adapter.rank=1,2")[0].startswith("this is not YAML")
    with pytest.raises(RecipeError) as caught:
        recipe_spec(folder)
    assert caught.value.problems[0].message == f"there is no recipe `{folder}`"


def test_a_secret_on_the_command_line_is_not_shown(folder: Path) -> None:
    [message] = mistakes(folder, "description=hf_" + "a1" * 12 + ",b", "adapter.rank=0,1")
    assert "looks like a secret" in message


def test_settings_differ_between_neighbours(folder: Path) -> None:
    trials = expand(spec(folder, "adapter.rank=1,2,3")).trials
    assert all(a.label != b.label for a, b in pairwise(trials))
