"""Writing the files of a distilled set: each gets an entry in the manifest, which comes last."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from pds_ray.store.storage import Folder
from pds_ray.store.streams import STREAM_BUFFER_BYTES

NUMBERS_AT_ONCE = 1 << 22  # of a tensor that is written

Files = dict[str, dict[str, Any]]
"""Name below the set -> its size in bytes and SHA-256."""


class Hashed(io.RawIOBase):
    """A binary stream that counts and hashes what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._digest = hashlib.sha256()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return self._stream.write(data)

    def entry(self) -> dict[str, Any]:
        """Return the manifest's entry of the file."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


@contextmanager
def written(target: Folder, name: str, files: Files) -> Iterator[Hashed]:
    """Open a stream into a file of the set, which is entered in `files` when the block ends."""
    with target.writer(name) as stream:
        hashed = Hashed(stream)
        yield hashed
    files[name] = hashed.entry()


def write(target: Folder, name: str, data: bytes, files: Files) -> None:
    """Write a file of the set and enter it in `files`."""
    with written(target, name, files) as stream:
        stream.write(data)


def write_tensors(
    target: Folder, name: str, tensors: Mapping[str, np.ndarray], files: Files
) -> None:
    """Write float32 arrays as a safetensors file of the set and enter it in `files`.

    The bytes are those of the library's `save`, which holds the file twice in memory.
    """
    header, end = {}, 0
    for key, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written(target, name, files) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            rows = np.ascontiguousarray(tensor, "<f4").reshape(-1)
            for start in range(0, len(rows), NUMBERS_AT_ONCE):
                stream.write(rows[start : start + NUMBERS_AT_ONCE].tobytes())


def copy(source: Folder, target: Folder, name: str, files: Files) -> None:
    """Copy a file of one set, which may be larger than the memory, into another.

    Raises FileNotFoundError if it is missing.
    """
    with source.reader(name) as original, written(target, name, files) as stream:
        shutil.copyfileobj(original, stream, STREAM_BUFFER_BYTES)
