"""A stand-in of the Hugging Face hub: the endpoints that publishing a data set calls."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInToken0123456789"
LARGE_SUFFIXES = (".parquet", ".tar", ".png", ".safetensors")


@dataclass
class Hub:
    """What the stand-in holds, and what was asked of it."""

    url: str = ""
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Data set -> branch -> name -> content."""
    private: dict[str, bool] = field(default_factory=dict)
    large: bool = False
    """True if files with LARGE_SUFFIXES take the way of Git LFS, as they do on the hub."""
    refuses: int = 0
    """Status with which every commit is answered."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded by Git LFS, by its SHA-256."""
    commits: list[list[str]] = field(default_factory=list)
    """Names that each commit added or deleted (-name)."""

    def create(self, name: str, private: bool = False, **files: bytes) -> None:
        self.branches[name] = {"main": files}
        self.private[name] = private

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files, changed = dict(self.branches[name][branch]), []
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "deletedFile":
                del files[path]
                changed.append(f"-{path}")
                continue
            large = line["key"] == "lfsFile"
            content = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
            files[path] = content
            changed.append(path)
        self.branches[name][branch] = files
        self.commits.append(changed)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yield a stand-in that listens on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == self.command:
                    if not path.startswith("/object/") and not self._has_token():
                        self.answer(401, {"error": "Invalid credentials"})
                    else:
                        answer(self, hub, body, **found.groupdict())
                    return
            self.answer(404, {"error": f"{self.command} {path}"})

        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - names that the base class asks for

        def _has_token(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def answer(self, status: int, value: Any, **headers: str) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response_only(status)
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _whoami(handler: Any, _hub: Hub, _body: bytes) -> None:
    handler.answer(200, {"type": "user", "name": "me", "orgs": []})


def _info(handler: Any, hub: Hub, _body: bytes, name: str, branch: str | None) -> None:
    if name not in hub.branches:
        handler.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
    elif (branch or "main") not in hub.branches[name]:
        handler.answer(404, {"error": "not found"}, X_Error_Code="RevisionNotFound")
    else:
        siblings = [{"rfilename": path} for path in hub.branches[name][branch or "main"]]
        about = {"_id": "0", "id": name, "sha": "0" * 40, "private": hub.private[name]}
        handler.answer(200, {**about, "siblings": siblings})


def _create(handler: Any, hub: Hub, body: bytes) -> None:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    assert asked["type"] == "dataset"
    there = name in hub.branches
    if not there:
        hub.create(name, asked.get("visibility") == "private")
    handler.answer(409 if there else 200, {"url": f"{hub.url}/datasets/{name}", "name": name})


def _branch(handler: Any, hub: Hub, _body: bytes, name: str, branch: str) -> None:
    there = branch in hub.branches[name]
    if not there:
        hub.branches[name][branch] = dict(hub.branches[name]["main"])
    handler.answer(409 if there else 200, {})


def _preupload(handler: Any, hub: Hub, body: bytes, **_: str) -> None:
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs"
            if hub.large and file["path"].endswith(LARGE_SUFFIXES)
            else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(body)["files"]
    ]
    handler.answer(200, {"files": files})


def _batch(handler: Any, hub: Hub, body: bytes, **_: str) -> None:
    objects = [
        {**each, "actions": {"upload": {"href": f"{hub.url}/object/{each['oid']}"}}}
        for each in json.loads(body)["objects"]
    ]
    handler.answer(200, {"transfer": "basic", "objects": objects})


def _upload(handler: Any, hub: Hub, body: bytes, oid: str) -> None:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    handler.answer(200, {})


def _commit(handler: Any, hub: Hub, body: bytes, name: str, branch: str) -> None:
    if hub.refuses:
        handler.answer(hub.refuses, {"error": "you may not"})
        return
    hub.commit(name, branch, [json.loads(line) for line in body.splitlines()])
    url = f"{hub.url}/datasets/{name}/commit/0"
    handler.answer(200, {"commitUrl": url, "commitOid": "0" * 40})


def _file(handler: Any, hub: Hub, _body: bytes, name: str, branch: str, path: str) -> None:
    content = hub.branches[name][branch][path]
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    handler.answer(200, content, ETag=etag, X_Repo_Commit="0" * 40)


_SET = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _whoami),
    ("GET", rf"/api/datasets/{_SET}(?:/revision/(?P<branch>[\w.-]+))?", _info),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", lambda handler, *_: handler.answer(200, {"warnings": []})),
    ("POST", rf"/api/datasets/{_SET}/branch/(?P<branch>[\w.-]+)", _branch),
    ("POST", rf"/api/datasets/{_SET}/preupload/[\w.-]+", _preupload),
    ("POST", rf"/api/datasets/{_SET}/commit/(?P<branch>[\w.-]+)", _commit),
    ("POST", rf"/datasets/{_SET}\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/object/(?P<oid>\w+)", _upload),
    *(
        (method, rf"/datasets/{_SET}/resolve/(?P<branch>[\w.-]+)/(?P<path>.+)", _file)
        for method in ("GET", "HEAD")
    ),
]
"""Method, pattern of the path, function that answers."""
