"""A small stand-in of the Hugging Face hub: one data set, by the endpoints of HfFileSystem."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repository: str, files: dict[str, bytes], token: str = "") -> Iterator[str]:
    """Serve data set `repository` (ORG/NAME) with `files` by path; yields the endpoint.

    With a `token` the data set is private.
    """
    api, raw = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                self._json(401, {"error": "Invalid username or password."})
            elif path.startswith(f"{api}/tree/"):
                self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2])
            elif path == api or path.startswith(f"{api}/revision/"):
                self._json(200, {"id": repository, "sha": COMMIT, "siblings": [], "tags": []})
            elif path.startswith(raw):
                self._content(path.removeprefix(raw).partition("/")[2])
            else:
                self._json(404, {"error": "Repository not found"}, "RepoNotFound")

        def _tree(self, folder: str) -> None:
            prefix = f"{folder}/" if folder else ""
            inside = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
            if not inside:
                self._json(404, {"error": "Entry not found"}, "EntryNotFound")
                return
            entries: list[dict[str, Any]] = []
            for name in sorted({name.partition("/")[0] for name in inside}):
                path, oid = prefix + name, hashlib.sha1(files.get(prefix + name, b"")).hexdigest()
                kind = "file" if path in files else "directory"
                size = len(files.get(path, b""))
                entries.append({"type": kind, "oid": oid, "size": size, "path": path})
            self._json(200, entries)

        def _content(self, name: str) -> None:
            if name not in files:
                self._json(404, {"error": "Entry not found"}, "EntryNotFound")
                return
            first, _, last = self.headers.get("Range", "bytes=0-")[6:].partition("-")
            data = files[name][int(first) : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(files[name])}")
            self.end_headers()
            self.wfile.write(data)

        def _json(self, status: int, value: Any, code: str = "") -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
