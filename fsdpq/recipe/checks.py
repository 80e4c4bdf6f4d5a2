"""Rules that no single field can check, one ``check_*`` function each.

A check yields Problems that name a key; `fsdpq.recipe.load` adds where it was written. A setting
that would be ignored is a Problem, not a warning. `CHECKS` at the end lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fsdpq.errors import Problem
from fsdpq.recipe.not_yet import check_implemented
from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import LoraOptions
from fsdpq.recipe.sections.output import MetricsOptions
from fsdpq.recipe.sections.quantization import BnbOptions

Check = Callable[[Recipe, Path], Iterator[Problem]]
"""Takes the recipe and the directory that its relative paths start from."""


def check_supported(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem for every setting that this version does not do yet."""
    yield from check_implemented(recipe)


def check_one_data_source(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem unless exactly one of ``data.path`` and ``data.dataset`` is set."""
    hint = "add `path: rows.jsonl` or `dataset: pypi:chatterbot-english`"
    yield from _exactly_one(recipe.data, "data", ("path", "dataset"), hint)


def check_data_path_exists(recipe: Recipe, base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where ``data.path`` is no file."""
    if recipe.data.path is None:
        return
    path = base_dir / Path(recipe.data.path).expanduser()
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        message = f"`data.path`: there is no file `{path}`"
        hint = "a relative path starts from the recipe's directory"
        yield Problem(message, "data.path", hint=hint)


def check_dataset_is_packaged(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where ``data.dataset`` would have to come from a hub."""
    dataset = recipe.data.dataset
    if dataset is not None and not dataset.startswith("pypi:"):
        message = f"`data.dataset`: `{dataset}` is not a `pypi:` dataset, the only sort so far"
        hint = "`fsdpq kinds data` lists them; for other rows write a JSON-lines file: `data.path`"
        yield Problem(message, "data.dataset", hint=hint)


def check_one_duration(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where both ``training.steps`` and ``training.epochs`` are set."""
    if recipe.training.steps is not None and recipe.training.epochs is not None:
        hint = "delete one of them (on the command line: `training.epochs=null`)"
        yield Problem("`training` has both `steps` and `epochs`", "training.epochs", hint=hint)


def _exactly_one(
    options: Options, section: str, fields: tuple[str, str], hint: str
) -> Iterator[Problem]:
    """Yields a Problem unless exactly one of two fields is set."""
    first, second = fields
    num_set = sum(getattr(options, field) is not None for field in fields)
    if num_set == 0:
        yield Problem(f"`{section}` needs `{first}` or `{second}`", section, hint=hint)
    if num_set == 2:
        key = f"{section}.{second}"
        hint = f"delete one of them (on the command line: `{key}=null`)"
        yield Problem(f"`{section}` has both `{first}` and `{second}`", key, hint=hint)


def check_eval_has_rows(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where evaluations are asked for and no rows are held out."""
    if recipe.training.eval_interval is not None and recipe.data.eval_fraction == 0:
        message = "`training.eval_interval` has no effect: `data.eval_fraction` is 0"
        yield Problem(message, "training.eval_interval", hint="add `eval_fraction: 0.1` to `data`")


def check_warmup_fits(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where the warmup does not end before the training does."""
    steps = recipe.training.steps
    warmup = recipe.lr_scheduler.num_warmup_steps(steps or 1)
    if steps is not None and warmup >= steps:
        message = f"`lr_scheduler.warmup_steps` is {warmup} and `training.steps` is {steps}"
        hint = f"the warmup must end earlier: about {max(0, steps // 10)} steps"
        yield Problem(message, "lr_scheduler.warmup_steps", hint=hint)


def check_strategy_has_ranks(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where a sharding strategy is chosen for a single rank."""
    if recipe.fsdp.strategy == "shard_grad_op" and recipe.launch.nproc_per_node == 1:
        message = "`fsdp.strategy: shard_grad_op` has no effect with one rank"
        yield Problem(message, "fsdp.strategy", hint="delete it, or raise `launch.nproc_per_node`")


def check_port_exists(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where the port of ``launch.rdzv_endpoint`` is out of range."""
    endpoint = recipe.launch.rdzv_endpoint
    if endpoint is not None and not 0 < int(endpoint.rpartition(":")[2]) < 2**16:
        message = f"`launch.rdzv_endpoint`: `{endpoint}` has no port from 1 to 65535"
        hint = "delete it: a free port is found by itself"
        yield Problem(message, "launch.rdzv_endpoint", hint=hint)


def check_no_duplicates(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem for every name that a list of modules holds twice."""
    lists: dict[str, tuple[str, ...]] = {}
    if isinstance(recipe.quantization, BnbOptions):
        lists["quantization.modules_to_not_convert"] = recipe.quantization.modules_to_not_convert
    if isinstance(recipe.adapter, LoraOptions) and not isinstance(
        recipe.adapter.target_modules, str
    ):
        lists["adapter.target_modules"] = recipe.adapter.target_modules
    for key, names in lists.items():
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Problem(f"`{key}` names `{name}` twice", key, hint="delete one of them")


def check_targets_not_empty(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where the list of adapted modules is empty."""
    if getattr(recipe.adapter, "target_modules", None) == ():
        message = "`adapter.target_modules` is empty: nothing would be trained"
        yield Problem(message, "adapter.target_modules", hint="write `all-linear` or some names")


def check_sample_length_used(recipe: Recipe, _base_dir: Path) -> Iterator[Problem]:
    """Yields a Problem where a sample length is set and there is nothing to sample."""
    metrics, default = recipe.metrics, MetricsOptions.model_fields["sample_max_new_tokens"].default
    if not metrics.sample_prompts and metrics.sample_max_new_tokens != default:
        message = "`metrics.sample_max_new_tokens` has no effect without `sample_prompts`"
        hint = "add a prompt to `metrics.sample_prompts`, or delete it"
        yield Problem(message, "metrics.sample_max_new_tokens", hint=hint)


CHECKS: tuple[Check, ...] = (
    check_supported,
    check_one_data_source,
    check_data_path_exists,
    check_dataset_is_packaged,
    check_one_duration,
    check_eval_has_rows,
    check_warmup_fits,
    check_strategy_has_ranks,
    check_port_exists,
    check_no_duplicates,
    check_targets_not_empty,
    check_sample_length_used,
)
