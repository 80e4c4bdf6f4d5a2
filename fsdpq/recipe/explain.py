"""Everything there is to say about one key of a recipe: ``fsdpq show --explain``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsdpq.errors import Location, UsageError
from fsdpq.recipe.describe import (
    default_text,
    describe_field,
    item_options,
    list_sections,
    list_words,
    show_value,
    suggest,
)
from fsdpq.recipe.field_docs import field_doc
from fsdpq.recipe.marks import KeyPath
from fsdpq.recipe.options import Options
from fsdpq.recipe.view import View

UNITS = {
    "seq_len": "tokens",
    "sample_max_new_tokens": "tokens",
    "steps": "optimizer steps",
    "epochs": "passes over the training rows",
    "warmup_steps": "optimizer steps",
    "warmup_ratio": "share of all steps",
    "eval_interval": "optimizer steps",
    "log_interval": "optimizer steps",
    "interval": "optimizer steps",
    "start_step": "optimizer steps",
    "num_steps": "optimizer steps",
    "global_batch_size": "rows",
    "micro_batch_size": "rows a rank",
    "gradient_accumulation_steps": "micro-batches a rank",
    "max_rows": "rows",
    "eval_fraction": "share of the rows",
    "weight": "share beside the other parts'",
    "block_size": "weights",
    "group_size": "weights",
    "nbits": "bits a weight",
    "shard_size": "ranks",
    "nproc_per_node": "ranks",
    "nnodes": "machines",
    "num_new_layers": "decoder layers",
    "expansion_rate": "share of the layers",
    "min_lr_ratio": "share of the peak",
    "decay_steps": "optimizer steps",
    "decay_ratio": "share of all steps",
    "lora_plus_ratio": "times `lr`",
}
"""Field -> unit of its number, where it has one."""


@dataclass(frozen=True)
class Explanation:
    """One key of a resolved recipe.

    Attributes:
        key: dotted key.
        value: its value as plain data.
        source: where the value comes from, in words.
        location: where it was written, None for a default.
        type: what the key accepts, in words.
        choices: the allowed values, where they are a closed list.
        unit: unit of the number, may be empty.
        default: the default as YAML writes it, ``required`` where there is none.
        description: the documentation of the key.
    """

    key: str
    value: Any
    source: str
    location: Location | None
    type: str
    choices: tuple[str, ...]
    unit: str
    default: str
    description: str


def explain(view: View, key: str) -> list[Explanation]:
    """Returns what there is to say about ``key``, or about every key of the section ``key``.

    Raises:
        UsageError: the recipe has no such key.
    """
    found = [entry for entry in explain_all(view) if _is_inside(entry.key, key)]
    if not found:
        raise _no_such_key(view, key)
    return found


def explain_all(view: View) -> Iterator[Explanation]:
    """Yields every key of the recipe, in the order of the models."""
    yield from _explain_options(view, view.recipe, ())


def value_text(value: Any) -> str:
    """Returns ``value`` as one line of YAML, in full."""
    return value if isinstance(value, str) and show_value(value) == value else json.dumps(value)


def _is_inside(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _explain_options(view: View, options: Options, path: KeyPath) -> Iterator[Explanation]:
    plain = options.model_dump(mode="json")
    for name, info in type(options).model_fields.items():
        value, here = getattr(options, name), (*path, name)
        if isinstance(value, Options):
            yield from _explain_options(view, value, here)
            continue
        if item_options(info) and value:
            for index, item in enumerate(value):
                yield from _explain_options(view, item, (*here, index))
            continue
        words = describe_field(info)
        choices = tuple(words.split("`")[1::2]) if "matches" not in words else ()
        yield Explanation(
            key=".".join(str(part) for part in here),
            value=plain[name],
            source=view.source(here),
            location=view.origin(here),
            type=words.replace("`", ""),
            choices=choices,
            unit=UNITS.get(name, ""),
            default=default_text(info),
            description=field_doc(type(options), name),
        )


def _no_such_key(view: View, key: str) -> UsageError:
    known = [entry.key for entry in explain_all(view)]
    sections = list_sections()
    section, _, word = key.rpartition(".")
    kinds = list(sections[section].kinds.items()) if section in sections else []
    for kind, options in kinds:
        if word in options.model_fields:
            message = f"`{key}` belongs to kind `{kind}`, and this recipe has another"
            return UsageError(message, hint=f"`fsdpq kinds {section}` explains it")
    guess = suggest(key, [*known, *sections])
    name = suggest(word, [other.rpartition(".")[2] for other in known])
    same_name = [other for other in known if other.rpartition(".")[2] in (word, name)]
    guesses = [guess] if guess else same_name[:3]
    hint = f"did you mean {list_words(guesses)}?"
    hint = hint if guesses else "`fsdpq show` prints every key of the recipe"
    return UsageError(f"the recipe has no key `{key}`", hint=hint)
