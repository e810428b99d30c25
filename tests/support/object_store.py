"""An S3 server (moto in its own process), and a proxy in front of it that fails as networks do."""

from __future__ import annotations

import http.client
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import boto3

BUCKET = "bucket"
KEY, SECRET = "AKIAPDSTESTKEY", "pds/Test+Secret0987654321"
START_TIMEOUT_S = 60


@contextmanager
def running_server() -> Iterator[int]:
    """moto's S3 on a free port of this machine, with an empty bucket; yields the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server did not start"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.05)
        client(port).create_bucket(Bucket=BUCKET)
        yield port
    finally:
        server.kill()
        server.wait()


def client(port: int) -> boto3.client:
    """The store as another library sees it."""
    return boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id=KEY, aws_secret_access_key=SECRET,
    )  # fmt: skip


def objects(port: int, prefix: str) -> dict[str, bytes]:
    """Returns every object below a prefix by its name there, without the markers of folders."""
    s3, found = client(port), {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/"):
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):
                found[entry["Key"][len(prefix) + 1 :]] = s3.get_object(
                    Bucket=BUCKET, Key=entry["Key"]
                )["Body"].read()
    return found


def uri(port: int, path: str, login: str = "") -> str:
    """The URI that pyarrow takes for a path in the bucket."""
    return f"s3://{login}{BUCKET}/{path}?endpoint_override=127.0.0.1:{port}&scheme=http"


@dataclass
class Faults:
    """Faults of the proxy: shares of the requests for objects that match the pattern `only`."""

    seed: int = 0
    only: str = ""
    errors: float = 0.0
    """Answered 500 or 503, without asking the server."""
    delayed: float = 0.0
    delay_s: float = 0.2
    cut_downloads: float = 0.0
    """The connection closes in the middle of the answer's body."""
    cut_uploads: float = 0.0
    """The connection closes in the middle of the request's body."""
    limit: int | None = None
    """Maximum number of errors and cuts."""
    struck: int = 0
    """Number of errors and cuts so far."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    busiest: int = 0
    """Highest number of concurrent requests."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self._open = 0

    @contextmanager
    def watching(self, method: str, path: str) -> Iterator[None]:
        with self._lock:
            self.requests.append((method, path))
            self._open += 1
            self.busiest = max(self.busiest, self._open)
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def strikes(self, share: float, path: str) -> bool:
        with self._lock:
            if self._random.random() >= share or not re.search(self.only, path):
                return False
            if self.limit is not None and self.struck >= self.limit:
                return False
            self.struck += 1
            return True

    def delays(self, path: str) -> bool:
        with self._lock:
            return self._random.random() < self.delayed and re.search(self.only, path) is not None


@contextmanager
def proxy(port: int, faults: Faults) -> Iterator[int]:
    """A proxy before the server at `port`; yields its own port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _watched(self) -> None:
            with faults.watching(self.command, self.path):
                self._serve()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _watched  # noqa: N815 - names that the base class asks for

        def _serve(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if faults.delays(path):
                time.sleep(faults.delay_s)
            length = int(self.headers.get("Content-Length") or 0)
            if self.command == "PUT" and faults.strikes(faults.cut_uploads, path):
                self.rfile.read(
                    int(self.headers.get("X-Amz-Decoded-Content-Length") or length) // 2
                )
                self._hang_up()
                return
            body = self.rfile.read(length) if length else self._chunks()
            if faults.strikes(faults.errors, path):
                self._refuse()
                return
            inner = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                inner.request(self.command, self.path, body, dict(self.headers.items()))
                answer = inner.getresponse()
                data, headers = answer.read(), answer.getheaders()
            finally:
                inner.close()
            if (
                self.command == "GET"
                and len(data) > 1
                and faults.strikes(faults.cut_downloads, path)
            ):
                self._answer(answer.status, headers, data, send=len(data) // 2)
                self._hang_up()
                return
            self._answer(answer.status, headers, data)

        def _chunks(self) -> bytes:
            """Returns the body of a chunked request in one piece: it is sent on with a length."""
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return b""
            del self.headers["Transfer-Encoding"]
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _refuse(self) -> None:
            status, code = random.Random(faults.struck).choice(
                [(500, "InternalError"), (503, "SlowDown")]
            )
            self._answer(
                status,
                [],
                f"<Error><Code>{code}</Code><Message>Please try again</Message></Error>".encode(),
            )

        def _answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, send: int | None = None
        ) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:send])

        def _hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Ignores clients that hang up."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
