"""Dialogues from YAML: text as written, whole, once, alternating roles."""

from __future__ import annotations

import json

from fsdpq.fetch.chatterbot import convert_chatterbot

FIRST = """\
categories:
- things
conversations:
- - When did it start?
  - 1984
- - Is it on?
  - yes
- - Hello
  - Hi
  - How are you?
  - Fine
  - A turn without an answer
- - No answer
- A row that is one text? - '22'
- - Empty
  - ''
"""
SECOND = """\
conversations:
- - When  did it start?
  - '1984'
- - Code?
  - |
    a
      b
"""


def convert(tmp_path):
    (tmp_path / "a.yml").write_text(FIRST)
    (tmp_path / "b.yml").write_text(SECOND)
    target = tmp_path / "data.jsonl"
    num_rows = convert_chatterbot([tmp_path / "a.yml", tmp_path / "b.yml"], target)
    return num_rows, [json.loads(line)["messages"] for line in target.read_text().splitlines()]


def test_dialogues_are_whole_unique_and_in_order(tmp_path):
    num_rows, rows = convert(tmp_path)
    assert num_rows == len(rows) == 4
    texts = [[message["content"] for message in row] for row in rows]
    assert texts == [
        ["When did it start?", "1984"],
        ["Is it on?", "yes"],
        ["Hello", "Hi", "How are you?", "Fine"],
        ["Code?", "a\n  b"],
    ]


def test_roles_alternate_and_end_with_the_assistant(tmp_path):
    _, rows = convert(tmp_path)
    for row in rows:
        roles = [message["role"] for message in row]
        assert roles == ["user", "assistant"] * (len(row) // 2)
