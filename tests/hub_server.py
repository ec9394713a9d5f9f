# SPDX-License-Identifier: Apache-2.0
"""A small stand-in of the Hugging Face Hub, over HTTP on this machine.

It answers what ``huggingface_hub`` asks to make a repository, commit a file and fetch one.
Repositories are kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"  # the one account: "me"


@dataclass
class Repository:
    """One repository: revision -> file -> content."""

    private: bool = False
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """All repositories, and every request that came (method, path, whether with a token)."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, bool]] = field(default_factory=list)
    endpoint: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        """Say nothing."""

    def _answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _known(self):
        given = self.headers.get("authorization", "")
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, bool(given)))
        return given == f"Bearer {TOKEN}", path

    def do_POST(self):
        known, path = self._known()
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if not known:
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in self.hub.repositories
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories.setdefault(name, Repository(bool(private)))
            url = f"{self.hub.endpoint}/{name}"
            self._answer(409 if there else 200, {"url": url, "name": name})
        else:
            owner, name, what, revision = path.removeprefix("/api/models/").split("/", 3)
            found = self.hub.repositories[f"{owner}/{name}"]
            if what == "preupload":
                asked = json.loads(body)["files"]
                modes = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in asked
                ]
                self._answer(200, {"files": modes})
                return
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    found.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    found.files.setdefault(revision, {})[entry["value"]["path"]] = content
            commit = f"{len(found.messages):040d}"
            url = f"{self.hub.endpoint}/{owner}/{name}/commit/{commit}"
            self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def do_GET(self):
        known, path = self._known()
        parts = path.strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            self._answer(404)
            return
        found = self.hub.repositories.get("/".join(parts[:2]))
        if found is None or (found.private and not known):
            self._answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return
        files = found.files.get(parts[3])
        if files is None:
            self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
            return
        content = files.get("/".join(parts[4:]))
        if content is None:
            self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="no entry")
            return
        oid = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        commit = hashlib.sha1(parts[3].encode(), usedforsecurity=False).hexdigest()
        self._answer(
            200,
            content,
            ETag=f'"{oid}"',
            X_Repo_Commit=commit,
            Content_Length=str(len(content)),
        )

    do_HEAD = do_GET  # noqa: N815  (the base class calls it so)


@contextmanager
def running():
    """Serve an empty Hub while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
