"""Opens the rows of a run that are read while it trains, and says what became of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fsdpq.data.dealing.stream import RowStream, StreamCounts, WindowReport, read_whole
from fsdpq.data.text.tokenize import Row
from fsdpq.errors import Problem, RecipeError
from fsdpq.protocols import MetricSink
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.data import DataOptions
from fsdpq.rows.report import SourceCounts
from fsdpq.rows.source import DataSources


def open_stream(
    recipe: Recipe, sources: DataSources, tokenizer: PreTrainedTokenizerBase, events: MetricSink
) -> tuple[RowStream, Sequence[Row]]:
    """Returns the rows to train on, which come while training, and all rows for evaluation.

    Raises:
        RecipeError: rows for evaluation cannot be used, or none of them carries loss.
    """
    options, seq_len = recipe.data, recipe.data.seq_len

    def report(window: WindowReport) -> None:
        counts = window.counts
        row = {"event": "stream", "epoch": window.epoch, "window": window.window}
        fill = counts.tokens / (counts.sequences * seq_len) if counts.sequences else None
        packed = {} if options.packing == "none" else {"fill": fill}
        events.write(row | dataclasses.asdict(counts) | packed)

    template_text = sources.chat_template
    stream = RowStream(
        sources.train,
        options,
        tokenizer,
        seed=recipe.training.seed,
        template_text=template_text,
        on_window=report,
    )
    if sources.eval is None:
        return stream, []
    held_out, counts = read_whole(sources.eval, options, tokenizer, template_text=template_text)
    if not held_out:
        message = f"none of the {counts.rows} rows for evaluation has a token that carries loss"
        hint = "look for missing answers, or raise data.seq_len"
        raise RecipeError([Problem(message, "data.eval", None, hint)])
    for notice in list_counts(counts, seq_len, of=" for evaluation"):
        events.write({"event": "notice", "message": notice})
    return stream, held_out


def report_stream(stream: RowStream | None, options: DataOptions, events: MetricSink) -> None:
    """Says what became of the rows that a run has streamed; call it when the stream is closed."""
    if stream is None:
        return
    counts, seq_len = stream.counts, options.seq_len
    notices = list_counts(counts, seq_len, of=f" of {counts.rows} that were streamed")
    if options.packing != "none" and counts.sequences:  # a finished run reads no more
        filled = counts.tokens / (counts.sequences * seq_len)
        notices.append(
            f"packed {counts.documents} streamed rows into {counts.sequences} sequences of "
            f"{seq_len} tokens, {filled:.1%} filled"
        )
    for notice in notices:
        events.write({"event": "notice", "message": notice})


def list_counts(counts: StreamCounts, seq_len: int, *, of: str) -> list[str]:
    """Returns what was done to rows, one sentence each."""
    found = SourceCounts(
        "",
        num_bad=counts.bad_rows,
        num_cut=counts.cut,
        num_too_long=counts.too_long,
        num_untrained=counts.untrained,
    )
    return found.sentences(seq_len, of=of)
