"""A stand-in for the Hugging Face hub: what huggingface_hub asks of it to list a model repository and to download
files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """files: name in the repository -> file here. gated: listed for all, files for nobody. token: what a private one
    asks for.

    status: what it answers when it is broken.
    """

    files: dict[str, Path]
    gated: bool = False
    token: str | None = None
    status: int = 200


@dataclass
class Hub:
    """A server on 127.0.0.1. `requests` logs (method, path, Range header or None); `cut` ends the next bodies after so
    many bytes.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        hub = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        words = path.strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if is_api else words[:2])
        repository = self.hub.repositories.get(name)
        if repository is None or (
            repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}"
        ):
            return self._refuse(401, "RepoNotFound")  # the real hub does not tell a stranger which of the two it is
        if repository.status != 200:
            return self._refuse(repository.status, "")
        if is_api:
            siblings = [{"rfilename": file} for file in repository.files]
            data = json.dumps({"id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}).encode()
            return self._send(200, data, {"Content-Type": "application/json"}, body)
        if repository.gated:
            return self._refuse(403, "GatedRepo")
        file = repository.files.get("/".join(words[4:]))
        if words[2] != "resolve" or file is None:
            return self._refuse(404, "EntryNotFound")
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers, body)
        self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if self.hub.cut and status in (200, 206) and "X-Repo-Commit" in headers:
            self.wfile.write(data[: self.hub.cut.pop(0)])
            self.close_connection = True  # before Content-Length is reached
            return
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}, False)
