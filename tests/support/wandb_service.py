"""A stand-in for the service of Weights & Biases: as much of it as one run without files asks for.

It keeps the lines of history that the client sends, and tells a resumed run what it has of them.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40
"""A key of the right shape."""


class WandbService:
    """What the service knows of its only run.

    Attributes:
        history: every row, as sent.
        config: of the run, wandb's own entries included.
        variables: of the last request to make or change the run.
        keys: by which requests said who they are.
        exit_codes: of every start that has ended.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.variables: dict[str, Any] = {}
        self.keys: set[str] = set()
        self.exit_codes: list[int] = []

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Returns the data for a GraphQL request."""
        if "RunResumeStatus" in query:
            return {"model": self._resume_status()}
        if "UpsertBucket" in query:
            self.variables |= {name: value for name, value in variables.items() if value}
            self.config |= json.loads(variables.get("config") or "{}")
            return {"upsertBucket": {"bucket": self._bucket(), "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": "/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        return {}

    def take_stream(self, body: dict[str, Any]) -> None:
        """Takes lines of files; an offset says where they go."""
        part = body.get("files", {}).get("wandb-history.jsonl")
        if part is not None:
            self.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
        if body.get("complete"):
            self.exit_codes.append(body["exitcode"])

    def _bucket(self) -> dict[str, Any]:
        project = {
            "id": "p",
            "name": self.variables["project"],
            "entity": {"id": "e", "name": "me"},
        }
        return {"id": "x", "name": self.variables["name"], "project": project}

    def _resume_status(self) -> dict[str, Any] | None:
        if not self.history:
            return None
        tail = json.dumps([json.dumps(self.history[-1])])
        bucket = self._bucket() | {
            "summaryMetrics": json.dumps(self.history[-1]), "historyTail": tail, "eventsTail": "[]",
            "historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0,
            "config": json.dumps(self.config), "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}


@contextmanager
def wandb_service() -> Iterator[tuple[str, WandbService]]:
    """Runs the service on a free port; yields its address and what it knows."""
    service = WandbService()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            service.keys.add(self.headers.get("Authorization", ""))
            content = json.loads(body)
            if self.path == "/graphql":
                self._reply(
                    {"data": service.answer(content["query"], content.get("variables") or {})}
                )
            else:
                service.take_stream(content)
                self._reply({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._reply({})

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", service
        finally:
            server.shutdown()
            thread.join()
