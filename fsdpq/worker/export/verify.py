"""Compares what was exported, loaded by stock libraries, with the model that was trained.

Both answer the same few prompts. Ours is the sharded model as it stands after the last step; theirs
is transformers' model (`fsdpq.worker.export.streamed`), with PEFT around it where an adapter was
trained: PEFT itself loads it from the files that were written (`fsdpq.worker.export.stock`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fsdpq.dist import share_from_first
from fsdpq.errors import ExportError, FsdpqError
from fsdpq.model.causal_lm import CausalLM
from fsdpq.protocols import DTYPES
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.worker.assemble import Assembled, Inputs, without_gpu_kernels
from fsdpq.worker.export.gathered import GatheredBase, read_on_first_rank
from fsdpq.worker.export.stock import OPENERS, Exported
from fsdpq.worker.export.streamed import Read, StreamedModel

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is",
    "def add(first, second):\n    return first + second\n\n\nassert add(2, 3) ==",
    "In 1969, 3 people flew 384,400 km in 8 days, which is 48,050 km a day, or",
    "La Terre tourne autour du Soleil, et la Lune tourne autour de la",
)
"""What is asked: English, code, numbers, French. Nobody's data."""

MAX_TOKENS = 32

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference between two logits, as a share of the largest logit, by the dtype of products:
five times what was seen of a model of 30 layers, and more of the tests' families."""


@dataclass(frozen=True)
class Verified:
    """How close an export is to what was trained.

    Attributes:
        max_difference: largest difference between two logits, as a share of the largest logit.
        tolerance: what it may be.
    """

    max_difference: float
    tolerance: float


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns the ids of `PROMPTS`, cut to the shortest, ``(prompts, tokens)``, int64."""
    rows = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in PROMPTS]
    length = min(MAX_TOKENS, *(len(row) for row in rows))
    return torch.tensor([row[:length] for row in rows])


def verify_export(
    recipe: Recipe,
    inputs: Inputs,
    assembled: Assembled,
    directory: Path,
    ids: Tensor,
    *,
    device: torch.device,
) -> Verified:
    """Compares logits after the last token of each row of ``ids``.

    Ranks: all (collective); rank 0 loads what was exported.
    Memory: rank 0 holds one dequantized layer of the base, and the adapter once more.

    Args:
        recipe: of the run, resolved.
        inputs: of the run.
        assembled: the trained model.
        directory: what was written in ``export.format``.
        ids: ``(rows, tokens)``, int64, without padding.
        device: this rank's.

    Raises:
        ExportError: what was written cannot be loaded, or computes something else.
    """
    ours = trained_logits(assembled.model, ids.to(device)).float().cpu()
    compute = precision_of(recipe).compute
    base = GatheredBase(assembled, dtype=DTYPES[compute], device=device)
    exported = Exported(directory, inputs, assembled, base, DTYPES[recipe.model.dtype])

    def compare(read: Read) -> _Outcome:
        try:
            theirs = _stock_logits(recipe, exported, read, ids).float().cpu()
        except Exception as error:  # whatever stock libraries raise: all ranks must hear of it
            logging.getLogger(__name__).exception("loading what was exported")
            return _Outcome(math.inf, *_explain(error))
        return _Outcome(((ours - theirs).abs().max() / ours.abs().max()).item())

    outcome = share_from_first(read_on_first_rank(base, compare) or _Outcome(math.inf))
    if outcome.message:
        raise ExportError(outcome.message, hint=outcome.hint)
    found = Verified(outcome.difference, TOLERANCE[compute])
    if not found.max_difference <= found.tolerance:  # NaN is no agreement
        raise ExportError(
            f"what was exported computes something else than what was trained: logits differ by "
            f"{found.max_difference:.2g} of the largest, and {found.tolerance:g} is the most that "
            f"{compute} explains",
            hint="do not use it; report this with the recipe",
        )
    return found


@dataclass(frozen=True)
class _Outcome:
    """What rank 0 tells the others: a difference, or what went wrong."""

    difference: float
    message: str = ""
    hint: str = ""


def _explain(error: Exception) -> tuple[str, str]:
    if isinstance(error, FsdpqError):
        return error.message, error.hint
    name = type(error).__name__
    return (
        f"what was exported cannot be loaded: {name}: {error}",
        "see the log of rank 0; `export.verify=false` leaves this check out",
    )


@torch.no_grad()
def trained_logits(model: CausalLM, ids: Tensor) -> Tensor:
    """Returns the sharded model's logits after the last token of each row, ``(rows, vocabulary)``.

    Without a cache: layers that run over chunks of rows (`training.layer_chunks`) would mix it up.

    Ranks: all (collective).
    """
    was_training = model.training
    model.eval()
    logits = model.next_token_logits(ids, None)
    model.train(was_training)
    return logits


def _stock_logits(recipe: Recipe, exported: Exported, trained: Read, ids: Tensor) -> Tensor:
    """Returns what others compute; on the host where the device has no memory left."""
    try:
        return _answer(recipe, exported, trained, ids)
    except torch.OutOfMemoryError:
        exported.base.device = torch.device("cpu")
        return _answer(without_gpu_kernels(recipe), exported, trained, ids)


def _answer(recipe: Recipe, exported: Exported, trained: Read, ids: Tensor) -> Tensor:
    stock = OPENERS[recipe.export.format](exported)
    device = exported.base.device
    model = StreamedModel(
        stock.config,
        stock.read(trained),
        device=device,
        dtype=exported.dtype,
        attn_implementation=recipe.model.attn_implementation,
        trust_remote_code=exported.inputs.trust_remote_code,
        wrap=stock.wrap,
    )
    autocast = exported.assembled.model.autocast_dtype
    with torch.autocast(device.type, autocast, enabled=autocast is not None, cache_enabled=False):
        return model.logits(ids, torch.tensor([ids.shape[1] - 1]))[:, 0]
