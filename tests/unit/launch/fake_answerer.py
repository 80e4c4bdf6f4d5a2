"""Stands in for ``python -m fsdpq.worker answer``: the same lines, and no model."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ANSWERED: set[str] = set()


def tell(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def answer(request: dict[str, Any], requests: Any) -> None:
    question = request["messages"][-1]["content"]
    number = request["id"]
    if question == "die":
        os.kill(os.getpid(), 9)
    if question == "refuse" or (question == "once" and question in ANSWERED):
        tell(event="refused", id=number, message="no", hint="ask another")
        return
    ANSWERED.add(question)
    pieces = ["as ", "before" if not request["trained"] else question]
    if question == "control":
        pieces = ["\x1b[2Jred\ttab", "\nline"]
    for piece in pieces:
        tell(event="text", id=number, text=piece)
    stop = "end"
    if question == "long":
        stop = json.loads(next(requests))["request"] + "ped"
    tell(
        event="done", id=number, answer="".join(pieces), stop=stop, num_tokens=2,
        num_prompt_tokens=len(request["messages"]), num_cached_tokens=1, prompt_s=0.5, seconds=1.0,
        tokens_per_s=2.0, dropped=2 if question == "drop" else 0,
    )  # fmt: skip


def main() -> None:
    mode = os.environ.get("FAKE_MODE", "")
    sys.stderr.write(f"noise {' '.join(sys.argv[1:])}\n")
    tell(event="load", done=0, total=4)
    if mode == "exit":
        raise SystemExit("no such model")
    if mode == "hang":
        time.sleep(600)
    tell(event="load", done=4, total=4)
    tell(
        event="ready", model="tiny", device="CPU", dtype="fp32", context=64, kept=1.0,
        asks=mode if mode == "single" else "conversation", format="alpaca" if mode else "messages",
        compares=mode != "one", notices=["know this"],
    )  # fmt: skip
    requests = iter(sys.stdin)
    for line in requests:
        answer(json.loads(line), requests)


if __name__ == "__main__":
    main()
