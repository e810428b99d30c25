"""A web server with the files of a dict, and the faults of web servers."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class Web:
    """Files by their paths, and how the server fails."""

    files: dict[str, bytes] = field(default_factory=dict)
    signature: str = ""
    """Query parameter `sig` that every request needs."""
    ranges: bool = True
    head: bool = False
    """Without it HEAD is refused, as for signed addresses."""
    sized: bool = True
    """Without it answers are chunked, and no size is told."""
    cut_after: int | None = None
    """Bytes after which a transfer breaks off."""
    cuts: int = 10**9
    """Number of transfers that do."""
    too_long: int = 0
    """Bytes by which Content-Length is more than there are."""
    refusals: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the next answers."""
    redirects: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of every request."""
    busiest: int = 0
    """Highest number of concurrent requests."""


@contextmanager
def serving(web: Web) -> Iterator[str]:
    """Serve on a free port of this machine; yields the address, without a slash at its end."""
    lock, open_now = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            if not web.head:
                self._refuse(405, {})

        def do_GET(self) -> None:
            nonlocal open_now
            with lock:
                open_now += 1
                web.busiest = max(web.busiest, open_now)
            try:
                self._serve()
            finally:
                with lock:
                    open_now -= 1

        def _serve(self) -> None:
            url = urlsplit(self.path)
            web.requests.append(("GET", url.path, self.headers.get("Range", "")))
            time.sleep(web.delay_s)
            with lock:
                refusal = web.refusals.pop(0) if web.refusals else None
            if refusal:
                self._refuse(*refusal)
            elif url.path in web.redirects:
                self._refuse(302, {"Location": web.redirects[url.path]})
            elif web.signature and parse_qs(url.query).get("sig") != [web.signature]:
                self._refuse(403, {})
            elif url.path not in web.files:
                self._refuse(404, {})
            else:
                self._send(web.files[url.path])

        def _refuse(self, status: int, headers: dict[str, str]) -> None:
            body = b"<html>an error page</html>"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _send(self, data: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop, status = 0, len(data), 200
            if asked and web.ranges:
                start, status = int(asked[1]), 206
                stop = min(stop, int(asked[2]) + 1) if asked[2] else stop
                if start >= len(data):
                    self._refuse(416, {"Content-Range": f"bytes */{len(data) + web.too_long}"})
                    return
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            if status == 206:
                total = len(data) + web.too_long
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
            if web.sized:
                self.send_header("Content-Length", str(stop - start + web.too_long))
            else:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._send_body(data[start:stop])

        def _send_body(self, body: bytes) -> None:
            broken = web.cut_after is not None and len(body) > web.cut_after and web.cuts > 0
            if broken:
                web.cuts -= 1
                body = body[: web.cut_after]
            if web.sized:
                self.wfile.write(body)
            else:
                for at in range(0, len(body), 1000):
                    piece = body[at : at + 1000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if not broken:
                    self.wfile.write(b"0\r\n\r\n")
            if broken or web.too_long:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    with listening(Handler) as address:
        yield address


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of this machine; yields the address, without a slash at its end."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            """Ignore clients that hang up."""

    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def silent() -> Iterator[int]:
    """A server that accepts connections and never says a word; yields its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]  # the kernel accepts; nobody answers
