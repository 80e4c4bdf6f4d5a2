"""Losses over rows, source by source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fsdpq.data.preparing.prepared import Documents, PreparedRows
from fsdpq.data.text.tokenize import Row
from fsdpq.model.causal_lm import CausalLM
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.evaluation_job import ModelResult, SourceLoss
from fsdpq.worker.steps import build_evaluation

Groups = Mapping[str, Sequence[Row]]
"""Name of a source -> its rows."""


def measure_losses(
    recipe: Recipe, model: CausalLM, groups: Groups, device: torch.device
) -> ModelResult:
    """Returns the loss of the model as it is, over all rows and over those of every group.

    With one group the number is that of evaluation during training, bit for bit, on as many ranks.

    Ranks: all (collective).

    Args:
        recipe: resolved; its micro-batch is used.
        model: sharded and loaded.
        groups: at least one; no group is empty, and each has a token that carries loss.
        device: this rank's device.
    """
    sources = [measure_source(recipe, model, name, rows, device) for name, rows in groups.items()]
    num_tokens = sum(source.num_tokens for source in sources)
    loss = sources[0].loss
    if len(sources) > 1:
        loss = sum(source.loss * source.num_tokens for source in sources) / num_tokens
    num_rows = sum(source.num_rows for source in sources)
    shown = sources if len(sources) > 1 else []
    return ModelResult(loss, perplexity(loss), num_tokens, num_rows, shown)


def measure_source(
    recipe: Recipe, model: CausalLM, name: str, rows: Sequence[Row], device: torch.device
) -> SourceLoss:
    """Returns the loss over the rows of one source.

    Ranks: all (collective).
    """
    compute = build_evaluation(recipe, model, rows, device)
    if compute is None:
        raise RuntimeError(f"no rows of {name}")
    num_tokens = count_trained(rows)
    loss = compute()
    if loss is None:
        raise RuntimeError(f"the evaluation of {name} was broken off")
    return SourceLoss(name, loss, perplexity(loss), num_tokens, len(rows))


def perplexity(loss: float) -> float:
    """Returns ``exp(loss)``, infinity where no float holds it."""
    return math.exp(loss) if loss < 700 else math.inf


def count_trained(rows: Sequence[Row]) -> int:
    """Returns the tokens of all rows that carry loss."""
    if isinstance(rows, PreparedRows):
        return int(rows.num_trained.sum())
    return sum(row.num_trained for row in rows)


def group_by_source(rows: PreparedRows, names: Sequence[str]) -> dict[str, Sequence[Row]]:
    """Returns prepared rows by the source they came from; one group where there is one source.

    Documents of several sources may share a packed sequence. Where there are several, every
    document is a row by itself: none sees another either way.

    Args:
        rows: of one split.
        names: of the sources, in the order of their numbers in ``origins``.
    """
    documents = rows.documents
    numbers = np.concatenate([rows.documents_of(row) for row in range(len(rows))])
    origins = documents.origins[numbers, 0]
    present = np.unique(origins)
    if len(present) == 1:
        return {names[int(present[0])]: rows}
    groups: dict[str, Sequence[Row]] = {}
    for index, name in enumerate(names):
        own = numbers[origins == index]
        if len(own):
            key = name if name not in groups else f"{name} ({index + 1})"
            groups[key] = [_document(documents, int(number)) for number in own]
    return groups


def _document(documents: Documents, number: int) -> Row:
    span = slice(int(documents.offsets[number]), int(documents.offsets[number + 1]))
    tokens: Any = documents.tokens[span]
    return Row(tokens, documents.mask[span])
