"""Shards made to do harm: the cost of each, and that none writes, runs or hoards anything."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.modalities.text import MAX_CAPTIONS
from pds_ray.sources import unpack
from pds_ray.sources.base import REASONS, Fault, Sample, Shard, SourceError
from pds_ray.sources.karpathy import KarpathySource
from pds_ray.sources.samples import MAX_NAME
from pds_ray.sources.unpack import EXPANSION_FREE, MAX_EXPANSION
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.stages import embed
from tests.fuzz import targets
from tests.fuzz.targets import check_outcomes
from tests.support.hostile import (
    END_MARK,
    GOOD,
    JSON,
    MIB,
    SHARDS,
    brief,
    header,
    long_name,
    member,
    memory,
    pax,
    read,
    read_bytes,
    sample,
)
from tests.support.strategies import any_json, any_tar, good_tars, mangled, packings

BEFORE, AFTER = sample("before"), sample("after")

# ---- nothing is written, nothing is run ----------------------------------------------------------

GUARDED = """
import os, sys
from pds_ray.sources.base import Shard
from pds_ray.sources.webdataset import WebDatasetSource

HARMFUL = (
    "os.", "subprocess.", "shutil.", "socket.", "pickle.", "marshal.", "ctypes.",
    "exec", "compile", "import",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
seen = []

def guard(event, args):
    if event == "open" and watching and args[2] & WRITES:
        seen.append(("write", str(args[0])))
    if watching and event.startswith(HARMFUL) and event not in ("os.listdir", "os.scandir"):
        seen.append((event, repr(args)[:200]))

def read(path):
    return [type(item).__name__ for item in WebDatasetSource(path).read(Shard("x", path))]

watching = False
sys.addaudithook(guard)
read(sys.argv[1])  # whatever is imported late
watching = True
for path in sys.argv[2:]:
    read(path)
assert not seen, seen
os.unlink(sys.argv[1])
open(sys.argv[1], "w").close()
assert [event for event, _ in seen] == ["os.remove", "write"], seen  # the guard does see
watching = False
print(len(sys.argv[2:]), "read")
"""


def test_nothing_outside_is_written_and_nothing_is_run(tmp_path: Path) -> None:
    # Audited by the interpreter itself: every file opened for writing, every process, import and
    # unpickling.
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    paths = []
    for number, data in enumerate([BEFORE + AFTER, *SHARDS.values()]):
        paths.append(str(folder / f"{number:03d}.tar"))
        Path(paths[-1]).write_bytes(data + END_MARK)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, *paths],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == f"{len(SHARDS)} read\n"
    before[Path(paths[0])] = b""  # what the guard was tried on
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if not path.is_dir()} == before
    assert not any(Path("/tmp").glob("escaped*"))


# ---- what each costs -----------------------------------------------------------------------------

COSTS = {  # reasons of the faults; "cut" if what lies behind it is lost
    "parent": ["unsafe_member"],
    "parent within": ["unsafe_member"],
    "absolute": ["unsafe_member"],
    "drive": ["unsafe_member"],
    "pax path": ["unsafe_member"],
    "long name": ["unsafe_member"],
    "symbolic link": ["unsafe_member"],
    "link to a folder, then through it": ["unsafe_member"],
    "hard link": ["unsafe_member"],
    "character device": ["unsafe_member"],
    "block device": ["unsafe_member"],
    "fifo": ["unsafe_member"],
    "unknown type": ["unsafe_member"],
    "sparse": ["unsafe_member"],
    "sparse, more to come": ["unsafe_member"],
    "pax sparse": ["unsafe_member"],
    "name of 60,000 characters": ["unsafe_member"],
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_itself_alone(tmp_path: Path, name: str) -> None:
    found = read_bytes(tmp_path, BEFORE + SHARDS[name] + AFTER + END_MARK)
    assert [item.reason for item in found if isinstance(item, Fault)] == COSTS[name]
    assert {"before", "after"} <= {item.key for item in found if isinstance(item, Sample)}


@pytest.mark.parametrize("name", SHARDS)
def test_what_came_before_is_kept_and_memory_is_bounded(tmp_path: Path, name: str) -> None:
    with memory(4 * MIB):
        found = read_bytes(tmp_path, BEFORE + SHARDS[name] + AFTER + END_MARK)
    assert brief(found)[0] == ("before", "")
    assert all(item.reason in REASONS for item in found if isinstance(item, Fault))
    assert len({item.key for item in found if isinstance(item, Sample)}) == sum(
        isinstance(i, Sample) for i in found
    )


def test_names_of_strangers_come_through_as_they_are(tmp_path: Path) -> None:
    found = read_bytes(
        tmp_path, SHARDS["line breaks and escapes"] + SHARDS["names that are formulas"] + END_MARK
    )
    assert [item.key for item in found] == [
        "bad\n\r\x1b]0;title\x07\x1b[2J\u202egpj\u2028",
        "=cmd|'/c calc'!A0",
        "@SUM(1)",
        '",",\n',
    ]


@pytest.mark.long
def test_long_names_are_cut_and_many_do_not_add_up(tmp_path: Path) -> None:
    with open(tmp_path / "x.tar", "wb") as file:
        for number in range(5_000):
            file.write(long_name(b"%05d" % number + b"n" * 4000 + b".jpg") + member("x", b"p"))
        file.write(END_MARK)
    kept = 0
    with memory(4 * MIB):  # the names alone have 20 MB
        for item in WebDatasetSource("x").read(Shard("x", str(tmp_path / "x.tar"))):
            kept += (
                isinstance(item, Fault)
                and item.reason == "missing_caption"
                and len(item.key) <= MAX_NAME
            )
    assert kept == 5_000


@pytest.mark.long
def test_pax_headers_of_many_records(tmp_path: Path) -> None:
    records = pax(*[(b"a", b"")] * 12_000)
    assert brief(read_bytes(tmp_path, records * 100 + GOOD + END_MARK)) == [("good", "")]


# ---- what expands --------------------------------------------------------------------------------


def packed(path: Path, start: bytes, zeros: int, end: bytes = END_MARK) -> None:
    """A gzip file of `start`, so many zeros, and `end`."""
    packer = zlib.compressobj(9, wbits=31)
    with open(path, "wb") as file:
        file.write(packer.compress(start))
        for _ in range(zeros // MIB):
            file.write(packer.compress(bytes(MIB)))
        file.write(packer.compress(end) + packer.flush())


@pytest.mark.parametrize("name", ["bad.jpg", "bad.bin"])
def test_a_compressed_shard_that_expands_is_cut(tmp_path: Path, name: str) -> None:
    # 256 MB of zeros in 256 KB, declared as a terabyte.
    packed(tmp_path / "x.tar.gz", BEFORE + header(name, 1 << 40), 1 << 28)
    with memory(8 * MIB):
        found = read(tmp_path / "x.tar.gz")
    assert brief(found)[0] == ("before", "")
    assert isinstance(found[-1], Fault)
    assert found[-1].reason == "truncated_shard"
    assert found[-1].detail == f"expands to more than {MAX_EXPANSION} times its compressed size"


def test_the_work_on_a_compressed_shard_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = 0
    whole = gzip.GzipFile.read

    def counted(self: gzip.GzipFile, size: int = -1) -> bytes:
        nonlocal given
        data = whole(self, size)
        given += len(data)
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    path = tmp_path / "x.tar.gz"
    packed(path, header("bad.bin", 1 << 40), 1 << 28)
    read(path)
    assert given <= max(EXPANSION_FREE, MAX_EXPANSION * path.stat().st_size) + MIB < 1 << 27


def test_a_shard_that_compresses_well_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below EXPANSION_FREE anything goes, beyond it what a tar of small samples reaches.
    monkeypatch.setattr(unpack, "EXPANSION_FREE", 2 * MIB)
    packed(tmp_path / "x.tar.gz", BEFORE + header("zeros", MIB), MIB, AFTER + END_MARK)
    assert brief(read(tmp_path / "x.tar.gz")) == [("before", ""), ("after", "")]
    samples = b"".join(sample(f"{n:06d}", b"%d" % n * 3, b"caption %d" % n) for n in range(1_100))
    assert len(samples) > unpack.EXPANSION_FREE
    with gzip.open(tmp_path / "y.tar.gz", "wb", compresslevel=6) as file:
        file.write(samples + END_MARK)
    assert len(samples) > 15 * (tmp_path / "y.tar.gz").stat().st_size
    assert len(read(tmp_path / "y.tar.gz")) == 1_100


def test_gzip_in_gzip_is_no_tar(tmp_path: Path) -> None:
    (fault,) = read_bytes(tmp_path, SHARDS["gzip in gzip"])
    assert (fault.key, fault.reason) == ("", "not_a_tar")  # type: ignore[union-attr]


# ---- JSON and captions ---------------------------------------------------------------------------

FIRST = dict.fromkeys(
    ("huge exponent", "many keys", "one key many times", "not numbers", "utf-16", "python"), ("x",)
)
FIRST |= {
    "lone surrogates": ("?x", "? ??"),
    "lists of lists": ("x",),
    "long caption": ("x" * 1_000_000,),
    "utf-32 with surrogates": ("?",),
}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path: Path, name: str) -> None:
    data = member("bad.jpg", b"p") + member("bad.json", JSON[name])
    with memory(64 * MIB):
        before, bad, after = read_bytes(tmp_path, BEFORE + data + AFTER + END_MARK)
    assert (before.key, after.key) == ("before", "after")
    if name == "many captions":
        assert isinstance(bad, Sample)
        assert bad.captions == tuple(f"{n:x}" for n in range(MAX_CAPTIONS))  # the first ones count
    elif name in FIRST:
        assert isinstance(bad, Sample)
        assert bad.captions == FIRST[name]
    else:
        assert isinstance(bad, Fault)
        assert bad.reason == "missing_caption"


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_caption_of_100_megabytes_is_not_read(tmp_path: Path, suffix: str) -> None:
    size = 100 * 1000**2
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(BEFORE + member("bad.jpg", b"p") + header(f"bad.{suffix}", size))
        file.seek(size + -size % 512, io.SEEK_CUR)  # a hole: no disk is used
        file.write(AFTER + END_MARK)
    with memory(4 * MIB):
        found = read(tmp_path / "x.tar")
    assert brief(found) == [("before", ""), ("bad", "member_too_large"), ("after", "")]


def test_samples_of_many_captions_make_small_blocks() -> None:
    class Source:
        uri, validation = "many", None

        def shards(self) -> list[Shard]:
            return []

        def read(self, shard: Shard) -> Iterator[Sample | Fault]:  # noqa: ARG002
            for number in range(40):
                yield Sample(str(number), b"", tuple(map(str, range(MAX_CAPTIONS))))

    blocks = list(embed.read_blocks(Source(), Shard("x", "x")))
    assert sum(block.num_rows for block in blocks) == 41
    held = [
        sum(len(captions or ()) for captions in block.column("captions").to_pylist())
        for block in blocks
    ]
    assert sum(held) == 40 * MAX_CAPTIONS
    assert max(held) < embed.BLOCK_CAPTIONS + MAX_CAPTIONS


@pytest.mark.long
def test_annotations_that_expand_are_refused(tmp_path: Path) -> None:
    packed(tmp_path / "flickr30k_train.json.gz", b"", 257 * MIB, b"")
    with memory(600 * MIB), pytest.raises(SourceError, match="holds more than 268435456 bytes"):
        KarpathySource(f"flickr30k:{tmp_path}").shards()


def test_annotations_with_many_captions(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"p")
    rows = [{"image": "a.jpg", "caption": [str(n) for n in range(MAX_CAPTIONS + 5)]}]
    (tmp_path / "flickr30k_train.json").write_text(json.dumps(rows))
    source = KarpathySource(f"flickr30k:{tmp_path}")
    (item,) = source.read(source.shards()[0])
    assert isinstance(item, Sample)
    assert item.captions == tuple(str(n) for n in range(MAX_CAPTIONS))


# ---- whatever the bytes are ----------------------------------------------------------------------


@given(mangled(any_tar.map(BEFORE.__add__), start=len(BEFORE)), packings)
def test_any_tar_is_read_to_samples_and_faults(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, pack: Callable[[bytes], bytes]
) -> None:
    found = read_bytes(tmp_path_factory.getbasetemp(), pack(data))
    samples = [item for item in found if isinstance(item, Sample)]
    assert samples[0] == Sample("before", b"image", ("a caption",))
    check_outcomes(found)
    assert len(found) <= len(data) // 512 + 1


@settings(max_examples=66)
@given(mangled(any_tar), packings)
def test_any_bytes_are_read_without_an_error(data: bytes, pack: Callable[[bytes], bytes]) -> None:
    targets.tar(pack(data))


@settings(max_examples=50)
@given(mangled(good_tars().map(gzip.compress)))
def test_flipped_bytes_of_a_compressed_shard_are_read_without_an_error(data: bytes) -> None:
    targets.tar(data)


@settings(max_examples=33)
@given(
    st.lists(
        st.sampled_from([key for key, cost in COSTS.items() if key != "pax path"]), max_size=5
    ),
    st.data(),
)
def test_good_samples_before_a_cut_are_all_there(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    pieces, ends = b"", []
    for number, name in enumerate(names):
        pieces += sample(f"good{number}") + SHARDS[name]
        ends.append(len(pieces) - len(SHARDS[name]))
    cut = data.draw(st.integers(0, len(pieces)))
    found = read_bytes(tmp_path_factory.getbasetemp(), pieces[:cut])
    whole = [f"good{number}" for number, end in enumerate(ends) if end <= cut]
    assert [item.key for item in found if isinstance(item, Sample) and item.key.startswith("good")][
        : len(whole)
    ] == whole


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value that is neither list nor object, with its path, such as [].caption."""
    if isinstance(value, list):
        for item in value:
            yield from leaves(item, f"{path}[]")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}")
    else:
        yield path, value


USUAL_PATH = re.compile(r"\.captions?(\[\])?")
CAPTION_PATH = re.compile(r"(\[\])?(\.captions?(\[\])?){0,2}")


@settings(max_examples=100)
@given(any_json)
def test_any_json_gives_captions_that_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    data = member("a.jpg", b"p") + member("a.json", json.dumps(value).encode()) + END_MARK
    (item,) = read_bytes(tmp_path_factory.getbasetemp(), data)
    # by another reading: all strings, by where they stand
    usual, others = (
        {
            leaf.encode("utf-8", "replace").decode().strip()
            for path, leaf in leaves(value)
            if isinstance(leaf, str) and place.fullmatch(path)
        }
        - {""}
        for place in (USUAL_PATH, CAPTION_PATH)
    )
    expected = usual or others
    if expected:
        assert isinstance(item, Sample)
        assert {caption.strip() for caption in item.captions} == expected
        assert len(item.captions) == len(expected)
    else:
        assert isinstance(item, Fault)
        assert item.reason == "missing_caption"
        assert item.detail.encode("utf-8")
