"""The words of ``fsdpq data inspect``, which the terminal and the page share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Content = Mapping[str, Any]

HEADINGS = {
    "bad_row": "not of the format",
    "unrenderable": "cannot be rendered",
    "over_limit": "too long",
    "cut": "cut",
    "too_long": "left out: too long",
    "untrained": "left out: nothing to train",
    "empty": "empty fields",
    "roles": "order of roles",
    "duplicate": "duplicates",
    "held_out_duplicate": "held-out rows in training",
    "special_tokens": "special tokens in text",
    "unknown_tokens": "unknown text",
}
"""Kind of finding -> its heading."""

_REPEATS = ("duplicate", "held_out_duplicate")
"""Kinds whose details are the rows that they repeat."""

_ALWAYS = ("read", "bad", "cut", "duplicates", "to train on", "their tokens", "that carry loss")


@dataclass(frozen=True)
class Count:
    """One counted thing.

    Attributes:
        name: what is counted.
        count: how many.
        whole: of how many, None where that says nothing.
        text: what else there is to say.
    """

    name: str
    count: int
    whole: int | None = None
    text: str = ""

    @property
    def share(self) -> str:
        """The part of the whole, empty without one."""
        return f"{self.count / self.whole:.1%}" if self.whole else ""


def list_counts(content: Content) -> list[Count]:
    """Returns the counts that are worth a line: those of nothing only where one looks for them."""
    counts, talks, held_out = content["counts"], content["conversations"], content["held_out"]
    rows = counts["rows"]
    left_out = counts["unrenderable"] + counts["too_long"] + counts["untrained"]
    own_eval = any(source["use"] == "evaluation" for source in content["sources"])
    prompts = f"{talks['distinct_system_prompts']:,} different"
    listed = [
        Count("read", rows),
        Count("bad", counts["bad_rows"], rows, "not of their format"),
        Count("left out", left_out, rows, "cannot be rendered, too long, or nothing to train"),
        Count(
            "cut",
            counts["cut"],
            content["lengths"]["rows"],
            f"at data.seq_len={content['data']['seq_len']}",
        ),
        Count("empty fields", counts["empty"], rows),
        Count("roles out of order", counts["role_mistakes"], rows),
        Count("duplicates", counts["duplicates"], rows, "of an earlier row"),
        Count("special tokens", counts["special_tokens"], rows, "written out in their text"),
        Count("unknown text", counts["unknown_tokens"], rows, "outside of the vocabulary"),
        Count("system prompts", counts["system_prompts"], rows, prompts),
        Count("held out", held_out["rows"], None if own_eval else rows, "for evaluation"),
        Count("held out and trained", held_out["in_training"], held_out["rows"], "the same text"),
        Count("to train on", counts["usable"], rows, "before any are held out"),
        Count("their tokens", counts["kept_tokens"]),
        Count("that carry loss", counts["kept_trained_tokens"], counts["kept_tokens"]),
    ]
    if talks["max_turns"] > 1:
        turns = f"answers; {talks['mean_turns']:.1f} on average"
        listed.append(Count("longest conversation", talks["max_turns"], None, turns))
    return [entry for entry in listed if entry.count or entry.name in _ALWAYS]


def describe_source(source: Content) -> str:
    """Returns what was read of a source, in a line."""
    counts = source["counts"]
    files = source["files"]
    several = f" of {len(files)} files" if len(files) > 1 else ""
    why = f" ({source['format_why']})" if source["format_why"] else ""
    bad = f", {counts['bad_rows']:,} of them bad" if counts["bad_rows"] else ""
    weight = ""
    if source["weight"] is not None:
        weight = f", weight {source['weight']:g}: {source['epoch_rows']:,} rows an epoch"
    return f"{counts['rows']:,} rows{several}, format {source['format']}{why}{bad}{weight}"


def describe_reading(content: Content) -> Iterator[str]:
    """Yields how rows become text, and how many were looked at where it is not all of them."""
    template = content["model"]["template"]
    yield f"rendered by {'the chat template: ' + template if template else 'plain text'}"
    if content["data"]["streaming"]:
        window = content["data"]["stream_window"]
        yield f"`data.streaming` is on: only the first window of {window:,} rows was read"


def describe_limit(lengths: Content) -> str:
    """Returns what ``data.seq_len`` cuts, and what would cut little."""
    limit = lengths["limit"]
    return (
        f"{limit['longer_rows']:,} rows ({limit['longer_share']:.1%}) are longer than "
        f"{limit['seq_len']:,} tokens; data.seq_len={limit['keeps']} would keep "
        f"{limit['kept_share']:.0%} whole"
    )


def describe_packing(content: Content) -> Iterator[str]:
    """Yields what packing makes of the rows, and what is computed for nothing without it."""
    packing, data = content["packing"], content["data"]
    wording = "are packed into" if data["packing"] != "none" else "would be packed into"
    yield (
        f"{packing['rows']:,} rows {wording} {packing['sequences']:,} sequences of "
        f"{data['seq_len']:,} tokens, {packing['fill']:.1%} filled, "
        f"{packing['rows_per_sequence']:.1f} rows each"
    )
    yield f"without packing {packing['padding_share']:.1%} of what is computed is padding"


def bin_label(entry: Content) -> str:
    """Returns the lengths of one bar of the histogram."""
    if entry["high"] is None:
        return f"{entry['low']:,} and more"
    last = entry["high"] - 1
    return f"{entry['low']:,}" if last == entry["low"] else f"{entry['low']:,} - {last:,}"


def name_places(finding: Content) -> str:
    """Returns where the first rows of a finding are: a file once, then its rows."""
    examples: Sequence[Content] = finding["examples"]
    by_file: dict[str, list[str]] = {}
    for example in examples:
        row, line = example["row"], example["line"]
        where = f"row {row}" if line in (0, row) else f"row {row} (line {line})"
        if finding["kind"] in _REPEATS:
            where += f" = {example['detail']}"
        by_file.setdefault(Path(example["file"]).name, []).append(where)
    text = "; ".join(f"{name}: {', '.join(where)}" for name, where in by_file.items())
    return text + (", ..." if finding["count"] > len(examples) else "")


def describe_sample(sample: Content) -> str:
    """Returns which row a sample is, and its size."""
    place, kept = sample["place"], sample.get("num_kept", sample["num_tokens"])
    cut = f"; cut to {kept:,}" if kept < sample["num_tokens"] else ""
    return (
        f"{Path(place['file']).name}, row {place['row']}: {sample['num_tokens']:,} tokens, "
        f"{sample['num_trained']:,} trained{cut}"
    )
