"""Files of a web server, as a file system: read by their addresses, never listed, never written.

fsspec's own reads a file of unknown size only whole, and takes a transfer that was cut for its end.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import io
import math
import re
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import requests
import urllib3
from fsspec import AbstractFileSystem

from pds_ray.store.calls import CALLS_AT_ONCE, BusyError

CONNECT_S, SILENCE_S = 5.0, 10.0
"""Seconds for a connection, and between two bytes of an answer."""
MOST_REDIRECTS = 10
PIECE_BYTES = 1024**2
_GONE, _CLOSED, _BUSY = (404, 410), (401, 403, 407), (429, 503)


class HttpFileSystem(AbstractFileSystem):
    """The files below `root`, as `https://host/`.

    `query`, with its question mark, ends every address. It may be a signature, and is never shown.
    """

    protocol = ("http", "https")
    cachable = False

    def __init__(self, root: str, query: str = "") -> None:
        super().__init__()
        self._root = root
        self._query = query

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return size (None if the server does not tell it) and version of a file.

        It is asked for the first byte, as signed addresses take no HEAD. Raises OSError: of kind
        FileNotFoundError or PermissionError where the server says so.
        """
        with _ask(self._url(path), "bytes=0-0") as answer:
            return {
                "name": path, "type": "file", "size": _size(answer), "ETag": _version(answer)
            }  # fmt: skip

    def _open(self, path: str, mode: str = "rb", **_: Any) -> HttpFile:  # noqa: ARG002
        info = self.info(path)
        return HttpFile(self._url(path), info["size"], info["ETag"])

    def _url(self, path: str) -> str:
        return f"{self._root}{path}{self._query}"


class HttpFile(io.RawIOBase):
    """A file that is read forwards in one transfer; after a seek or an error another one begins."""

    def __init__(self, url: str, size: int | None, version: str | None) -> None:
        self._url = url
        self._size = size
        self._version = version
        self._position = 0
        self._answer: requests.Response | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte. Raises UnsupportedOperation from the end of a file of unknown size."""
        if whence == io.SEEK_END:
            if self._size is None:
                raise io.UnsupportedOperation("the server does not tell the size of the file")
            offset += self._size
        elif whence == io.SEEK_CUR:
            offset += self._position
        if offset != self._position:
            self._hang_up()
            self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes: as many as asked for, except at the end and where a transfer ends.

        Raises OSError if it ends before a byte arrives; the next read takes it up again.
        """
        left = math.inf if size is None or size < 0 else size
        if self._size is not None:
            left = min(left, self._size - self._position)
        pieces: list[bytes] = []
        try:
            while left > 0 and (piece := self._next(int(min(left, PIECE_BYTES)))):
                pieces.append(piece)
                left -= len(piece)
                self._position += len(piece)
        except OSError:
            if not pieces:  # what has arrived is not asked for again
                raise
        return b"".join(pieces)

    def _next(self, most: int) -> bytes:
        """Return some bytes, none at the end. Raises OSError, after which a new transfer begins."""
        try:
            if self._answer is None:
                self._answer = self._begin()
            with _errors():
                piece = self._answer.raw.read1(most)
            if not piece and self._size is not None:
                raise self._ended()
        except BaseException:
            self._hang_up()
            raise
        return piece

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _begin(self) -> requests.Response:
        """Ask for the rest of the file. Raises OSError if it is not there, or is another by now."""
        answer = _ask(self._url, f"bytes={self._position}-" if self._position else None)
        try:
            if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise self._ended()
            if _version(answer) != self._version:
                raise OSError("the file changed while it was read")
            if answer.status_code == HTTPStatus.OK:  # all of it: the server knows no ranges
                self._skip(answer)
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {self._position}-"):
                raise OSError(f"the server does not continue at byte {self._position}")
        except BaseException:
            answer.close()
            raise
        return answer

    def _ended(self) -> OSError:
        return OSError(f"the transfer ended after {self._position} of {self._size} bytes")

    def _skip(self, answer: requests.Response) -> None:
        left = self._position
        with _errors():
            while left and (data := answer.raw.read(min(left, PIECE_BYTES))):
                left -= len(data)
        if left:
            raise OSError(f"the transfer ended {left} bytes before the place where it was cut")


@functools.cache
def _session() -> requests.Session:
    """Return the connections of this process."""
    session = requests.Session()
    session.max_redirects = MOST_REDIRECTS
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=CALLS_AT_ONCE))
    return session


def _ask(url: str, byte_range: str | None) -> requests.Response:
    """Return an answer whose content has not been read. Raises OSError."""
    headers = {"Accept-Encoding": "identity", **({"Range": byte_range} if byte_range else {})}
    with _errors():
        answer = _session().get(url, headers=headers, stream=True, timeout=(CONNECT_S, SILENCE_S))
    status = answer.status_code
    if answer.ok or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return answer
    answer.close()
    said = f"HTTP status {status} {answer.reason or ''}".strip()
    if status in _GONE:
        raise FileNotFoundError(said)
    if status in _CLOSED:
        raise PermissionError(said)
    if status in _BUSY:
        raise BusyError(said, _retry_after_s(answer))
    raise OSError(said)


def _size(answer: requests.Response) -> int | None:
    """Return the size of the whole file, of which the answer holds a part or all."""
    total = re.search(r"/(\d+)$", answer.headers.get("Content-Range", ""))
    if total:
        return int(total[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status_code == HTTPStatus.OK and length.isdigit() else None


def _version(answer: requests.Response) -> str | None:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified")


def _retry_after_s(answer: requests.Response) -> float:
    value = answer.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn errors of the client into an OSError of a few words: theirs show the address."""
    try:
        yield
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise TimeoutError("no answer") from None
    except (requests.exceptions.SSLError, urllib3.exceptions.SSLError):
        raise OSError("its certificate is not valid for this machine") from None
    except requests.TooManyRedirects:
        raise OSError("HTTP status 310: it redirects in a circle") from None
    except requests.ConnectionError as error:
        raise OSError(_connection_error(error)) from None
    except requests.RequestException as error:
        raise OSError(f"it cannot be asked: {type(error).__name__}") from None
    except urllib3.exceptions.HTTPError as error:
        raise OSError(f"the transfer was cut: {type(error).__name__}") from None


def _connection_error(error: requests.ConnectionError) -> str:
    cause = getattr(error.args[0] if error.args else None, "reason", None)
    names = {
        urllib3.exceptions.NameResolutionError: "its name is not known",
        urllib3.exceptions.NewConnectionError: "the connection is refused",
        urllib3.exceptions.ProxyError: "the proxy does not answer",
    }
    return next((text for kind, text in names.items() if isinstance(cause, kind)), "no connection")
