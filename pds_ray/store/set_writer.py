"""Writing the files of a distilled set: each gets an entry in the manifest, which comes last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from pds_ray.store.storage import Folder
from pds_ray.store.streams import STREAM_BUFFER_BYTES, Hashed
from pds_ray.store.tensors import Tensor

Files = dict[str, dict[str, Any]]
"""Name below the set -> its size in bytes and SHA-256."""


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


def write_tensors(target: Folder, name: str, tensors: Mapping[str, Tensor], files: Files) -> None:
    """Write float32 arrays as a safetensors file of the set and enter it in `files`.

    The bytes are those of the library's `save`, which holds the file twice in memory. Raises
    ValueError, and writes nothing, if an array's parts do not have the bytes that its shape says.
    """
    header, end = {}, 0
    for key, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written(target, name, files) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in sorted(tensors.items()):
            left = tensor.nbytes
            for rows in tensor.parts:
                data = np.ascontiguousarray(rows, "<f4").tobytes()
                stream.write(data)
                left -= len(data)
            if left:
                raise ValueError(f"{key}: {tensor.nbytes - left} bytes of {tensor.nbytes} found")


def copy(source: Folder, target: Folder, name: str, files: Files) -> None:
    """Copy a file of one set, which may be larger than the memory, into another.

    Raises FileNotFoundError if it is missing.
    """
    with source.reader(name) as original, written(target, name, files) as stream:
        shutil.copyfileobj(original, stream, STREAM_BUFFER_BYTES)
