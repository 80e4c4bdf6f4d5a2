"""The tensors of a model of any family, recognised by structure in the headers of its files.

The decoder layers are the numbered blocks of which there are as many as the config says, a matrix
in them is a linear layer, the matrices with a row for every word are embedding and head. What files
keep apart and transformers keeps together (experts) is put together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fsdpq.errors import CheckpointError
from fsdpq.plan.shape import GroupShape, ModelShape, TensorKind, TensorShape
from fsdpq.plan.shapes.config_facts import attention_sizes, size_of, text_config
from fsdpq.plan.shapes.experts import is_stack, join_experts
from fsdpq.plan.shapes.layer_facts import with_layer_facts

Tensors = Mapping[str, tuple[int, ...]]
"""Name in the files -> shape."""

NO_PARAMETERS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|\.(attn|attention)\.bias$"
    r"|\.mask$"
)
"""Buffers that some checkpoints hold, and that are computed. Others are too small to count."""

_SMALL_BUFFERS = ("e_score_correction_bias",)
"""Where they have one dimension; Ernie's of two is a parameter."""

FP32_ROUTERS = ("ernie4_5_moe", "hunyuan_v1_moe")
"""Model types whose classes make the router and what corrects it in fp32 (transformers 5.23)."""

OLD_NAMES = {"embed_out.weight": "lm_head.weight"}
"""What files of GPT-NeoX call a tensor -> what transformers 5 calls it."""

HEADS = ("lm_head", "output")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "embeddings")

_NUMBERED = re.compile(r"^(.*?\.)(\d+)\.(.+)$")


def shape_from_tensors(name: str, config: Mapping[str, Any], tensors: Tensors) -> ModelShape:
    """Returns the shape of a model from the names and shapes of its tensors.

    Args:
        name: for people.
        config: its ``config.json``; decides what tensors alone do not say.
        tensors: of its files, quantized ones left out.

    Raises:
        CheckpointError: no decoder layers or no embedding are found.
    """
    text = text_config(config)
    found = {
        OLD_NAMES.get(key, key): shape
        for key, shape in tensors.items()
        if _is_parameter(key, shape)
    }
    prefix, layers = _find_layers(name, found, size_of(text, "num_hidden_layers"))
    num_experts = size_of(text, "num_experts") or 0
    groups = _layer_groups(layers, num_experts, text.get("model_type") in FP32_ROUTERS)
    outside = {k: v for k, v in found.items() if not _in_layers(k, prefix)}
    vocab_size = size_of(text, "vocab_size")
    embedding, head = _find_tables(name, outside, vocab_size)
    is_tied = _is_tied(config, head)
    groups += _outer_groups(outside, embedding, head, is_tied=is_tied)
    shape = ModelShape(
        name=name,
        source="headers",
        model_type=str(text.get("model_type", "")),
        groups=tuple(groups),
        vocab_size=found[embedding][0],
        tie_word_embeddings=is_tied,
        layers_prefix=prefix,
        **attention_sizes(text, found[embedding][1]),
    )
    return with_layer_facts(shape, text)


def _is_parameter(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the files is no buffer: FSDP shards no scalars, so those are."""
    if not shape or NO_PARAMETERS.search(name):
        return False
    return len(shape) > 1 or not name.endswith(_SMALL_BUFFERS)


def _find_layers(
    name: str, tensors: Tensors, num_layers: int | None
) -> tuple[str, dict[int, dict[str, tuple[int, ...]]]]:
    """Returns what stands before a layer's number, and the tensors of each layer."""
    runs: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for key, shape in tensors.items():
        if match := _NUMBERED.match(key):
            prefix, index, rest = match.groups()
            runs.setdefault(prefix, {}).setdefault(int(index), {})[rest] = shape
    fitting = {p: run for p, run in runs.items() if num_layers is None or len(run) >= num_layers}
    if not fitting:
        wanted = f"{num_layers} of them" if num_layers else "any"
        raise CheckpointError(
            f"cannot tell the decoder layers of `{name}`: looked for {wanted} in the names of its "
            f"tensors, found {', '.join(f'{p}* ({len(r)})' for p, r in runs.items()) or 'none'}",
            hint="only decoder-only language models of transformers can be planned",
        )
    prefix = max(
        fitting, key=lambda p: (len(fitting[p]) == num_layers, _num_weights(fitting[p].values()))
    )
    run = fitting[prefix]
    kept = sorted(run)[: num_layers or len(run)]  # what follows predicts further tokens: not used
    return prefix, {index: run[index] for index in kept}


def _num_weights(layers: Iterable[Tensors]) -> int:
    return sum(math.prod(shape) for layer in layers for shape in layer.values())


def _in_layers(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name[len(prefix) :].partition(".")[0].isdigit()


def _layer_groups(
    layers: Mapping[int, Tensors], num_experts: int, fp32_router: bool
) -> list[GroupShape]:
    """Returns the groups of decoder layers: those with the same tensors are one."""
    alike: dict[tuple[TensorShape, ...], list[int]] = {}
    for index, tensors in layers.items():
        alike.setdefault(tuple(_layer_tensors(tensors, num_experts, fp32_router)), []).append(index)
    return [
        GroupShape("layer", tensors, len(indices), tuple(indices))
        for tensors, indices in alike.items()
    ]


def _layer_tensors(tensors: Tensors, num_experts: int, fp32_router: bool) -> Iterator[TensorShape]:
    joined = join_experts(tensors)
    blocks = {
        name.rpartition("experts")[0] for name, shape in joined.items() if is_stack(name, shape)
    }
    for name, shape in sorted(joined.items()):  # files are cut anywhere
        beside = any(name.startswith(block) for block in blocks)
        kind = _kind(name, shape, num_experts if beside else 0)
        is_fp32 = fp32_router and (kind == "router" or name.endswith(_SMALL_BUFFERS))
        yield TensorShape(name, shape, kind, is_fp32=is_fp32)


def _kind(name: str, shape: tuple[int, ...], num_experts: int) -> TensorKind:
    if is_stack(name, shape):
        return "experts"
    if len(shape) != 2 or not name.endswith(".weight"):
        return "plain"
    return "router" if num_experts and shape[0] == num_experts else "linear"


def _find_tables(name: str, outside: Tensors, vocab_size: int | None) -> tuple[str, str | None]:
    """Returns the names of embedding and head; the head None where there is none."""
    tables = [
        key
        for key, shape in outside.items()
        if len(shape) == 2 and key.endswith(".weight") and vocab_size in (None, shape[0])
    ]
    heads = [key for key in tables if key.split(".")[-2] in HEADS]
    named = [key for key in tables if key.split(".")[-2] in EMBEDDINGS]
    others = named or [key for key in tables if key not in heads]
    if not others:
        raise CheckpointError(
            f"cannot tell the embedding of `{name}`: no matrix outside of its layers has "
            f"{vocab_size or 'a known number of'} rows (`vocab_size`)",
            hint="only decoder-only language models of transformers can be planned",
        )
    return others[0], heads[0] if heads else None


def _is_tied(config: Mapping[str, Any], head: str | None) -> bool:
    told = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    return head is None or told is True


def _outer_groups(
    outside: Tensors, embedding: str, head: str | None, *, is_tied: bool
) -> list[GroupShape]:
    """Returns the groups of all that is outside of the decoder layers."""
    stem = (head or "lm_head.weight").removesuffix("weight")
    of_head = [TensorShape(n, shape) for n, shape in outside.items() if n.startswith(stem)]
    tied_name = f"{stem}weight" if is_tied else ""
    table = TensorShape(embedding, outside[embedding], tied_name=tied_name)
    rest = [
        TensorShape(n, shape)
        for n, shape in outside.items()
        if n != embedding and not n.startswith(stem)
    ]
    extra = [tensor for tensor in of_head if tensor.name != head] if is_tied else []
    groups = [GroupShape("embedding", (table, *extra))]
    groups += [] if is_tied else [GroupShape("head", tuple(of_head))]
    return [*groups, GroupShape("root", tuple(rest))]
