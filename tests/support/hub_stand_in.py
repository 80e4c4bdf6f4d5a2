"""A server that takes uploads as huggingface.co does: repositories, branches, LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecret"
COMMIT = "c" * 40


@dataclass
class Repository:
    """What the server keeps of a repository."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": dict[str, bytes]()}
    )


class HubStandIn(ThreadingHTTPServer):
    """Stands in for the hub, for the one user ``me``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """Its address, for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Yields a server that runs until the end of the block."""
    server = HubStandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

    def do_GET(self) -> None:
        if self._may_come_in():
            self._get(self.path.partition("?")[0])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._may_come_in():
            self._post(self.path.partition("?")[0], body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._answer(200, {})

    def _may_come_in(self) -> bool:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _get(self, path: str) -> None:
        name = path.removeprefix("/api/models/")
        repository = self.server.repositories.get(name)
        if path == "/api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user"})
        elif repository is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            found = {"id": name, "private": repository.private, "sha": COMMIT, "siblings": []}
            self._answer(200, found)

    def _post(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer(200, {"objects": self._places(json.loads(body)["objects"])})
        else:
            name, verb, revision = path.removeprefix("/api/models/").rsplit("/", 2)
            branches = self.server.repositories[name].branches
            if verb == "branch":
                branches[revision] = {}
                self._answer(200, {})
            elif verb == "preupload":
                files = [self._mode(each) for each in json.loads(body)["files"]]
                self._answer(200, {"files": files})
            else:
                branches[revision] |= self._committed(body)
                url = f"{self.server.url}/{name}/commit/{COMMIT}"
                self._answer(200, {"commitUrl": url, "commitOid": COMMIT})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            self._answer(403, {"error": "You don't have the rights to create here"})
        elif name in self.server.repositories:
            there = {"error": "You already created this repo", "url": f"{self.server.url}/{name}"}
            self._answer(409, there)
        else:
            self.server.repositories[name] = Repository(asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self.server.url}/{name}"})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _places(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        url = f"{self.server.url}/objects"
        return [
            {**each, "actions": {"upload": {"href": f"{url}/{each['oid']}"}}} for each in objects
        ]

    def _committed(self, body: bytes) -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
        return files

    def _answer(self, status: int, found: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(found).encode()
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        """Keeps the tests quiet."""
