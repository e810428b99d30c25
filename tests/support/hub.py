"""A stand-in of the Hugging Face hub: its endpoints that reading and publishing data sets call."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.web_server import listening

TOKEN = "hf_standInToken0123456789"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_SUFFIXES = (".parquet", ".tar", ".png", ".safetensors")


@dataclass
class Hub:
    """The content of the stand-in, and the requests to it."""

    url: str = ""
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Data set -> branch -> name -> content."""
    private: dict[str, bool] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Data set -> what its card declares."""
    large: bool = False
    """True if files with LARGE_SUFFIXES take the way of Git LFS, as they do on the hub."""
    refuses: int = 0
    """Status with which every commit is answered."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Uploads by Git LFS, by their SHA-256."""
    commits: list[list[str]] = field(default_factory=list)
    """Names that each commit added or deleted (-name)."""
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""

    def create(self, name: str, private: bool = False, **files: bytes) -> None:
        self.branches[name] = {"main": files}
        self.private[name] = private

    def files(self, name: str, revision: str | None) -> dict[str, bytes]:
        """Return the files of a branch, of the main one for COMMIT."""
        return self.branches[name]["main" if revision in (None, COMMIT) else revision]

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
    """Yield a stand-in that listens on a port of this machine and knows those who have TOKEN."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not path.startswith("/object/") and not self._has_token():
                self.answer(401, {"error": "Invalid credentials"})
                return
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == self.command:
                    self._call(answer, body, found.groupdict())
                    return
            self.answer(404, {"error": f"{self.command} {path}"}, X_Error_Code="RepoNotFound")

        # names that the base class asks for
        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

        def _has_token(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def _call(self, answer: Any, body: bytes, names: dict[str, str | None]) -> None:
            """Answer, once the data set is known to be there."""
            name, revision = names.get("name"), names.get("revision")
            branches = hub.branches.get(name or "", {})
            if name and not branches:
                self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
            elif revision not in (None, COMMIT, *branches):
                self.answer(404, {"error": "not found"}, X_Error_Code="RevisionNotFound")
            else:
                answer(self, hub, body, **names)

        def answer(self, status: int, value: Any, **headers: str) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response_only(status)
            for name, text in {"X_Repo_Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    with listening(Handler) as hub.url:
        yield hub


def cache(root: Path, name: str, files: dict[str, bytes]) -> None:
    """Write files as the hub's client keeps those of a data set."""
    folder = root / f"datasets--{name.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for path, data in files.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = folder / "snapshots" / COMMIT / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


# ---- reading -------------------------------------------------------------------------------------


def _whoami(handler: Any, _hub: Hub, _body: bytes) -> None:
    handler.answer(200, {"type": "user", "name": "me", "orgs": []})


def _info(handler: Any, hub: Hub, _body: bytes, name: str, revision: str | None) -> None:
    files = hub.files(name, revision)
    about = {"_id": "0", "id": name, "sha": COMMIT, "private": hub.private[name], "tags": []}
    about |= {"downloads": 0, "cardData": hub.cards.get(name, {})}
    handler.answer(200, {**about, "siblings": [_entry(path, files[path]) for path in files]})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    size = len(content)
    lfs = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}
    return {"type": "file", "path": path, "rfilename": path, "size": size, "oid": digest[:40],
            "blobId": digest[:40], "lfs": lfs}  # fmt: skip


def _tree(
    handler: Any, hub: Hub, _body: bytes, name: str, revision: str, folder: str | None
) -> None:
    files, prefix = hub.files(name, revision), f"{folder}/" if folder else ""
    inside = sorted(path for path in files if path.startswith(prefix))
    nearest = dict.fromkeys(prefix + path[len(prefix) :].partition("/")[0] for path in inside)
    entries = [
        _entry(path, files[path])
        if path in files
        else {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        for path in nearest
    ]
    if entries:
        handler.answer(200, entries)
    else:
        handler.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")


def _paths(handler: Any, hub: Hub, _body: bytes, name: str, revision: str) -> None:
    files = hub.files(name, revision)
    handler.answer(200, [_entry(path, files[path]) for path in files])


def _file(handler: Any, hub: Hub, _body: bytes, name: str, revision: str, path: str) -> None:
    content = hub.files(name, revision).get(path)
    if content is None:
        handler.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return
    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept_Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if not wanted:
        handler.answer(200, content, **headers)
        return
    start = int(wanted[1])
    part = content[start : int(wanted[2]) + 1 if wanted[2] else None]
    headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    handler.answer(206, part, **headers)


# ---- publishing ----------------------------------------------------------------------------------


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


def _commit(handler: Any, hub: Hub, body: bytes, name: str, revision: str) -> None:
    if hub.refuses:
        handler.answer(hub.refuses, {"error": "you may not"})
        return
    hub.commit(name, revision, [json.loads(line) for line in body.splitlines()])
    url = f"{hub.url}/datasets/{name}/commit/0"
    handler.answer(200, {"commitUrl": url, "commitOid": COMMIT})


_SET, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _whoami),
    ("GET", rf"/api/datasets/{_SET}(?:/revision/{_REVISION})?", _info),
    ("GET", rf"/api/datasets/{_SET}/tree/{_REVISION}(?:/(?P<folder>.*))?", _tree),
    ("POST", rf"/api/datasets/{_SET}/paths-info/{_REVISION}", _paths),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", lambda handler, *_: handler.answer(200, {"warnings": []})),
    ("POST", rf"/api/datasets/{_SET}/branch/(?P<branch>[\w.-]+)", _branch),
    ("POST", rf"/api/datasets/{_SET}/preupload/[\w.-]+", _preupload),
    ("POST", rf"/api/datasets/{_SET}/commit/{_REVISION}", _commit),
    ("POST", rf"/datasets/{_SET}\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/object/(?P<oid>\w+)", _upload),
    *(
        (method, rf"/datasets/{_SET}/resolve/{_REVISION}/(?P<path>.+)", _file)
        for method in ("GET", "HEAD")
    ),
]
"""Method, pattern of the path, function that answers."""
