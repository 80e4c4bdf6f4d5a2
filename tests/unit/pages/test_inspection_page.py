"""The page of an inspection: complete, self-contained, and deaf to what rows say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fsdpq.pages.inspection import render_inspection_page, visible_text

CONTENT = Path(__file__).parents[2] / "cli" / "inspection" / "content.json"
HOSTILE = "</div><script>alert('x')</script><img src=http://evil.example/x.png onerror=x> {{ 7*7 }}"


class Tags(HTMLParser):
    """Collects tags, their attributes and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def content() -> dict[str, Any]:
    return json.loads(CONTENT.read_text(encoding="utf-8"))


def test_page_shows_the_numbers_of_the_content(content: dict[str, Any]) -> None:
    text = re.sub(r"\s+", " ", Tags(render_inspection_page(content)).text)
    counts = content["counts"]
    for number in ("rows", "usable", "tokens", "kept_tokens", "kept_trained_tokens"):
        assert f"{counts[number]:,}" in text, number
    for finding in content["findings"]:
        assert finding["text"] in text
    for note in content["notes"]:
        assert note in text
    for sample in content["samples"]:
        assert f"row {sample['place']['row']}:" in text


def test_bars_are_as_high_as_their_rows(content: dict[str, Any]) -> None:
    tags = Tags(render_inspection_page(content))
    heights = [float(attrs["height"] or 0) for tag, attrs in tags.found if tag == "rect"]
    rows = [entry["rows"] for entry in content["lengths"]["histogram"]]
    assert heights == [pytest.approx(100 * count / max(rows), abs=1e-3) for count in rows]


def test_trained_text_is_marked(content: dict[str, Any]) -> None:
    page = render_inspection_page(content)
    trained = re.findall(r'<span class="trained(?: special)?">([^<]*)</span>', page)
    expected = [s["text"] for sample in content["samples"] for s in sample["segments"]
                if s["trained"]]  # fmt: skip
    assert [text.replace("&lt;", "<").replace("&gt;", ">") for text in trained[1:]] == expected


def test_page_loads_and_runs_nothing_whatever_rows_say(content: dict[str, Any]) -> None:
    hostile = _replace_texts(content, HOSTILE)
    hostile["row"] = {
        "place": {"source": 0, "file": HOSTILE, "row": 1, "line": 1}, "mistake": "",
        "content": HOSTILE, "num_tokens": 1, "num_trained": 1,
        "segments": [{"text": HOSTILE, "trained": True, "special": False}],
        "tokens": [{"position": 0, "id": 1, "token": HOSTILE, "text": HOSTILE, "trained": True,
                    "special": False}],
    }  # fmt: skip
    page = render_inspection_page(hostile)
    tags = Tags(page)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    for tag, attrs in tags.found:
        assert not {name for name in attrs if name.startswith("on")} | {"src", "href"} & set(attrs)
        assert "evil" not in str(attrs.values()), tag
    assert HOSTILE in tags.text
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page


def test_invisible_characters_are_named() -> None:
    assert visible_text("a\u202eb\x1b[2Jc\td\n") == "a⟨U+202E RIGHT-TO-LEFT OVERRIDE⟩b␛[2Jc\td\n"


def test_empty_inspection_is_a_page_too(content: dict[str, Any]) -> None:
    content |= {"findings": [], "samples": [], "notes": []}
    content["packing"] = {"rows": 0, "sequences": None, "fill": None, "padding_share": None}
    content["lengths"] = {"rows": 0, "mean": 0.0, "quantiles": {}, "histogram": [], "limit": None}
    content["counts"] = dict.fromkeys(content["counts"], 0)
    assert "rows to train on" in Tags(render_inspection_page(content)).text


def _replace_texts(content: dict[str, Any], text: str) -> dict[str, Any]:
    """Returns the content with ``text`` in everything that comes from rows or files."""
    changed = json.loads(json.dumps(content))
    for source in changed["sources"]:
        source |= {"name": text, "files": [text], "format_why": text}
    for finding in changed["findings"]:
        finding["text"] = text
        for example in finding["examples"]:
            example |= {"file": text, "detail": text}
    for sample in changed["samples"]:
        sample["place"]["file"] = text
        for segment in sample["segments"]:
            segment["text"] = text
    changed["notes"] = [text]
    changed["model"] |= {"name_or_path": text, "template": text}
    return changed
