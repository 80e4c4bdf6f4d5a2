"""What the numbers suggest, in sentences: what is lost, and which setting would keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fsdpq.data.inspection.findings import ERRORS, SKIPPED

LONGER_SHARE = 0.01
"""Rows over the limit that are worth a word."""

PADDING_SHARE = 0.25
"""Padding that is worth packing."""

TRAINED_SHARE = 0.02
"""Fewer trained tokens than that are worth a word."""

Content = Mapping[str, Any]


def find_errors(content: Content, *, skips_bad_rows: bool) -> list[dict[str, str]]:
    """Returns what keeps a run from starting: ``message`` and ``hint`` of each."""
    kinds = [kind for kind in ERRORS if not (skips_bad_rows and kind in SKIPPED)]
    rows, seq_len = content["counts"]["rows"], content["data"]["seq_len"]
    bad = [finding for finding in content["findings"] if finding["kind"] in kinds]
    errors: list[dict[str, str]] = []
    if bad:
        hint = "raise data.seq_len, or choose another data.truncation"
        if any(finding["kind"] in SKIPPED for finding in bad):
            hint = "correct them, or leave them out with data.on_bad_row=skip"
        count = sum(finding["count"] for finding in bad)
        message = f"{count:,} of {rows:,} rows cannot be used"
        errors.append({"message": message, "hint": hint})
    elif not content["counts"]["usable"]:
        message = f"none of the {rows:,} rows can be trained on"
        hint = "look for missing answers, or raise data.seq_len"
        errors.append({"message": message, "hint": hint})
    context = content["model"]["context"]
    if context is not None and seq_len > context:
        message = f"`data.seq_len` is {seq_len}, the model's context is {context} tokens"
        errors.append({"message": message, "hint": f"use data.seq_len={context} or less"})
    return errors


def advise(content: Content) -> list[str]:
    """Returns suggestions on the content of an inspection, the gravest first."""
    return [*_about_rows(content), *_about_limit(content), *_about_packing(content)]


def _about_rows(content: Content) -> Iterator[str]:
    counts = content["counts"]
    rows = counts["rows"]
    if content["held_out"]["in_training"]:
        yield (
            f"{content['held_out']['in_training']:,} of {content['held_out']['rows']:,} held-out "
            "rows are trained on too: the held-out loss will look better than it is; remove "
            "duplicates from the data"
        )
    told = {
        "duplicates": "repeat an earlier row",
        "untrained": "have no token that carries loss and are left out",
        "special_tokens": "have special tokens written out in their text: the tokenizer reads them "
        "as the real ones",
        "unknown_tokens": "have text that the tokenizer does not know",
    }
    for name, what in told.items():
        if counts[name]:
            yield f"{_some_of(counts[name], rows)} {what}"
    trained, tokens = counts["kept_trained_tokens"], counts["kept_tokens"]
    if tokens and trained / tokens < TRAINED_SHARE:
        yield f"only {trained / tokens:.2%} of the tokens carry loss"


def _about_limit(content: Content) -> Iterator[str]:
    limit, context = content["lengths"]["limit"], content["model"]["context"]
    if limit is None:
        return
    if limit["longer_share"] <= LONGER_SHARE:
        return
    done = {"drop": "left out", "error": "refused"}.get(content["data"]["truncation"], "cut")
    share = f"{limit['longer_share']:.1%} of the rows are {done} at {limit['seq_len']} tokens"
    if context is None or limit["keeps"] <= context:
        yield f"{share}: data.seq_len={limit['keeps']} keeps {limit['kept_share']:.0%} whole"
    else:
        yield (
            f"{share}: {limit['kept_share']:.0%} whole would take data.seq_len={limit['keeps']}, "
            f"and the model's context is {context}"
        )


def _about_packing(content: Content) -> Iterator[str]:
    packing = content["packing"]
    if content["data"]["packing"] != "none" or packing["padding_share"] is None:
        return
    if packing["padding_share"] > PADDING_SHARE:
        yield (
            f"{packing['padding_share']:.0%} of what is computed is padding: data.packing=best_fit "
            f"makes {packing['sequences']:,} sequences of {packing['rows']:,} rows, "
            f"{packing['fill']:.1%} filled (batch sizes then count sequences)"
        )


def _some_of(part: int, rows: int) -> str:
    share = part / rows
    return f"{share:.1%} of the rows" if share >= 0.001 else f"{part:,} of {rows:,} rows"
