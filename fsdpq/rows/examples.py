"""Rows of every format to show and to try: an example for people, made-up rows for smoke runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "messages": (
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
        ),
        "prompt_completion": '{"prompt": "...", "completion": "..."}',
        "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
        "guanaco": '{"text": "### Human: ...### Assistant: ..."}',
        "qna": '{"question": "...", "context": "...", "answer": "..."}',
        "qna_no_ctx": '{"question": "...", "answer": "..."}',
        "text": '{"text": "..."}',
        "input_output": '{"segments": [{"label": false, "text": "..."}, {"label": true, ...}]}',
        "dummy": "nothing: it is made up",
        "auto": "like one of the formats of `fsdpq kinds data`",
    }
)
"""How a row of a format reads."""


def made_up_rows(format_name: str, count: int) -> list[dict[str, Any]]:
    """Returns ``count`` different small rows of a format, to try a recipe without its data.

    ``dummy`` has no rows to read: its list is empty.
    """
    return [_made_up_row(format_name, index) for index in range(count) if format_name != "dummy"]


def _made_up_row(format_name: str, index: int) -> dict[str, Any]:
    question, answer = f"What is {index} plus {index + 1}?", f"It is {2 * index + 1}."
    rows: dict[str, dict[str, Any]] = {
        "messages": {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        },
        "prompt_completion": {"prompt": question, "completion": answer},
        "alpaca": {
            "instruction": "Add the numbers.",
            "input": f"{index} and {index + 1}" if index % 2 else "",
            "output": answer,
        },
        "guanaco": {"text": f"### Human: {question}### Assistant: {answer}"},
        "qna": {"question": question, "context": "Whole numbers.", "answer": answer},
        "qna_no_ctx": {"question": question, "answer": answer},
        "text": {"text": f"{question} {answer}"},
        "input_output": {
            "segments": [{"label": False, "text": question}, {"label": True, "text": f" {answer}"}]
        },
    }
    return rows[format_name]
