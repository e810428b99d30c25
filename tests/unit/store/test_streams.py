"""Streams of objects against Python's own, which are the rule."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pds_ray.store.streams import open_stream

DATA = bytes(range(100))


@pytest.mark.parametrize("position", [0, 99, 100, 101, 2**40])
@pytest.mark.parametrize("size", [-1, 0, 1, 1000])
def test_reading_at_any_position(tmp_path: Path, position: int, size: int) -> None:
    (tmp_path / "x").write_bytes(DATA)
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    own = io.BytesIO(DATA)
    with open_stream(store, "x", "s3://b/x") as stream:
        assert stream.seek(position) == own.seek(position)
        assert stream.read(size) == own.read(size)
        assert stream.tell() == own.tell()
        assert stream.seek(0) == own.seek(0)
        assert stream.read() == own.read()
