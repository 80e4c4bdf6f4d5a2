"""``merge.json``: how much of what was trained is in the merged weights.

A weight W becomes W + D. Stored in 16 bits, or in 4, it is W + D', and D' is what survived. Sums
are made while the weights are written, so nothing is read twice for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fsdpq.worker.merge.weights import Rows


@dataclass
class Survival:
    """Sums over one or several weights, of which rows are added chunk by chunk.

    Attributes:
        change: of squares of the change D.
        survived: of squares of D', what the stored weights differ from the base by.
        error: of squares of D' - D.
        product: of D' times D.
        base: of squares of the base W.
        num_weights: how many were added.
        num_lost: those that were to change, and did not.
    """

    change: float = 0.0
    survived: float = 0.0
    error: float = 0.0
    product: float = 0.0
    base: float = 0.0
    num_weights: int = 0
    num_lost: int = 0

    def add(self, rows: Rows, stored: Tensor) -> None:
        """Adds rows of a weight.

        Args:
            rows: before and after.
            stored: as they are stored, in any dtype.
        """
        change = rows.trained - rows.base
        survived = stored.float() - rows.base  # never in place: it may be what is written
        self.change += _squares(change)
        self.survived += _squares(survived)
        self.base += _squares(rows.base)
        self.product += float(torch.dot(change.reshape(-1), survived.reshape(-1)))
        self.num_lost += int(((survived == 0) & (change != 0)).sum())
        self.error += _squares(survived.sub_(change))
        self.num_weights += change.numel()

    def add_all(self, other: Survival) -> None:
        """Adds the sums of other weights."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def fields(self) -> dict[str, float | int | None]:
        """Returns what the receipt says of these weights.

        Returns:
            ``change_norm``, ``base_norm``: Frobenius norms of D and W. ``survived_norm``: of D'.
            ``kept``: how far D' goes in the direction of D, 1 is all the way.
            ``relative_error``: norm of D' - D, of that of D. ``lost``: share of the weights that
            were to change and did not. Ratios are null where D is 0.
        """
        changed = self.change > 0
        return {
            "change_norm": math.sqrt(self.change),
            "survived_norm": math.sqrt(self.survived),
            "base_norm": math.sqrt(self.base),
            "kept": self.product / self.change if changed else None,
            "relative_error": math.sqrt(self.error / self.change) if changed else None,
            "lost": self.num_lost / self.num_weights if self.num_weights else None,
        }


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


@dataclass
class SurvivalBook:
    """One `Survival` for every changed weight; give `add` as ``on_rows``."""

    weights: dict[str, Survival] = field(default_factory=dict[str, Survival])

    def add(self, name: str, rows: Rows, stored: Tensor) -> None:
        """Adds rows of one weight; see `Survival.add`."""
        self.weights.setdefault(name, Survival()).add(rows, stored)

    def total(self) -> Survival:
        """Returns the sums over all weights."""
        return _total(self.weights.values())

    def fields(self) -> dict[str, Any]:
        """Returns the receipt's ``all``, ``kinds`` (by last part of the name) and ``weights``."""
        kinds: dict[str, Survival] = {}
        for name, sums in self.weights.items():
            kinds.setdefault(kind_of(name), Survival()).add_all(sums)
        return {
            "all": self.total().fields(),
            "kinds": {kind: sums.fields() for kind, sums in kinds.items()},
            "weights": {name: sums.fields() for name, sums in self.weights.items()},
        }


def _total(sums: Iterable[Survival]) -> Survival:
    total = Survival()
    for each in sums:
        total.add_all(each)
    return total


def kind_of(name: str) -> str:
    """Returns what a weight is called without the number of its layer (``self_attn.q_proj``)."""
    parts = name.removesuffix(".weight").split(".")
    number = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[number + 1 :]) if number >= 0 else parts[-1]


FULL_MATCH, LOOSE_MATCH = 0.01, 0.1
"""A model is the trained one, or close to it, where its divergence from that is at most this share
of the divergence that training itself made."""


@dataclass(frozen=True)
class Likeness:
    """A model beside the trained one, on held-out tokens.

    Attributes:
        loss: mean loss in nats a token.
        mean_kl: mean of the divergence KL(trained || this) over the tokens, in nats.
        max_kl: the largest of a token.
    """

    loss: float
    mean_kl: float
    max_kl: float


def verdict(
    *,
    onto: str,
    dtype: str,
    survival: Survival,
    likeness: Mapping[str, Likeness],
    requantized: str | None,
) -> list[str]:
    """Returns in sentences whether what was written is the model that was trained, and why not.

    Args:
        onto: ``original`` or ``dequantized``.
        dtype: of the merged weights, as recipes call it.
        survival: of the merged weights.
        likeness: of ``trained``, ``base`` (before training), ``merged`` and perhaps
            ``requantized``; or nothing.
        requantized: how, None where it was not.
    """
    found: list[str] = []
    if "merged" in likeness:
        found.append(_verdict_of_merged(onto, likeness))
    error = math.sqrt(survival.error / survival.change) if survival.change else 0.0
    if error > 0.1:
        found.append(
            f"Rounding to {dtype} changed what was trained by {error:.0%} of its size: "
            "`--dtype fp32` keeps all of it."
        )
    if "requantized" in likeness and requantized is not None:
        found.append(_verdict_of_requantized(requantized, likeness))
    return found


def _share(one: Likeness, base: Likeness) -> float:
    """Returns a model's divergence as a share of the one that training made."""
    return one.mean_kl / base.mean_kl if base.mean_kl > 0 else math.inf


def _verdict_of_merged(onto: str, likeness: Mapping[str, Likeness]) -> str:
    merged, trained = likeness["merged"], likeness["trained"]
    share = _share(merged, likeness["base"])
    apart = f"({merged.mean_kl:.2g} nats of KL, {share:.2%} of what training changed)"
    if share <= FULL_MATCH:
        return f"The merged model is the trained model {apart}."
    if share <= LOOSE_MATCH:
        return f"The merged model is close to the trained model {apart}."
    why = "its weights were rounded, and `--dtype fp32` keeps them"
    if onto == "original":
        why = (
            "the adapter was trained over quantized weights and made up for their rounding too, "
            "which the original weights do not have "
            "(https://github.com/huggingface/peft/issues/2105); `--onto dequantized` gives the "
            "trained model"
        )
    losses = f"loss {merged.loss:.4f} and {trained.loss:.4f} nats a token"
    return f"The merged model is not the trained model ({losses}) {apart}: {why}."


def _verdict_of_requantized(how: str, likeness: Mapping[str, Likeness]) -> str:
    again, merged = likeness["requantized"], likeness["merged"]
    share, cost = _share(again, likeness["base"]), again.loss - merged.loss
    text = f"Quantizing again ({how}) costs {cost:+.4f} nats of loss a token, and leaves the model "
    text += f"{again.mean_kl:.2g} nats of KL from the trained one, {share:.2%} of what training "
    if share > LOOSE_MATCH:
        return text + "changed: serve the adapter beside the quantized base if that is too much."
    return text + "changed."
