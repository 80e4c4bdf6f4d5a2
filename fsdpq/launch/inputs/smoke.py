"""Inputs of ``fsdpq train --smoke``: a tiny random model of the recipe's family and made-up rows.

Made once for a family and its sizes and kept in the cache. Nothing is downloaded: the family comes
from a model card that ships with fsdpq, or from the ``config.json`` of a local model.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdpq.cards.card import ModelCard
from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.errors import UsageError
from fsdpq.fetch.cache import cached_directory
from fsdpq.fetch.resolve import FetchedModel
from fsdpq.launch.inputs.shrink import NUM_LAYERS
from fsdpq.launch.ranks.single_worker import WorkerFiles, run_single_worker
from fsdpq.recipe.checks.facts import card_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.recipe.sections.quantization import HqqOptions

MAKER_VERSION = "3"
"""Version of what `fsdpq.worker.smoke_model` makes; entries of another version are made again."""

MAKER = ("-m", "fsdpq.worker", "smoke-model")
NUM_HEADS = 4
MIN_WIDTH = 64
CONTEXT = 512
NUM_EXPERTS = 4
_CHATS = re.compile(r"instruct|chat|-it\b|zephyr|qwen3|phi-[34]", re.IGNORECASE)
"""Names of models whose tokenizer has a chat template."""

Report = Callable[[str], None]


def make_smoke_model(recipe: Recipe, *, base_dir: Path, report: Report) -> FetchedModel:
    """Returns a tiny random model of the family of the recipe's, making what is not there yet.

    Args:
        recipe: as given, not shrunk.
        base_dir: what a relative model directory is relative to.
        report: told one short line per thing done.

    Raises:
        UsageError: the architecture of the recipe's model is not known.
        FsdpqError: the tiny model cannot be built.
    """
    spec = describe_tiny_model(recipe, base_dir)
    text = json.dumps(spec, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    what = f"a tiny random {spec['model_type']}"

    def build(draft: Path) -> None:
        report(f"making {what}")
        work = draft / ".work"
        work.mkdir()
        (work / "spec.json").write_text(text, encoding="utf-8")
        logs = WorkerFiles(work / "out", work / "log", work / "error.json")
        arguments = [*MAKER, str(work / "spec.json"), str(draft), f"--error={logs.error}"]
        run_single_worker(arguments, logs)
        shutil.rmtree(work)

    key = f"smoke/{spec['model_type']}-{digest}"
    entry = cached_directory(key, build, converter=MAKER_VERSION, report=report)
    report(f"smoke: {what} stands in for {recipe.model.name_or_path}")
    return FetchedModel(entry.directory, f"made up: {what}", entry.sha256, "none", None)


def describe_tiny_model(recipe: Recipe, base_dir: Path) -> dict[str, Any]:
    """Returns what `fsdpq.worker.smoke_model` needs to know.

    Raises:
        UsageError: the architecture of the recipe's model is not known.
    """
    name = recipe.model.name_or_path
    config_path = base_dir / Path(name).expanduser() / "config.json"
    card = card_of(recipe, base_dir)
    if card is None:
        raise UsageError(
            f"`--smoke` does not know the architecture of `{name}`",
            hint="give a local directory with its config.json as `model.name_or_path`, or a "
            "model of the same family that `fsdpq recipes ls` shows",
        )
    base_config = None
    if config_path.is_file():
        base_config = json.loads(config_path.read_text(encoding="utf-8"))
    return {
        "model_type": card.model_type,
        "config": tiny_sizes(card, recipe),
        "base_config": base_config,
        "chat_template": _has_chats(recipe.data) and _has_chat_template(name, config_path),
        "tokens": list(_template_tokens(recipe.data)),
        "seed": recipe.training.seed,
    }


def tiny_sizes(card: ModelCard, recipe: Recipe) -> dict[str, Any]:
    """Returns sizes by transformers' names: what a small model of the family can keep, it keeps."""
    width = MIN_WIDTH
    if isinstance(recipe.quantization, HqqOptions):
        width = max(width, recipe.quantization.group_size or 0)
    ratio = card.num_attention_heads // max(1, card.num_key_value_heads)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": max(1, NUM_HEADS // min(ratio, NUM_HEADS)),
        "head_dim": width // NUM_HEADS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": card.tie_word_embeddings,
    }
    if card.num_experts:
        experts = dict.fromkeys(("num_local_experts", "num_experts"), NUM_EXPERTS)
        sizes |= experts | {"num_experts_per_tok": 2, "moe_intermediate_size": width}
    if card.sliding_window:
        sizes["sliding_window"] = CONTEXT // 4
    return sizes


def _has_chats(options: DataOptions) -> bool:
    formats = [part.format for part in options.mixture or (options,)]
    return any(name in ("auto", "messages") for name in formats)


def _template_tokens(options: DataOptions) -> tuple[str, ...]:
    """Returns the tokens that the recipe's built-in chat template needs."""
    built_in = BUILT_IN_TEMPLATES.get(options.chat_template or "")
    return built_in.tokens if built_in is not None else ()


def _has_chat_template(name: str, config_path: Path) -> bool:
    if config_path.is_file():
        tokenizer = config_path.parent / "tokenizer_config.json"
        has_file = (config_path.parent / "chat_template.jinja").exists()
        return has_file or (tokenizer.exists() and "chat_template" in tokenizer.read_text("utf-8"))
    return bool(_CHATS.search(name))
