"""`defaults`, overrides and references: Hydra's order, with our lines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fsdpq.errors import Problem, RecipeError
from fsdpq.importing.fsdp_qlora import DATASETS
from fsdpq.recipe.describe import list_sections
from fsdpq.recipe.load import LoadedRecipe, dump_recipe, load_recipe, load_resolved
from fsdpq.recipe.shipped import shipped_fragments, shipped_recipes

HEAD = """\
version: 1
name: tiny
model: {name_or_path: base}
data: {dataset: pypi:chatterbot-english}
"""
Load = Callable[..., LoadedRecipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str, *overrides: str, **files: str) -> LoadedRecipe:
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / "r.yaml", overrides)

    return write_and_load


def problems(load: Load, text: str, *overrides: str, **files: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, **files)
    return caught.value.problems


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


def place(loaded: LoadedRecipe, *path: str) -> tuple[str, int]:
    at = loaded.marks.values[path]
    return Path(at.source).name, at.line


def test_recipe_wins_over_fragments_and_later_fragments_over_earlier(load: Load) -> None:
    loaded = load(
        "defaults: [./a.yaml, ./b.yaml]\n" + HEAD + "adapter: {kind: lora, rank: 3}\n",
        a="adapter:\n  kind: lora\n  rank: 1\n  alpha: 1\n  dropout: 0.1\n",
        b="adapter:\n  rank: 2\n  alpha: 2\n",
    )
    adapter: Any = loaded.recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (3, 2, 0.1)
    assert place(loaded, "adapter", "rank") == ("r.yaml", 6)
    assert place(loaded, "adapter", "alpha") == ("b.yaml", 3)
    assert place(loaded, "adapter", "dropout") == ("a.yaml", 5)
    assert [path.name for path in loaded.fragments] == ["a.yaml", "b.yaml"]


def test_lists_are_replaced_with_their_marks(load: Load) -> None:
    loaded = load(
        "defaults: [./a.yaml]\n" + HEAD + "metrics: {sample_prompts: [x]}\n",
        a="metrics:\n  sample_prompts: [p, q, r]\n",
    )
    assert loaded.recipe.metrics.sample_prompts == ("x",)
    assert ("metrics", "sample_prompts", 1) not in loaded.marks.values


def test_mistake_in_a_fragment_points_into_the_fragment(load: Load) -> None:
    problem = only(
        problems(load, "defaults: [./a.yaml]\n" + HEAD, a="adapter:\n  kind: lora\n  rnak: 8\n")
    )
    assert problem.location is not None
    assert Path(problem.location.source).name == "a.yaml"
    assert problem.location.line == 3
    assert problem.hint == "did you mean `rank`?"


def test_other_kind_drops_the_fragments_fields_with_a_notice(load: Load) -> None:
    loaded = load("defaults: [qlora-nf4]\n" + HEAD + "quantization:\n  kind: none\n")
    assert loaded.recipe.quantization.kind == "none"
    (notice,) = loaded.notices
    assert notice.startswith("`quantization.kind: none` (")
    assert "drops `quant_type` (" in notice
    assert "qlora-nf4.yaml:7), `block_size` (" in notice
    assert notice.endswith("qlora-nf4.yaml:9)")


def test_override_of_kind_drops_fields_with_a_notice(load: Load, tmp_path: Path) -> None:
    text = HEAD + "quantization:\n  kind: bnb\n  quant_type: nf4\n"
    loaded = load(text, "quantization.kind=none")
    path = tmp_path / "r.yaml"
    assert loaded.notices == (f"`quantization.kind=none` drops `quant_type` ({path}:7)",)
    assert load(text, "quantization.kind=bnb").notices == ()


@pytest.mark.parametrize(
    ("entries", "message", "hint"),
    [
        ("qlora-nf4", "`defaults` is a list of fragments", "write a list of names"),
        ("[qlora-nf5]", "there is no fragment `qlora-nf5`", "did you mean `qlora-nf4`?"),
        ("[{quantization: hqq}]", "an entry of `defaults` is a name", "write a list of names"),
        ("[_self_]", "`_self_` is not needed", "delete it"),
        ("[qlora-nf4, qlora-nf4]", "`defaults` names `qlora-nf4` twice", "delete one"),
        ("[./no.yaml]", "there is no fragment `", "./name.yaml"),
        ("[../out.yaml]", "`../out.yaml` is not in the recipe's directory", "copy it"),
        ("[/etc/passwd]", "`/etc/passwd` is not in the recipe's directory", "copy it"),
        ("['~/x.yaml']", "`~/x.yaml` is not in the recipe's directory", "copy it"),
        ("['https://x/a.yaml']", "is not on this machine", "write a list of names"),
        ("[./a.yaml]", "a fragment has no `defaults` of its own", "in the recipe"),
        ("[./bad.yaml]", "this is not YAML", "quotes"),
        ("[./r.yaml]", "a fragment has no `defaults` of its own", "in the recipe"),
        ("[./]", "there is no fragment `", "./name.yaml"),
    ],
)
def test_what_is_no_fragment_is_a_problem(
    load: Load, tmp_path: Path, entries: str, message: str, hint: str
) -> None:
    (tmp_path.parent / "out.yaml").write_text("adapter: {kind: lora}\n")
    text = f"defaults: {entries}\n{HEAD}"
    files = {"a": "defaults: [short-run]\n", "bad": "a: b: c\n"}
    problem = only(problems(load, text, **files))
    assert message in problem.message
    assert hint in problem.hint
    assert problem.location is not None
    assert problem.location.line == 1


def test_fragment_behind_a_symlink_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path.parent / "out.yaml").write_text("adapter: {kind: lora}\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path.parent / "out.yaml")
    problem = only(problems(load, "defaults: [./link.yaml]\n" + HEAD))
    assert "is not in the recipe's directory" in problem.message


@pytest.mark.parametrize("name", sorted(shipped_fragments()))
def test_shipped_fragment_says_how_to_use_it_and_composes(load: Load, name: str) -> None:
    text = shipped_fragments()[name].read_text(encoding="utf-8")
    assert text.startswith(f"# Fragment `{name}`: ")
    assert f"{name}]` " in text.replace("`;", "` ").replace("`,", "` ").replace("`.", "` ")
    head = HEAD[: HEAD.index("data:")] if name.startswith("data-") else HEAD
    load(f"defaults: [{name}]\n{head}")


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_dataset_of_the_first_script_is_a_fragment(load: Load, name: str) -> None:
    fragment = f"data-{name.replace('_', '-')}"
    data = load(f"defaults: [{fragment}]\n{HEAD[: HEAD.index('data:')]}").recipe.data
    repository, split, format_name, _ = DATASETS[name]
    assert (data.dataset or "", data.split, data.format) == (repository, split, format_name)
    assert (data.max_rows == 512) == (name in ("alpaca_sample", "dummy"))


def test_shipped_recipes_are_found_in_checkout_and_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsdpq.recipe import shipped

    assert (shipped_recipes() / "quickstart.yaml").is_file()
    inside = tmp_path / "fsdpq" / "_shipped" / "recipes" / "base"
    inside.mkdir(parents=True)
    (inside / "x.yaml").touch()
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "fsdpq" / "recipe" / "shipped.py"))
    assert shipped.shipped_fragments() == {"x": inside / "x.yaml"}


def test_plus_adds_an_optional_key_that_is_not_set(load: Load) -> None:
    loaded = load(
        HEAD, "+training.steps=7", "+metrics.wandb.group=g",
        "metrics.wandb.project=p", "metrics.sinks=[wandb]",
    )  # fmt: skip
    assert loaded.recipe.training.steps == 7
    assert loaded.recipe.metrics.wandb.group == "g"


def test_plus_on_a_required_key_says_to_leave_it_out(load: Load) -> None:
    text = HEAD.replace("model: {name_or_path: base}\n", "")
    problem = only(problems(load, text, "+model.name_or_path=base"))
    assert problem.message == "`model.name_or_path` is required, not optional"
    assert problem.hint == "leave the `+` out: `model.name_or_path=base`"


def test_tilde_goes_back_to_the_default(load: Load) -> None:
    text = HEAD + "adapter: {kind: lora, rank: 3, alpha: 1}\ntraining: {steps: 3}\n"
    loaded = load(text, "~adapter.rank", "~training")
    adapter: Any = loaded.recipe.adapter
    assert (adapter.rank, adapter.alpha) == (16, 1)
    assert loaded.recipe.training.steps is None
    assert ("adapter", "rank") not in loaded.marks.keys
    assert not any(path[0] == "training" for path in loaded.marks.keys)


def test_override_in_a_section_that_is_left_out_means_its_default_kind(load: Load) -> None:
    loaded = load(HEAD, "adapter.rank=4", "optimizer.kind=adamw")
    adapter: Any = loaded.recipe.adapter
    assert (adapter.kind, adapter.rank) == ("lora", 4)
    assert place(loaded, "adapter", "rank") == ("command line", 0)


def test_reference_keeps_the_type_or_becomes_text(load: Load) -> None:
    text = (
        HEAD
        + """\
adapter:
  kind: lora
  rank: 8
  alpha: ${adapter.rank}
  target_modules: ${quantization.modules_to_not_convert}
quantization: {kind: bnb, modules_to_not_convert: [q_proj]}
training: {steps: 5, epochs: null, max_grad_norm: "${training.epochs}"}
description: r${adapter.rank} x ${ optimizer.lr } ${name} \\${adapter.rank} ${fsdp.strategy} $5 {a}
"""
    )
    recipe: Any = load(text, "adapter.rank=9").recipe
    assert recipe.adapter.alpha == 9
    assert recipe.adapter.target_modules == ("q_proj",)
    assert recipe.training.max_grad_norm is None
    assert recipe.description == "r9 x 0.0002 tiny ${adapter.rank} full_shard $5 {a}"


def test_override_may_be_a_reference(load: Load) -> None:
    recipe: Any = load(HEAD, "adapter.rank=8", "adapter.alpha=${adapter.rank}").recipe
    assert recipe.adapter.alpha == 8


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        ("${oc.env:HOME}", "asks for the resolver `oc.env`", "write the value"),
        ("${env:X}", "asks for the resolver `env`", "write the value"),
        ("a ${now:%Y} b", "asks for the resolver `now`", "write the value"),
        ("${oc.decode:${name}}", "asks for the resolver `oc.decode`", "write the value"),
        ("${adapter.rnak}", "there is no key `adapter.rnak`", "did you mean `${adapter.rank}`?"),
        ("${rank}", "there is no key `rank`", "did you mean `${adapter.rank}`?"),
        ("${adaptor.rank}", "there is no key `adaptor.rank`", "did you mean `${adapter.rank}`?"),
        ("${adapter}", "`${adapter}` is a section", "`${adapter.field}`"),
        ("${fsdp}", "there is no key `fsdp`", ""),
        ("${.rank}", "is relative", "the whole key"),
        ("${adapter.${name}}", "is no reference", "`\\${`"),
        ("${}", "is no reference", "`\\${`"),
        ("${a b}", "is no reference", "`\\${`"),
        ("${adapter.rank", "without its `}`", "`\\${`"),
        ("${description}", "description -> description", "write a value"),
        ("x ${metrics.sample_prompts}", "is a list, and stands inside of a text", "whole value"),
    ],
)
def test_what_cannot_be_referred_to_is_a_located_problem(
    load: Load, value: str, message: str, hint: str
) -> None:
    text = HEAD + f"adapter: {{kind: lora, rank: 8}}\ndescription: '{value}'\n"
    problem = only(problems(load, text + "metrics: {sample_prompts: [a]}\n"))
    assert message in problem.message
    assert hint in problem.hint
    assert problem.location is not None
    assert (problem.location.line, problem.location.column) == (6, 14)


def test_cycle_is_one_problem(load: Load) -> None:
    text = HEAD + "adapter: {kind: lora, rank: '${adapter.alpha}', alpha: '${adapter.rank}'}\n"
    problem = only(problems(load, text))
    assert "adapter.rank -> adapter.alpha -> adapter.rank" in problem.message


@pytest.mark.parametrize(
    "text", ["${a}", "\\${a}", "\\\\${a}", "a\\b ${x} \\", "$${", "${", "\\\\\\${q}", "}${"]
)
def test_literal_text_survives_the_resolved_recipe(load: Load, tmp_path: Path, text: str) -> None:
    recipe = load(HEAD).recipe.model_copy(update={"description": text})
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_resolved(path) == recipe
    assert load_recipe(path).recipe == recipe


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("adapter: {rank: 3}\n", []),
        ("adapter: {rank: 3}\ntraining: {steps: 9}\n", ["adapter.rank=5", "training.steps=null"]),
        ("metrics: {sample_prompts: [x]}\n", ["metrics.sample_prompts=[a,'b c',\"d\"]"]),
        ("fsdp: {offload: none}\n", ["~fsdp.offload", "+fsdp.strategy=ddp"]),
        ("training: {steps: 4}\n", ["~training", '+data.split="1e-4"', "data.seq_len=1e3"]),
        ("optimizer: {lr: 1e-3, eps: '${optimizer.lr}'}\n", ["optimizer.lr=2e-3"]),
        ("description: 'r ${adapter.rank} \\${x} ${name}'\n", ["name=true1"]),
        ("adapter: &a {rank: 3}\noptimizer: {<<: *a}\n", []),
    ],
)
def test_composition_equals_hydras(tmp_path: Path, recipe: str, overrides: list[str]) -> None:
    """The reference is ``hydra.compose`` on the same files; it wants ``_self_`` spelled out."""
    import hydra
    from omegaconf import OmegaConf

    from fsdpq.recipe.compose import apply_overrides, parse_overrides
    from fsdpq.recipe.interpolate import interpolate
    from fsdpq.recipe.layers import compose_layers
    from fsdpq.recipe.source import read_source

    (tmp_path / "a.yaml").write_text("adapter: {rank: 1, alpha: 7, names: [p, q]}\nname: n\n")
    (tmp_path / "b.yaml").write_text(
        "adapter: {alpha: 2}\nmetrics: {sample_prompts: [u, v]}\ndata: {seq_len: 5}\n"
    )
    (tmp_path / "ours.yaml").write_text("defaults: [./a.yaml, ./b.yaml]\n" + recipe)
    (tmp_path / "hydras.yaml").write_text("defaults: [a, b, _self_]\n" + recipe)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        config = hydra.compose("hydras", overrides)
    expected = OmegaConf.to_container(config, resolve=True)
    sections = list_sections()
    composed = compose_layers(read_source(tmp_path / "ours.yaml"), sections)
    parsed, mistakes = parse_overrides(overrides)
    apply_overrides(composed, parsed, sections)
    interpolate(composed, sections)
    assert composed.problems + mistakes == []
    assert composed.data == expected
