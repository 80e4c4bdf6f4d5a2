"""The text of ``fsdpq data inspect``: counts, lengths, findings, rows as the model reads them."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

import click

from fsdpq.cli.visible import cut, sample_lines, visible, width
from fsdpq.pages.inspection_words import (
    HEADINGS,
    Content,
    Count,
    bin_label,
    describe_limit,
    describe_packing,
    describe_reading,
    describe_sample,
    describe_source,
    list_counts,
    name_places,
)

MAX_COLUMNS = 120
MAX_SAMPLE_LINES = 40
MAX_ROW_LINES = 400
BAR_COLUMNS = 40
EIGHTHS = " ▏▎▍▌▋▊▉"


def render_inspection(content: Content, *, color: bool) -> Iterator[str]:
    """Yields the lines of the whole inspection.

    Args:
        content: as the worker wrote it.
        color: the terminal shows colours.
    """
    yield from _title("sources")
    yield from _sources(content)
    yield from _title("rows", after=True)
    yield from _counts(list_counts(content))
    if content["lengths"]["rows"]:
        yield from _title("tokens a row", after=True)
        yield from _lengths(content["lengths"])
    if content["packing"]["rows"]:
        yield from _title("packing", after=True)
        yield from (f"  {line}" for line in describe_packing(content))
    if content["findings"]:
        yield from _title("findings", after=True)
        yield from _findings(content)
    if content["samples"]:
        yield from _title(f"rows as the model reads them, {_legend(color)}", after=True)
        for sample in content["samples"]:
            yield from _sample(sample, color=color, max_lines=MAX_SAMPLE_LINES)
    if content["notes"]:
        yield ""
        for note in content["notes"]:
            yield f"{click.style('note:', fg='cyan', bold=True)} {visible(note)}"


def render_row(content: Content, *, color: bool) -> Iterator[str]:
    """Yields the lines of one row: its content, its text and its tokens."""
    row = content["row"]
    yield from _title(f"row {row['place']['row']} of {visible(row['place']['file'])}")
    yield from (f"  {visible(line)}" for line in row["content"].split("\n"))
    if row["mistake"]:
        yield ""
        yield click.style("error:", fg="red", bold=True) + " " + visible(row["mistake"])
        return
    yield from _title(f"as the model reads it, {_legend(color)}", after=True)
    yield from _sample(row, color=color, max_lines=MAX_ROW_LINES)
    yield from _title("tokens", after=True)
    yield from _token_table(row["tokens"], color=color)
    if row["num_tokens"] > len(row["tokens"]):
        yield f"  ({row['num_tokens'] - len(row['tokens']):,} more tokens)"


def _title(text: str, *, after: bool = False) -> Iterator[str]:
    yield from [""] * after
    yield click.style(text, bold=True)


def _legend(color: bool) -> str:
    return (
        f"trained tokens in {click.style('green', fg='green')}"
        if color
        else ("trained tokens in ⟦brackets⟧")
    )


def _sources(content: Content) -> Iterator[str]:
    for source in content["sources"]:
        yield f"  {source['use']}: {visible(source['name'])}"
        yield f"    {visible(describe_source(source))}"
    for line in describe_reading(content):
        yield f"  {visible(line)}"


def _counts(table: Sequence[Count]) -> Iterator[str]:
    names = max(len(entry.name) for entry in table)
    numbers = max(len(f"{entry.count:,}") for entry in table)
    for entry in table:
        line = f"  {entry.name:<{names}}  {entry.count:>{numbers},}  {entry.share:>6}  {entry.text}"
        yield line.rstrip()


def _lengths(lengths: Content) -> Iterator[str]:
    bins, limit = lengths["histogram"], lengths["limit"]
    labels = [bin_label(entry) for entry in bins]
    label_width = max(map(len, labels))
    most = max(entry["rows"] for entry in bins)
    marked = False
    for label, entry in zip(labels, bins, strict=True):
        if not marked and entry["low"] >= limit["seq_len"]:
            yield f"  {'':>{label_width}} ├── data.seq_len={limit['seq_len']}"
            marked = True
        count = f"{entry['rows']:,}" if entry["rows"] else ""
        yield f"  {label:>{label_width}} │{_bar(entry['rows'] / most)} {count}".rstrip()
    quantiles = "  ".join(f"{name} {value:,}" for name, value in lengths["quantiles"].items())
    yield f"  {quantiles}  mean {lengths['mean']:,.1f}"
    yield f"  {describe_limit(lengths)}"


def _bar(share: float) -> str:
    eighths = round(share * BAR_COLUMNS * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _findings(content: Content) -> Iterator[str]:
    kind = ""
    for finding in content["findings"]:
        if finding["kind"] != kind:
            kind = finding["kind"]
            yield f"  {HEADINGS[kind]}"
        first, *rest = _wrap(finding["text"])
        yield f"    {finding['count']:>7,}  {first}"
        for line in (*rest, *_wrap(name_places(finding))):
            yield f"{'':13}{line}"
        details = list(dict.fromkeys(e["detail"] for e in finding["examples"] if e["detail"]))
        if details and kind in ("bad_row", "unrenderable"):
            yield f"{'':13}{cut(visible(details[0]), _columns() - 13)}"


def _wrap(text: str) -> list[str]:
    """Returns the lines of a sentence beside a count."""
    return textwrap.wrap(visible(text), _columns() - 13, break_on_hyphens=False) or [""]


def _sample(sample: Content, *, color: bool, max_lines: int) -> Iterator[str]:
    yield f"  {visible(describe_sample(sample))}"
    lines = sample_lines(
        sample["segments"], columns=_columns() - 6, max_lines=max_lines, color=color
    )
    for line in lines:
        yield f"  │ {line}"


def _token_table(tokens: Sequence[Content], *, color: bool) -> Iterator[str]:
    names = [visible(token["token"]) for token in tokens]
    room = min(40, max((width(name) for name in names), default=0))
    yield f"  {'':5}  {'id':>7}  loss  token"
    for token, name in zip(tokens, names, strict=True):
        shown = cut(name, room)
        mark = "yes " if token["trained"] else "    "
        text = f"  {token['position']:>5}  {token['id']:>7}  {mark}  {shown}"
        text += " " * (room - width(shown)) + f"  {visible(token['text'])}"
        if token["trained"] and color:
            text = click.style(text, fg="green")
        yield text.rstrip()


def _columns() -> int:
    return max(40, min(MAX_COLUMNS, shutil.get_terminal_size((100, 24)).columns))
