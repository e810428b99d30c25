"""A stand-in of the Hugging Face hub: a folder of files as the data set ORG/NAME, and a cache."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


@contextmanager
def running_hub(
    name: str, files: dict[str, bytes], card: dict[str, object], token: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """Serve files; yield the address and a list of the requests. With `token`, only who has it."""
    requests: list[str] = []

    def entry(path: str) -> dict[str, object]:
        digest = hashlib.sha256(files[path]).hexdigest()
        size = len(files[path])
        lfs = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}
        return {"type": "file", "path": path, "rfilename": path, "size": size, "oid": digest[:40],
                "blobId": digest[:40], "lfs": lfs}  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            path = unquote(self.path.partition("?")[0])
            requests.append(f"{self.command} {path}")
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                self._send(401, b"{}", {"X-Error-Message": "Invalid credentials"})
            elif found := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path):
                self._file(found[1])
            elif re.fullmatch(rf"/api/datasets/{name}/(paths-info|tree)/.*", path):
                self._send(200, json.dumps([entry(each) for each in files]).encode())
            elif re.fullmatch(rf"/api/datasets/{name}(/revision/.+)?", path):
                about = {"id": name, "sha": COMMIT, "private": False, "tags": [], "cardData": card,
                         "downloads": 0, "siblings": [entry(each) for each in files]}  # fmt: skip
                self._send(200, json.dumps(about).encode())
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _file(self, path: str) -> None:
            data = files[path]
            digest = hashlib.sha256(data).hexdigest()
            headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                self._send(206, data[start:stop], headers)
            else:
                self._send(200, data, headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
