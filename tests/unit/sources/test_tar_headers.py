"""Headers of tars beyond a name and a size: large ones, and those of files with holes."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from pds_ray.sources.base import Fault, Sample
from pds_ray.sources.tar import MAX_HEADER_BYTES
from tests.support.hostile import (
    END_MARK,
    brief,
    header,
    member,
    memory,
    pax,
    read,
    read_bytes,
    sample,
)


def test_an_extension_header_that_is_too_large_costs_its_member_alone(tmp_path: Path) -> None:
    size = 64 * 1000**2
    paths = {}
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        paths[kind] = tmp_path / f"{kind!r}.tar"
        with paths[kind].open("wb") as file:
            file.write(sample("a") + header("././@LongLink", size, kind))
            file.seek(size, io.SEEK_CUR)  # a hole: no disk is used
            file.write(sample("b") + sample("c") + END_MARK)
    with memory(10 * 1000**2):
        found = {kind: read(path) for kind, path in paths.items()}
    assert brief(found.pop(tarfile.XGLTYPE)) == [("a", ""), ("b", ""), ("c", "")]
    for items in found.values():
        assert brief(items) == [("a", ""), ("b", "unsafe_member"), ("c", "")]
        assert f"at most {MAX_HEADER_BYTES:,}" in items[1].detail  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [70_000, MAX_HEADER_BYTES - 100])
def test_attributes_of_a_file_cost_nothing(tmp_path: Path, size: int) -> None:
    attributes = (b"LIBARCHIVE.xattr.com.apple.ResourceFork", b"x" * size)
    data = (
        sample("a")
        + pax(attributes, (b"path", b"b.jpg"))
        + member("x", b"B")
        + member("b.txt", b"b")
    )
    assert brief(read_bytes(tmp_path, data + END_MARK)) == [("a", ""), ("b", "")]


def is_gnu_tar() -> bool:
    done = subprocess.run(["tar", "--version"], capture_output=True, check=False)
    return b"GNU tar" in done.stdout


@pytest.mark.skipif(not is_gnu_tar(), reason="needs GNU tar")
@pytest.mark.parametrize(
    "form", ["gnu", "oldgnu", *(f"posix --sparse-version={version}" for version in (0.0, 0.1, 1.0))]
)
def test_files_with_holes_cost_themselves_alone(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for key in "abc":
        (folder / f"{key}.jpg").write_bytes(b"image")
        (folder / f"{key}.txt").write_text(f"caption {key}")
    for name in ("b.jpg", "c.npy"):  # the second is not looked at
        with (folder / name).open("wb") as file:
            for piece in range(40):  # more than a header has room for
                file.seek(piece << 16)
                file.write(b"x")
    if (folder / "b.jpg").stat().st_blocks > 1024:
        pytest.skip("this file system has no holes")
    command = f"tar --sparse --sort=name --format={form} -cf x.tar -C in ."
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    first, second, third = read(tmp_path / "x.tar")
    assert first == Sample("./a", b"image", ("caption a",))
    assert second == Fault("./b", "unsafe_member", "./b.jpg: a file with holes")
    assert third == Sample("./c", b"image", ("caption c",))
