"""A hub on this machine that takes what `huggingface_hub` uploads."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 34


class Hub:
    """What the server has and has been asked for.

    Attributes:
        repositories: files by name, by the repository's name.
        visibility: that of the repositories that were created.
        refuse_commits: answer commits with 403.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.commits = 0
        self.refuse_commits = False
        self.address = ""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub that knows one user, ``ada``, and her organisation ``lovelace``."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, content: Any = None, **headers: str) -> None:
            body = json.dumps(content).encode() if content is not None else b""
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def known(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self.answer(401, {"error": "Invalid credentials"})
            return False

        def do_HEAD(self) -> None:
            owner, name, _, _, file = self.path.strip("/").split("/", 4)
            if file in hub.repositories.get(f"{owner}/{name}", {}):
                self.answer(200, X_Repo_Commit="c0", ETag='"e0"', X_Linked_Size="1")
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

        def do_GET(self) -> None:
            if self.known():
                self.answer(200, {"name": "ada", "orgs": [{"name": "lovelace"}], "type": "user"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.known():
                return
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, {})
                hub.visibility.setdefault(name, asked["visibility"])
                self.answer(status, {"url": f"{hub.address}/{name}"})
                return
            if self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
                return
            owner, name, action = self.path.removeprefix("/api/models/").split("/")[:3]
            if action == "preupload":
                files = json.loads(body)["files"]
                modes = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
                ]
                self.answer(200, {"files": modes})
            elif action != "commit":
                self.answer(404, {"error": f"no {self.path}"})
            elif hub.refuse_commits:
                self.answer(403, {"error": "the quota is used up"})
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
                hub.commits += 1
                commit = {"commitOid": "c1", "commitUrl": f"{hub.address}/{owner}/{name}/commit/c1"}
                self.answer(200, {**commit, "pullRequestUrl": None, "hookOutput": ""})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
