"""A server that gives files out as huggingface.co does: one repository at one commit."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubFiles(ThreadingHTTPServer):
    """Stands in for the hub.

    Args:
        name: of its repository; of a dataset with ``datasets/`` in front.
        files: what the repository holds.

    Attributes:
        requests: paths that were asked for.
        sent: bytes of bodies that were sent.
    """

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name = name
        self.files = files
        self.requests: list[str] = []
        self.sent = 0

    @property
    def url(self) -> str:
        """Its address, for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_of(name: str, files: dict[str, bytes]) -> Iterator[HubFiles]:
    """Yields a server that runs until the end of the block."""
    server = HubFiles(name, files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubFiles

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(path)
        file = re.fullmatch(rf"/{self.server.name}/resolve/(?:{COMMIT}|main)/(.+)", path)
        content, headers = self.server.files.get(file[1]) if file else None, {}
        of_dataset = self.server.name.startswith("datasets/")
        api = f"/api/{self.server.name}" if of_dataset else f"/api/models/{self.server.name}"
        if path == api or path.startswith(f"{api}/"):
            content, headers = self._describe(path), {"Content-Type": "application/json"}
        elif content is not None:
            etag = hashlib.sha1(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        elif file is not None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        else:
            headers = {"X-Error-Code": "RepoNotFound"}
        self._send(content, headers, with_body=with_body)

    def _send(self, content: bytes | None, headers: dict[str, str], *, with_body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        status = 404 if content is None else 206 if asked else 200
        body = content or b""
        if asked:
            body = body[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
            self.server.sent += len(body)

    def _describe(self, path: str) -> bytes:
        files = self.server.files
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": name}
                for name in files
            ]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in files]
        name = self.server.name.removeprefix("datasets/")
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()

    def log_message(self, *_arguments: Any) -> None:
        """Keeps the tests quiet."""
