"""What a recipe may hold, in words: for error messages and for ``fsdpq kinds``.

Everything is read off the pydantic models, so that a message can never disagree with the check
that it explains.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from fsdpq.recipe.options import Options
from fsdpq.recipe.root import Recipe

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_LONG_TEXT = 1000
"""Bounds of so many characters are not worth words: they only keep a recipe small."""

_OTHER_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "per_device_train_batch_size": "micro_batch_size",
    "learning_rate": "lr",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "blocksize": "block_size",
    "torch_dtype": "dtype",
}
"""Names that other programs use, where spelling does not lead to ours."""


@dataclass(frozen=True)
class Section:
    """One section of a recipe.

    Attributes:
        name: its key.
        kinds: its options classes by kind; the only class of a section without kinds is at "".
        tagged: True where pydantic puts the kind into the location of an error.
    """

    name: str
    kinds: Mapping[str, type[Options]]
    tagged: bool

    def options(self, data: Any) -> type[Options] | None:
        """Returns the options class that ``data`` selects, None where it selects none."""
        if "" in self.kinds:
            return self.kinds[""]
        entry = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        kind: Any = entry.get("kind")
        if len(self.kinds) == 1 and kind is None:
            return next(iter(self.kinds.values()))
        return self.kinds.get(kind) if isinstance(kind, str) else None


def list_sections(root: type[Options] = Recipe) -> dict[str, Section]:
    """Returns every section of a document, the recipe or ``root``, in the order of the model."""
    sections: dict[str, Section] = {}
    for name, info in root.model_fields.items():
        members = [m for m in _union_members(info.annotation) if _is_options(m)]
        if members:
            kinds = {_kind_of(member): member for member in members}
            sections[name] = Section(name, kinds, tagged=info.discriminator is not None)
    return sections


def suggest(word: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that ``word`` most likely means, None where nothing is close.

    A part counts as well as the whole: ``lora_rnak`` means ``rank``.
    """
    best, best_score = None, 0.6
    parts = [part for part in word.split("_") if len(part) > 2]
    for choice in choices:
        if _OTHER_NAMES.get(word) == choice:
            return choice
        near = [ratio for part in parts if (ratio := _ratio(part, choice)) >= 0.75]
        score = max([_ratio(word, choice), *(0.95 * ratio for ratio in near)])
        if score > best_score:
            best, best_score = choice, score
    return best


def describe_field(info: FieldInfo) -> str:
    """Returns what a field accepts: ``a whole number from 1 to 4096``."""
    return _describe(info.annotation, list(info.metadata))


def default_text(info: FieldInfo) -> str:
    """Returns a field's default as YAML writes it, ``required`` where there is none."""
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True, validated_data={})
    return "{}" if isinstance(default, Options) or default == {} else show_value(default)


def nested_options(info: FieldInfo) -> type[Options] | None:
    """Returns the class of the mapping that a field holds, None where it holds none."""
    return next((m for m in _union_members(info.annotation) if _is_options(m)), None)


def item_options(info: FieldInfo) -> type[Options] | None:
    """Returns the class of the mappings in the list that a field holds, None where it has none."""
    for member in _union_members(info.annotation):
        if get_origin(member) is tuple and _is_options(get_args(member)[0]):
            return cast("type[Options]", get_args(member)[0])
    return None


def describe_options(options: type[Options]) -> str:
    """Returns what a mapping of these options is."""
    return f"a mapping of {list_words(options.model_fields, 'and')}"


def example_text(value: Any) -> str:
    """Returns an example as YAML writes it on one line."""
    if isinstance(value, dict):
        pairs = cast("dict[str, Any]", value).items()
        return "{" + ", ".join(f"{key}: {show_value(item)}" for key, item in pairs) + "}"
    return str(value)


def show_value(value: Any) -> str:
    """Returns ``value`` as one line of YAML (which JSON is), shortened."""
    if isinstance(value, str) and value.isprintable() and not _looks_like_other_type(value):
        text = value
    elif isinstance(value, float) and not math.isfinite(value):
        text = f"{value}"
    elif isinstance(value, dict):
        return "a mapping"
    else:
        text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def list_words(words: Iterable[str], joint: str = "or") -> str:
    """Returns ```a`, `b` or `c```."""
    quoted = [f"`{word}`" for word in words]
    if len(quoted) < 2:
        return "".join(quoted)
    return f"{', '.join(quoted[:-1])} {joint} {quoted[-1]}"


def _looks_like_other_type(text: str) -> bool:
    try:
        json.loads(text or "null")
    except ValueError:
        return False
    return True


def _ratio(a: str, b: str) -> float:
    from difflib import SequenceMatcher  # only a mistake needs it

    return SequenceMatcher(None, a.lower(), b).ratio() if len(a) < 60 else 0.0


def _is_options(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _kind_of(options: type[Options]) -> str:
    info = options.model_fields.get("kind")
    return get_args(info.annotation)[0] if info else ""


def _union_members(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for member in get_args(annotation) for m in _union_members(member)]
    return [annotation]


def _describe(annotation: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = list(annotation.__metadata__)
        bounds = [m for entry in inner for m in getattr(entry, "metadata", [entry])]
        return _describe(args[0], [*bounds, *metadata])
    if origin in (Union, types.UnionType):
        parts = [_describe(arg, metadata) for arg in args if arg is not type(None)]
        return " or ".join([*parts, *(["null"] if type(None) in args else [])])
    if origin is Literal:
        return list_words(str(arg) for arg in args)
    if origin is tuple:
        return _describe_list(args)
    if annotation is type(None):
        return "null"
    if origin is dict:
        inner = get_args(args[1])[0] if get_origin(args[1]) is Annotated else args[1]
        return f"a mapping of {'names to names' if inner is str else 'keys to values'}"
    if _is_options(annotation):
        return describe_options(annotation)
    return _PLAIN.get(annotation, str(annotation)) + _describe_bounds(annotation, metadata)


def _describe_list(args: tuple[Any, ...]) -> str:
    """Returns what a tuple of these types accepts."""
    if args[-1] is Ellipsis and _is_options(args[0]):
        return describe_options(args[0]).replace("a mapping", "a list of mappings", 1)
    if args[-1] is Ellipsis and get_origin(args[0]) is tuple:
        return _describe(args[0], []).replace("a list of", "a list of lists of", 1)
    if args[-1] is Ellipsis:
        return _describe(args[0], []).replace("a string", "a list of strings")
    return f"a list of {len(args)} values, each {_describe(args[0], [])}"


def _describe_bounds(annotation: Any, metadata: list[Any]) -> str:
    found: dict[str, Any] = {}
    for entry in metadata:
        for name in ("ge", "gt", "le", "lt", "pattern", "min_length", "max_length"):
            value = getattr(entry, name, None)
            if value is not None:
                found[name] = value
    if annotation is str:
        return _describe_text_bounds(found)
    if annotation not in (int, float):
        return ""
    if "ge" in found and "le" in found:
        return f" from {found['ge']:g} to {found['le']:g}"
    low = f"of at least {found['ge']:g}" if "ge" in found else ""
    low = f"greater than {found['gt']:g}" if "gt" in found else low
    high = f"less than {found['lt']:g}" if "lt" in found and found["lt"] < 2**62 else ""
    bounds = " and ".join(bound for bound in (low, high) if bound)
    return f" {bounds}" if bounds else ""


def _describe_text_bounds(found: Mapping[str, Any]) -> str:
    text = f" that matches `{found['pattern']}`" if "pattern" in found else ""
    longest = found.get("max_length", _LONG_TEXT)
    text += f" of at most {longest} characters" if longest < _LONG_TEXT else ""
    return text + (" that is not empty" if found.get("min_length") == 1 else "")
