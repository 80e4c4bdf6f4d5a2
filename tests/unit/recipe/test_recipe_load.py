"""Loading: overrides, strictness, did-you-mean, cross-section checks, and the round trip."""

import re
from pathlib import Path

import pytest

from fsdpq.errors import Problem, RecipeError
from fsdpq.recipe.load import LoadedRecipe, dump_recipe, load_recipe, load_resolved
from fsdpq.recipe.root import recipe_schema_text
from fsdpq.recipe.sections.quantization import BnbOptions, NoQuantOptions

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
NAME_TYPE = "a string that matches `^[A-Za-z0-9][A-Za-z0-9._-]*$` of at most 100 characters"
EMPTY_HINT = "write the keys of `model` on indented lines below it"
RECIPE = """\
version: 1
name: tiny
model:
  name_or_path: base
quantization:
  kind: bnb
  quant_type: nf4
adapter:
  kind: lora
  rank: 16
data:
  dataset: pypi:chatterbot-english
optimizer:
  kind: adamw
lr_scheduler:
  kind: cosine
  warmup_steps: 2
training:
  steps: 10
"""


def load(tmp_path: Path, *overrides: str, edit: tuple[str, str] = ("", "")) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    assert edit[0] in RECIPE
    path.write_text(RECIPE.replace(*edit, 1) if edit[0] else RECIPE)
    return load_recipe(path, overrides)


def problems(tmp_path: Path, *overrides: str, edit: tuple[str, str] = ("", "")) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, *overrides, edit=edit)
    return caught.value.problems


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


def test_quickstart_is_valid() -> None:
    assert load_recipe(QUICKSTART).recipe.name == "quickstart"


def test_committed_schema_is_fresh() -> None:
    committed = (ROOT / "schemas" / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == recipe_schema_text(), "run `make schema`"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer.lr=1e-5", "optimizer.eps=1e-17"),
        ("quantization.kind=none",),
        ("name=1e-4x", 'description="1e-4"', "training.max_grad_norm=null"),
        ('metrics.sample_prompts=["on", "12:30", "a: b # c", "0o7", "ü \'x\'"]',),
        ("adapter.target_modules=[q_proj,v_proj]", "launch.nproc_per_node=3"),
    ],
)
def test_resolved_recipe_round_trips(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = load(tmp_path, *overrides).recipe
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_resolved(path) == recipe
    assert dump_recipe(load_resolved(path)) == dump_recipe(recipe)
    assert load_recipe(path).recipe == recipe, "what `show` prints is a recipe too"


def test_resolved_recipe_spells_out_every_default(tmp_path: Path) -> None:
    text = dump_recipe(load(tmp_path).recipe)
    assert "  use_rslora: false\n" in text
    assert re.findall(r"^\w+", text, re.MULTILINE)[:4] == [
        "version", "name", "description", "model",
    ]  # fmt: skip


def test_unknown_key_points_at_its_line(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, edit=("rank: 16", "lora_rnak: 16")))
    assert problem.message == "unknown key `lora_rnak` in `adapter` (kind `lora`)"
    assert problem.hint == "did you mean `rank`?"
    assert problem.location is not None
    assert (problem.location.line, problem.location.column) == (10, 3)


@pytest.mark.parametrize(
    ("edit", "message", "hint", "line"),
    [
        (("adapter:", "adaptor:"), "unknown section `adaptor`", "did you mean `adapter`?", 8),
        (
            ("kind: bnb", "kind: bbn"),
            "unknown kind `bbn` in `quantization`",
            "did you mean `bnb`?",
            6,
        ),
        (
            ("kind: lora", "kind: zzz"),
            "unknown kind `zzz` in `adapter`",
            "`adapter` knows `lora`, `dora`, `llama_pro` or `none`",
            9,
        ),
        (
            ("  kind: bnb\n", ""),
            "`quantization` needs a `kind`",
            "add `kind:` with `bnb`, `hqq` or `none`",
            5,
        ),
        (
            ("rank: 16", "rank: '16'"),
            '`adapter.rank` must be a whole number from 1 to 4096, not `"16"`',
            "write it without quotes",
            10,
        ),
        (
            ("rank: 16", "rank: 16.0"),
            "`adapter.rank` must be a whole number from 1 to 4096, not `16.0`",
            "write `16`",
            10,
        ),
        (
            ("rank: 16", "rank: true"),
            "`adapter.rank` must be a whole number from 1 to 4096, not `true`",
            "change it",
            10,
        ),
        (
            ("rank: 16", "rank: 0"),
            "`adapter.rank` must be a whole number from 1 to 4096, not `0`",
            "change it",
            10,
        ),
        (
            ("quant_type: nf4", "quant_type: nf5"),
            "`quantization.quant_type` must be `nf4` or `fp4`, not `nf5`",
            "did you mean `nf4`?",
            7,
        ),
        (
            ("rank: 16", "target_modules: all_linear"),
            (
                "`adapter.target_modules: all_linear` is a regular expression that the whole name "
                "of a layer must match, and names have dots"
            ),
            "did you mean `all-linear`?",
            10,
        ),
        (
            ("rank: 16", "quant_type: nf4"),
            "unknown key `quant_type` in `adapter` (kind `lora`)",
            "`quant_type` belongs in `quantization`",
            10,
        ),
        (
            ("  name_or_path: base", "  dtype: fp32"),
            "missing key `name_or_path` in `model`",
            "add `name_or_path:` with a string that is not empty",
            3,
        ),
        (
            ("  name_or_path: base\n", ""),
            "`model` is empty",
            EMPTY_HINT,
            3,
        ),
        (
            ("name: tiny", "name: a/b"),
            f"`name` must be {NAME_TYPE}, not `a/b`",
            "for example `my-run`",
            2,
        ),
    ],
)
def test_mistakes_are_explained_where_they_are(
    tmp_path: Path, edit: tuple[str, str], message: str, hint: str, line: int
) -> None:
    problem = only(problems(tmp_path, edit=edit))
    assert (problem.message, problem.hint) == (message, hint)
    assert problem.location is not None
    assert problem.location.line == line


def test_all_problems_come_at_once_in_order(tmp_path: Path) -> None:
    text = RECIPE.replace("rank: 16", "rank: x\n  rank: 3").replace("steps: 10", "stebs: 10")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml", ["adapter.foo=1", "x=1"])
    found = [problem.location for problem in caught.value.problems if problem.location]
    assert [place.line for place in found if place.source != "command line"] == [11, 20]
    assert [place.text for place in found if place.line == 0] == ["adapter.foo=1", "x=1"]


def test_override_wins_and_is_located(tmp_path: Path) -> None:
    assert load(tmp_path, "adapter.rank=8").recipe.adapter.rank == 8
    problem = only(problems(tmp_path, "adapter.rank=eight"))
    assert problem.location is not None
    assert (problem.location.source, problem.location.text) == (
        "command line", "adapter.rank=eight",
    )  # fmt: skip


def test_override_of_kind_drops_the_keys_of_the_old_kind(tmp_path: Path) -> None:
    assert load(tmp_path, "quantization.kind=none").recipe.quantization == NoQuantOptions(
        kind="none"
    )
    assert isinstance(load(tmp_path).recipe.quantization, BnbOptions)


def test_override_of_kind_keeps_typos_visible(tmp_path: Path) -> None:
    found = problems(tmp_path, "quantization.kind=none", edit=("quant_type", "quant_tipe"))
    assert only(found).key == "quantization.quant_tipe"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=8,16", "`adapter.rank=8,16` is a sweep, and one run needs one value"),
        (
            "++adapter.rank=8",
            "`++adapter.rank=8`: only `section.field=value`, `+` and `~` are accepted here",
        ),
        ("+adapter.rank=8", "`adapter.rank` is set already (PATH:10)"),
        ("+model.name_or_path=x", "`model.name_or_path` is set already (PATH:4)"),
        ("~adapter.dropout", "`adapter.dropout` is not set, so it cannot be deleted"),
        ("~adapter.rnk", "`adapter.rnk` is not set, so it cannot be deleted"),
        ("~adapter.rank=16", "`~adapter.rank=16` deletes a key, so it has no value"),
        ("~model.name_or_path", "missing key `name_or_path` in `model`"),
        (
            "adapter.kind@x=lora",
            "`adapter.kind@x=lora`: only `section.field=value`, `+` and `~` are accepted here",
        ),
        ("defaults=[qlora-nf4]", "`defaults` stands in the recipe, not on the command line"),
        ("adapter.rank", "`adapter.rank` is no override: it has no `=`"),
        ("adapter/lora=1", "`adapter/lora` is no key of a recipe"),
        ("adapter.rank.x=1", "`adapter.rank` holds a value, not keys"),
        ("data.path=a (1)", "`data.path=a (1)` cannot be read as an override"),
        ("data={path: x}", "`data={path: x}` is a mapping, and one run needs one value"),
        ("name=a\x1b[0m", "`name=a\\x1b[0m` holds characters that cannot be printed"),
        ("foo=1", "unknown section `foo`"),
    ],
)
def test_what_is_no_override_is_a_problem(tmp_path: Path, override: str, message: str) -> None:
    problem = only(problems(tmp_path, override))
    assert problem.message.replace(str(tmp_path / "r.yaml"), "PATH") == message
    assert problem.hint


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.dataset=null",), "`data` needs `path` or `dataset`"),
        (("data.path=r.yaml",), "`data` has both `path` and `dataset`"),
        (("data.dataset=name",), "`name` is no name of a dataset"),
        (("data.dataset=https://x.org/y",), "names something on the network"),
        (("data.format=dummy",), "has no effect with `data.format: dummy`"),
        (("data.dataset=null", "data.path=no.jsonl"), "there is no file"),
        (("training.epochs=1",), "`training` has both `steps` and `epochs`"),
        (("training.eval_interval=5",), "`data.eval_fraction` is 0"),
        (("lr_scheduler.warmup_steps=10",), "`lr_scheduler.warmup_steps` is 10"),
        (
            ("fsdp.strategy=shard_grad_op", "launch.nproc_per_node=1"),
            "`fsdp.strategy: shard_grad_op` has no effect with one rank",
        ),
        (("adapter.target_modules=[q,v,q]",), "`adapter.target_modules` names `q` twice"),
        (("quantization.modules_to_not_convert=[q,q]",), "names `q` twice"),
        (("adapter.target_modules=[]",), "nothing would be trained"),
        (("metrics.sample_max_new_tokens=9",), "has no effect without `sample_prompts`"),
        (("launch.rdzv_endpoint=localhost:70000",), "has no port from 1 to 65535"),
        (("launch.scheduler=slurm",), "nothing says how many GPUs the Slurm job needs"),
    ],
)
def test_sections_are_checked_against_each_other(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    problem = only(problems(tmp_path, *overrides))
    assert message in problem.message
    assert problem.hint
    assert problem.location is not None


def test_paths_start_from_another_directory_where_one_is_named(tmp_path: Path) -> None:
    edit = ("dataset: pypi:chatterbot-english", "path: rows.jsonl")
    assert "rows.jsonl" in only(problems(tmp_path, edit=edit)).message
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl").write_text("{}\n")
    loaded = load_recipe(tmp_path / "r.yaml", base_dir=tmp_path / "there")
    assert loaded.base_dir == tmp_path / "there"
    assert loaded.notices == ()
