"""The file system of an address: pyarrow's, a web server's, or any that fsspec knows."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from typing import Any
from urllib.parse import parse_qsl, unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from pds_ray.errors import first_line, is_utf8
from pds_ray.store.calls import StorageError, is_remote, with_retries

ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
WEB_SCHEMES = ("http", "https")
S3_LIMITS: dict[str, Any] = {
    "connect_timeout": 5,
    "request_timeout": 10,  # without a byte
    "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=2),
}
"""By default the client asks a server that says nothing for minutes."""
GCS_RETRY_S = 10
VERSIONS = ("blob_id", "ETag", "etag", "content_md5", "md5", "mtime", "last_modified",
            "LastModified", "modify", "modificationTime", "created")  # fmt: skip
"""Names under which fsspec's file systems tell what changes with the content of a file."""


def local_path(path: str) -> str:
    """Return the absolute path of a local path, in which `~` is a home folder, or a file:// URL.

    Raises StorageError in one line if a URL names another host, or the path is not UTF-8.
    """
    if path.startswith("file://"):
        host, slash, rest = path.removeprefix("file://").partition("/")
        if slash and host not in ("", "localhost"):
            raise StorageError(
                f"{path} names the host {host}; a file of this one is file:///PATH, or its path"
            )
        path = slash + unquote(rest, errors="surrogateescape") if slash else host
    path = os.path.abspath(os.path.expanduser(path))
    if not is_utf8(path):
        raise StorageError(f"the name of {path!r} is not UTF-8; rename it")
    return path


def split_address(address: str) -> tuple[str, str, str]:
    """Split an address: root (`/` or `s3://bucket/`), path below it, and `?settings` or ""."""
    if not is_remote(address):
        return "/", address.lstrip("/"), ""
    place, question, settings = address.partition("?")
    scheme, _, rest = place.partition("://")
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}/", path, question + settings


def open_filesystem(address: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a path or URI, and the path inside it, taken to the letter.

    Only the root goes through the parsing of URIs, which would refuse or decode spaces, `%` and
    other odd names. Raises StorageError if the scheme is unknown or the store cannot be set up.
    """
    if not is_remote(address):
        return pafs.LocalFileSystem(), local_path(address)
    root, path, settings = split_address(address)
    filesystem, base = _open_root(root, settings)
    return filesystem, f"{base.rstrip('/')}/{path}".removesuffix("/") if base else path


@functools.lru_cache(maxsize=64)  # setting up a store can cost a round trip, as for its region
def _open_root(root: str, settings: str) -> tuple[pafs.FileSystem, str]:
    scheme = root.partition(":")[0]
    if scheme in WEB_SCHEMES:
        from pds_ray.store.http import HttpFileSystem

        return pafs.PyFileSystem(_Handler(HttpFileSystem(root, settings))), ""
    open_root = _open_arrow if scheme in ARROW_SCHEMES else _open_fsspec
    try:
        return with_retries(lambda: open_root(root, settings), root)
    except (pa.ArrowInvalid, ImportError, TypeError, ValueError) as error:
        # from None: the cause shows the URI with its secrets
        raise StorageError(f"cannot open {root}: {first_line(error)}") from None


def _open_arrow(root: str, settings: str) -> tuple[pafs.FileSystem, str]:
    if root.startswith(("gs://", "gcs://")) and "retry_limit_seconds" not in settings:
        settings = f"{settings or '?'}&retry_limit_seconds={GCS_RETRY_S}".replace("?&", "?")
    filesystem, base = pafs.FileSystem.from_uri(root + settings)
    if isinstance(filesystem, pafs.S3FileSystem):
        # the URI has no settings for these; all others are what it says
        options = filesystem.__reduce__()[1][0]
        filesystem = pafs.S3FileSystem(**{**options, **S3_LIMITS})
    return filesystem, base


def _open_fsspec(root: str, settings: str) -> tuple[pafs.FileSystem, str]:
    options = dict(parse_qsl(settings.removeprefix("?")))
    filesystem, base = fsspec.core.url_to_fs(root, **options)
    return pafs.PyFileSystem(_Handler(_OnlyOSErrors(filesystem))), base


class _OnlyOSErrors:
    """An object of fsspec that raises OSError where its client raises errors of its own."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = found(*args, **kwargs)
            except OSError:
                raise
            except (ValueError, NotImplementedError) as error:  # no other try changes these
                raise StorageError(first_line(error)) from error
            except Exception as error:
                raise OSError(first_line(error)) from error
            return _File(result) if name == "open" else result

        return call


class _File(_OnlyOSErrors):
    """A file of fsspec; once a write fails, nothing of it is completed.

    The close of fsspec's own would upload the rest, and publish an object that lacks a piece.
    """

    def write(self, data: Any) -> int:
        try:
            return self.__getattr__("write")(data)
        except BaseException:
            with contextlib.suppress(Exception):  # some files have nothing to discard
                self._inner.discard()
            with contextlib.suppress(AttributeError):  # nor is this theirs to be set
                self._inner.closed = True
            raise


class _Handler(pafs.FSSpecHandler):
    """A file system of fsspec as pyarrow's.

    pyarrow's own handler takes a file system that fails for one that lacks the file, and lists what
    it remembers.
    """

    @staticmethod
    def _create_file_info(path: str, info: dict[str, Any]) -> pafs.FileInfo:
        kinds = {"file": pafs.FileType.File, "directory": pafs.FileType.Directory}
        kind = kinds.get(info["type"], pafs.FileType.Unknown)
        size = info["size"] if kind == pafs.FileType.File else None
        return pafs.FileInfo(path, kind, size=size, mtime_ns=_version(info))

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        for path in paths:
            self.fs.invalidate_cache(path)
        return super().get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        base = selector.base_dir
        self.fs.invalidate_cache(base)
        try:
            if selector.recursive:
                found = self.fs.find(base, withdirs=True, detail=True).values()
            else:
                found = self.fs.ls(base, detail=True)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        infos = [self._create_file_info(info["name"], info) for info in found]
        if any(info.path.strip("/") == base.strip("/") and info.is_file for info in infos):
            raise NotADirectoryError(base)
        return [info for info in infos if info.path.strip("/") != base.strip("/")]

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb"), mode="r")

    open_input_stream = open_input_file

    def move(self, src: str, dest: str) -> None:
        self.fs.mv(src, dest)  # pyarrow's own passes an option that some do not know

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        try:
            return super().open_output_stream(path, metadata)
        except FileNotFoundError:  # a store that has folders wants them made
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            return super().open_output_stream(path, metadata)


def _version(info: dict[str, Any]) -> int | None:
    """Return a number that changes with the content of a file.

    It stands in place of a time, as FileInfo has no version; many stores tell a hash and no time.
    """
    known = [info[name] for name in VERSIONS if info.get(name)]
    if not known:
        return None
    return int.from_bytes(hashlib.blake2b(repr(known[0]).encode(), digest_size=7).digest())
