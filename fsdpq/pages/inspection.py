"""The page of ``fsdpq data inspect --html``: the same numbers as on the terminal, to pass on."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from fsdpq.pages.environment import page_environment
from fsdpq.pages.inspection_words import (
    HEADINGS,
    bin_label,
    describe_limit,
    describe_packing,
    describe_reading,
    describe_sample,
    describe_source,
    list_counts,
    name_places,
)

TEMPLATE = "inspection.html.jinja"
MAX_SHOWN_TOKENS = 2000

Content = Mapping[str, Any]


def render_inspection_page(content: Content) -> str:
    """Returns the page of an inspection, one file that loads nothing and runs nothing.

    Rows are untrusted: their text is escaped, and what cannot be seen of it is named.
    """
    filters: dict[str, Callable[[Any], str]] = {
        "count": "{:,}".format,
        "visible": visible_text,
        "sample": describe_sample,
        "places": name_places,
        "source": describe_source,
    }
    environment = page_environment(filters=filters)
    lengths = content["lengths"]
    return environment.get_template(TEMPLATE).render(
        **content,
        headings=HEADINGS,
        listed=list_counts(content),
        reading=list(describe_reading(content)),
        bars=_bars(lengths),
        limit_position=_limit_position(lengths),
        limit_text=describe_limit(lengths) if lengths["limit"] else "",
        packing_texts=list(describe_packing(content)) if content["packing"]["rows"] else [],
        shown_tokens=content["row"]["tokens"][:MAX_SHOWN_TOKENS] if content["row"] else [],
    )


def visible_text(text: str) -> str:
    """Returns ``text`` with controls, direction marks and the like named; lines and tabs stay.

    Joiners stay too: Persian, Indic scripts and emoji need them.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t\u200c\u200d\u3000" else _name(c) for c in text
    )


def _name(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    name = unicodedata.name(character, "")
    return f"⟨U+{code:04X}{' ' + name if name else ''}⟩"


def _bars(lengths: Content) -> list[dict[str, Any]]:
    """Returns the bars of the histogram, in percent of the plot."""
    bins = lengths["histogram"]
    most = max((entry["rows"] for entry in bins), default=1)
    width = 100 / max(1, len(bins))
    return [
        {
            "x": index * width,
            "width": width,
            "height": 100 * entry["rows"] / most,
            "label": bin_label(entry),
            "low": f"{entry['low']:,}",
            "rows": entry["rows"],
            "beyond": entry["low"] >= lengths["limit"]["seq_len"],
        }
        for index, entry in enumerate(bins)
    ]


def _limit_position(lengths: Content) -> float | None:
    """Returns where ``data.seq_len`` is among the bars, in percent; None where it is beyond."""
    bins = lengths["histogram"]
    for index, entry in enumerate(bins):
        if entry["low"] >= lengths["limit"]["seq_len"]:
            return 100 * index / len(bins)
        high = entry["high"]
        if high is not None and entry["low"] < lengths["limit"]["seq_len"] < high:
            inside = (lengths["limit"]["seq_len"] - entry["low"]) / (high - entry["low"])
            return 100 * (index + inside) / len(bins)
    return None
