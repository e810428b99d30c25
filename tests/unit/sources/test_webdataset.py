"""Tar shards: what is found, what is read, and what each kind of damage costs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from pds_ray.distributed.embed_workers import TABLES
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.sources.base import Fault, MissingShardsError, Sample, SourceError
from pds_ray.sources.captions import IMAGE_SUFFIXES
from pds_ray.sources.shard_patterns import shard_names
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store import calls, filesystems
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.fuzz.targets import check_outcomes
from tests.support.hostile import (
    END_MARK,
    block,
    brief,
    header,
    memory,
    read,
    read_bytes,
    tar_bytes,
)
from tests.support.strategies import good_tars

Member = tuple[str, bytes]


# ---- real shards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"train-0000{n}" for n in range(5)] + ["val-00000", "test-00000"])
def test_good_shards_read_as_the_webdataset_library_reads_them(
    shared_data: Path, name: str
) -> None:
    path = shared_data / "clipart" / f"{name}.tar"
    (shard,) = WebDatasetSource(str(path)).shards()
    assert (shard.name, shard.size) == (name, path.stat().st_size)
    ours = list(WebDatasetSource(str(path)).read(shard))
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert len(ours) > 200
    assert len(ours) == len(theirs)
    for sample, reference in zip(ours, theirs, strict=True):
        assert isinstance(sample, Sample)
        assert (sample.key, sample.image) == (reference["__key__"], reference["jpg"])
        # In this data set the first of `captions` is the .txt.
        assert list(sample.captions) == json.loads(reference["json"])["captions"]
        assert sample.captions[0] == reference["txt"].decode()


def read_broken(shared_data: Path, name: str) -> list[Sample | Fault]:
    (shard,) = WebDatasetSource(str(shared_data / "clipart" / "broken" / name)).shards()
    return list(WebDatasetSource("unused").read(shard))


def keys(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"{number:09d}", "") for number in range(first, last + 1)]


def test_broken_truncated(shared_data: Path) -> None:
    found = read_broken(shared_data, "truncated.tar")
    assert brief(found) == [*keys(0, 19), ("000000020", "truncated_shard")]
    whole = WebDatasetSource(str(shared_data / "clipart" / "train-00000.tar"))
    assert found[:20] == [
        sample for sample, _ in zip(whole.read(whole.shards()[0]), range(20), strict=False)
    ]


def test_broken_empty_and_not_a_tar(shared_data: Path) -> None:
    assert brief(read_broken(shared_data, "empty.tar")) == []
    assert brief(read_broken(shared_data, "not-a-tar.tar")) == [("", "not_a_tar")]


def decoded(item: Sample | Fault) -> tuple[str, str]:
    """Key and what becomes of the sample in the end: a reason, or its image's size."""
    if isinstance(item, Fault):
        return item.key, item.reason
    try:
        return item.key, "{} x {}".format(*decode_image(item.image).size)
    except ImageError as error:
        return item.key, error.reason


def test_broken_bomb(shared_data: Path) -> None:
    found = dict(map(decoded, read_broken(shared_data, "bomb.tar")))
    assert list(found) == ["000000140", "000000141", "900000201", "000000142"]
    assert found.pop("900000201") == "image_too_large"
    assert all(" x " in outcome for outcome in found.values())


CORRUPT = {  # EXPECTED.md row -> outcome; sizes as in the .json members
    "900000001": "undecodable_image",
    "900000002": "undecodable_image",
    "900000003": "undecodable_image",
    "900000004": "256 x 256",
    "900000005": "113 x 154",
    "900000006": "256 x 256",
    "900000007": "256 x 256",
    "900000008": "186 x 256",
    "900000009": "image_too_small",
    "900000010": "4000 x 2",
    "900000011": "254 x 256",
    "900000012": "177 x 150",
    "900000013": "191 x 256",
    "900000014": "256 x 171",
    "900000015": "256 x 65",
    "900000016": "219 x 256",
    "000000043": "duplicate_key",
    "../evil": "unsafe_member",
    "900000099": "unsafe_member",
}


def test_broken_corrupt_images(shared_data: Path) -> None:
    expected_md = (shared_data / "clipart" / "broken" / "EXPECTED.md").read_text()
    rows = re.findall(
        r"^\| `([\d./a-z]+)` \|", expected_md.partition("## corrupt-images.tar")[2], re.MULTILINE
    )
    assert [row.removesuffix(".jpg") for row in rows] == list(CORRUPT)

    found = read_broken(shared_data, "corrupt-images.tar")
    assert brief(found)[:30] == keys(40, 69)
    assert dict(map(decoded, found[30:])) == CORRUPT
    assert len(found) == 30 + len(CORRUPT)  # each costs exactly one sample
    assert all(" x " in decoded(item)[1] for item in found[:30])

    captions = {item.key: item.captions for item in found if isinstance(item, Sample)}
    assert captions["900000011"]  # from the .json, as the .txt is missing
    assert captions["900000012"]  # the .txt is empty
    assert not any(
        "�" in caption for caption in captions["900000013"]
    )  # the .txt is Latin-1, the .json is good
    assert max(map(len, captions["900000014"])) == 20_000
    assert len(captions["900000016"]) == 1  # from the .txt, as the .json is invalid


# ---- captions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("txt", "record", "captions"),
    [
        (b"a dog", None, ("a dog",)),
        (None, {"caption": "a dog"}, ("a dog",)),
        (None, {"captions": ["one", "two"]}, ("one", "two")),
        (b"txt\n", {"captions": ["one", "txt"], "caption": "two"}, ("txt\n", "one", "two")),
        (b" \n", {"caption": "json"}, ("json",)),
        (b"caf\xe9", {"caption": "coffee"}, ("coffee",)),
        (b"caf\xe9", {"caption": " "}, ("café",)),
        (b"caf\xe9", None, ("café",)),
        (b"\xef\xbb\xbfwith a mark", None, ("with a mark",)),
        (b"good", b"{broken", ("good",)),
        (b"good", b"[" * 500_000, ("good",)),
        (b"good", b"9" * 100_000, ("good",)),
        (b"good", [1, 2], ("good",)),
        (None, {"captions": ["ok", 3, None, {"x": 1}], "caption": 4}, ("ok",)),
        (None, b'{"caption": "lone \\ud800"}', ("lone ?",)),
    ],
)
def test_captions(
    tmp_path: Path, txt: bytes | None, record: Any, captions: tuple[str, ...]
) -> None:
    members = [("a.jpg", b"image")]
    if txt is not None:
        members.append(("a.txt", txt))
    if record is not None:
        members.append(
            ("a.json", record if isinstance(record, bytes) else json.dumps(record).encode())
        )
    assert read_bytes(tmp_path, tar_bytes(members)) == [Sample("a", b"image", captions)]


@pytest.mark.parametrize(
    "member", [None, ("a.txt", b""), ("a.json", b"{}"), ("a.json", b"[" * 500_000)]
)
def test_missing_caption_costs_one_sample(tmp_path: Path, member: Member | None) -> None:
    members = [("a.jpg", b"A"), *([member] if member else []), ("b.jpg", b"B"), ("b.txt", b"b")]
    assert brief(read_bytes(tmp_path, tar_bytes(members))) == [("a", "missing_caption"), ("b", "")]


# ---- members and keys ----------------------------------------------------------------------------


def test_grouping_rules(tmp_path: Path) -> None:
    members = [
        ("readme", b"no dot, no sample"),
        ("dir.v1/a.JPEG", b"A"),
        ("dir.v1/a.seg.png", b"another image of the sample"),
        ("dir.v1/a.txt", b"a"),
        ("__MACOSX/dir.v1/x.jpg", b"junk"),
        (".hidden/x.jpg", b"junk"),
        ("./b.txt", b"b"),
        ("./._b.jpg", b"junk in the middle of a sample"),
        ("./b.webp", b"B"),
        ("./b.png", b"the first image counts"),
        ("c.heic", b"not an image we read"),
        ("c.txt", b"c"),
    ]
    assert read_bytes(tmp_path, tar_bytes(members)) == [
        Sample("dir.v1/a", b"A", ("a",)),
        Sample("./b", b"B", ("b",)),
        Fault("c", "missing_image", f"no image ({', '.join(IMAGE_SUFFIXES)}); found .heic, .txt"),
    ]


def test_duplicate_keys(tmp_path: Path) -> None:
    first, again = [("a.jpg", b"A"), ("a.txt", b"a")], [("a.jpg", b"B"), ("a.txt", b"b")]
    other = [("o.jpg", b"O"), ("o.txt", b"o")]
    for members, expected in [
        (first + other + again, [("a", ""), ("o", ""), ("a", "duplicate_key")]),
        (first + again, [("a", ""), ("a", "duplicate_key")]),
        (
            first[:1] + other + first[1:],
            [("a", "missing_caption"), ("o", ""), ("a", "duplicate_key")],
        ),
    ]:
        found = read_bytes(tmp_path, tar_bytes(members))
        assert brief(found) == expected
        assert Sample("a", b"B", ("b",)) not in found


@pytest.mark.parametrize(
    "bad",
    [
        header("a.jpg", kind=tarfile.SYMTYPE, link="/etc/hostname"),
        header("a.jpg", kind=tarfile.LNKTYPE, link="o.jpg"),
        header("a.jpg", kind=tarfile.CHRTYPE),
        header("a.jpg", kind=tarfile.FIFOTYPE),
        header("a.jpg", 5, kind=b"Z") + block(b"12345"),
    ],
)
def test_unsafe_member_types_cost_one_sample(tmp_path: Path, bad: bytes) -> None:
    other = tar_bytes([("o.jpg", b"O"), ("o.txt", b"o")])
    data = bad + header("a.txt", 1) + block(b"a") + header("a.png", 1) + block(b"A") + other
    assert brief(read_bytes(tmp_path, data)) == [("a", "unsafe_member"), ("o", "")]


def test_a_sample_with_several_problems_is_one_fault(tmp_path: Path) -> None:
    link = header("a.png", kind=tarfile.SYMTYPE, link="x")
    again = header("a.jpg", 1) + block(b"A") + link
    assert brief(read_bytes(tmp_path, GOOD + link + END_MARK)) == [("a", "unsafe_member")]
    assert brief(read_bytes(tmp_path, GOOD + again + END_MARK)) == [
        ("a", ""),
        ("a", "duplicate_key"),
    ]


@pytest.mark.parametrize("folder", ["/", "../", "x/../../", "/abs/", "\\"])
def test_unsafe_names_cost_one_sample(tmp_path: Path, folder: str) -> None:
    members = [(f"{folder}a.jpg", b"A"), (f"{folder}a.txt", b"a"), ("o.jpg", b"O"), ("o.txt", b"o")]
    assert brief(read_bytes(tmp_path, tar_bytes(members))) == [
        (f"{folder}a", "unsafe_member"),
        ("o", ""),
    ]


def test_names_unsafe_elsewhere_are_refused(tmp_path: Path) -> None:
    assert (
        brief(read_bytes(tmp_path, tar_bytes([(r"x\..\..\a.jpg", b"A")])))[0][1] == "unsafe_member"
    )


@pytest.mark.parametrize("large", ["a.jpg", "a.txt", "a.json"])
def test_too_large_members_are_not_read(tmp_path: Path, large: str) -> None:
    size = 64 * 1024**2
    parts = {"a.jpg": b"A", "a.txt": b"a", "a.json": b"{}", "o.jpg": b"O", "o.txt": b"o"}
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        for name, data in parts.items():
            file.write(header(name, size if name == large else len(data)))
            if name == large:
                file.seek(size, io.SEEK_CUR)  # a hole: no disk is used
            else:
                file.write(block(data))
        file.write(END_MARK)
    with memory(size // 8):
        found = read(path, max_image_bytes=size - 1, max_text_bytes=1000)
    assert brief(found) == [("a", "member_too_large"), ("o", "")]


def test_names_that_are_not_utf8_can_be_stored(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    info = tarfile.TarInfo(f"{name}.jpg")
    (fault,) = read_bytes(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + END_MARK)
    assert fault.key.encode("utf-8") == rb"caf\xe9"


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compress", [False, True])
def test_every_tar_flavour_with_long_names(tmp_path: Path, fmt: int, compress: bool) -> None:
    long = "/".join(["é" * 30] * (2 if fmt == tarfile.USTAR_FORMAT else 20)) + "/a"
    data = tar_bytes([(f"{long}.jpg", b"A"), (f"{long}.txt", b"a")], fmt)
    assert read_bytes(tmp_path, gzip.compress(data) if compress else data) == [
        Sample(long, b"A", ("a",))
    ]


def test_pax_size_counts_more_than_the_header(tmp_path: Path) -> None:
    pax = b"12 size=600\n"
    data = (
        header("x", len(pax), tarfile.XHDTYPE) + block(pax) + header("a.jpg", 0) + block(b"A" * 600)
    )
    data += header("a.txt", 1) + block(b"a") + END_MARK
    assert read_bytes(tmp_path, data) == [Sample("a", b"A" * 600, ("a",))]


# ---- damage --------------------------------------------------------------------------------------

GOOD = header("a.jpg", 1) + block(b"A") + header("a.txt", 1) + block(b"a")


@pytest.mark.parametrize(
    ("rest", "key"),
    [
        (b"", ""),  # no end mark: whatever came behind is lost
        (header("b.jpg", 1)[:100], ""),
        (header("b.jpg", 1), "b"),
        (header("b.jpg", 1) + block(b"B"), "b"),  # complete image, no caption
        (header("b.jpg", 600) + bytes(512), "b"),
        (
            header("b.jpg", 1)
            + block(b"B")
            + header("b.json", 15)
            + block(b'{"caption":"b"}')
            + header("b.txt", 9),
            "b",
        ),
        (b"\xff" * 512 + GOOD, ""),  # tarfile takes such a header for the end
        (header("b.cls", 8 * 1024**3), "b"),
    ],
)
def test_everything_before_the_damage_is_kept(tmp_path: Path, rest: bytes, key: str) -> None:
    assert brief(read_bytes(tmp_path, GOOD + rest)) == [("a", ""), (key, "truncated_shard")]


def test_missing_end_mark_is_named(tmp_path: Path) -> None:
    fault = read_bytes(tmp_path, GOOD)[-1]
    assert isinstance(fault, Fault)
    assert fault.detail == "the file ends without an end-of-archive mark"


def test_many_extension_headers_in_a_row(tmp_path: Path) -> None:
    # tarfile recurses into each of these.
    pax = b"".join(
        header("x", 12, tarfile.XHDTYPE) + block(b"12 ke%03d=v\n" % (n % 1000)) for n in range(3000)
    )
    assert brief(read_bytes(tmp_path, pax + GOOD + END_MARK)) == [("a", "")]


@pytest.mark.parametrize(
    "pax",
    [
        b"garbage",
        b"999 path=x\n",
        b"3 path=x\n",
        b"0 a=b\n",
        b"14 size=-12\n",
        b"14 size=abc\n\n",
        b"\xff\xff",
    ],
)
def test_damaged_pax_headers(tmp_path: Path, pax: bytes) -> None:
    data = (
        GOOD
        + header("x", len(pax), tarfile.XHDTYPE)
        + block(pax)
        + header("b.jpg", 1)
        + block(b"B")
        + END_MARK
    )
    assert brief(read_bytes(tmp_path, data)) == [("a", ""), ("", "truncated_shard")]


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x1f\x8b", b"\x1f\x8b" + bytes(600), gzip.compress(b"no tar", mtime=0)]
)
def test_not_a_tar(tmp_path: Path, content: bytes) -> None:
    assert brief(read_bytes(tmp_path, content)) == [("", "not_a_tar")]


def test_too_large_and_cut(tmp_path: Path) -> None:
    found = read_bytes(tmp_path, GOOD + header("b.jpg", 8 * 1024**3))
    assert brief(found) == [("a", ""), ("b", "member_too_large"), ("", "truncated_shard")]


def test_shard_that_has_gone(tmp_path: Path) -> None:
    read_bytes(tmp_path, GOOD + END_MARK)
    source = WebDatasetSource(str(tmp_path / "x.tar"))
    (shard,) = source.shards()
    (tmp_path / "x.tar").unlink()
    assert brief(list(source.read(shard))) == [("", "missing_shard")]


def member_ends(data: bytes) -> list[tuple[str, int]]:
    """Name and last byte of the members of a good tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, info.offset_data + info.size) for info in tar]


def end_mark(data: bytes) -> int:
    """Return the offset of the end mark of a good tar."""
    return max((end + -end % 512 for _, end in member_ends(data)), default=0)


def whole_samples(data: bytes, length: int) -> list[str]:
    """Keys of the samples that lie entirely in the first `length` bytes of a good tar."""
    ends = {base_plus_ext(name)[0]: end for name, end in member_ends(data)}
    return [key for key, end in ends.items() if end <= length]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(good_tars(), st.floats(0, 1), st.booleans())
def test_truncated_anywhere(tmp_path: Path, data: bytes, place: float, compress: bool) -> None:
    packed = gzip.compress(data) if compress else data
    whole = read_bytes(tmp_path, packed)
    assert [sample.key for sample in whole] == whole_samples(data, len(data))

    cut = packed[: int(place * len(packed))]
    arrived = len(zlib.decompressobj(wbits=31).decompress(cut)) if compress else len(cut)
    complete = len(whole_samples(data, arrived))
    found = read_bytes(tmp_path, cut)
    assert found[:complete] == whole[:complete]
    rest = found[complete:]
    if arrived >= end_mark(data) + 512:  # but for what closes a compressed file
        assert [item.key for item in rest] == [""] * (compress and len(cut) < len(packed))
        return
    assert isinstance(rest[-1], Fault)
    assert rest[-1].reason == ("not_a_tar" if arrived < 512 else "truncated_shard")
    # The sample that was cut may come as well, as far as it got, if that is an image and a
    # caption.
    assert [item.key for item in rest[:-1] if isinstance(item, Sample)] in (
        [],
        [sample.key for sample in whole[complete : complete + 1]],
    )


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text("a./_é ", min_size=1, max_size=12)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"), min_size=1)
)
def test_keys_of_any_name_are_those_of_the_webdataset_library(tmp_path: Path, name: str) -> None:
    found = read_bytes(tmp_path, tar_bytes([(name, b"")], tarfile.PAX_FORMAT))
    check_outcomes(found)
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or ".." in parts:
        assert [item.reason for item in found if isinstance(item, Fault)] == ["unsafe_member"]
    elif not parts[-1].startswith(".") and not any(
        part.startswith(".") and part != "." for part in parts
    ):
        key, _ = base_plus_ext(name)
        assert [item.key for item in found] == ([] if key is None else [key])


# ---- finding shards ------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in [
        "a/00000.tar",
        "a/00001.tar",
        "a/00002.tar.gz",
        "a/._00000.tar",
        "a/notes.txt",
        "b/00000.tgz",
    ]:
        path = tmp_path / "my data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "data").symlink_to(tmp_path / "my data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("a/00000.tar", ["a/00000.tar"]),
        ("a/*.tar", ["a/00000.tar", "a/00001.tar"]),
        ("a/*", ["a/00000.tar", "a/00001.tar", "a/00002.tar.gz"]),
        ("a/0000?.tar", ["a/00000.tar", "a/00001.tar"]),
        ("a/0000[1-9].*", ["a/00001.tar", "a/00002.tar.gz"]),
        ("a/{00000..00001}.tar", ["a/00000.tar", "a/00001.tar"]),
        ("{a/00001.tar,b/00000.tgz}", ["a/00001.tar", "b/00000.tgz"]),
        ("{b,a}/*.t*", ["a/00000.tar", "a/00001.tar", "a/00002.tar.gz", "b/00000.tgz"]),
        ("*/00000.t*", ["a/00000.tar", "b/00000.tgz"]),
        ("**/*.tgz", ["b/00000.tgz"]),
        ("**", ["a/00000.tar", "a/00001.tar", "a/00002.tar.gz", "b/00000.tgz"]),
    ],
)
def test_patterns(tree: Path, pattern: str, found: list[str]) -> None:
    shards = WebDatasetSource(f"{tree}/{pattern}").shards()
    assert [shard.location for shard in shards] == [f"{tree}/{name}" for name in found]
    assert [shard.size for shard in shards] == [len(name) for name in found]


def test_links_to_folders_below_a_wildcard(tree: Path) -> None:
    """`**` reads each folder once: links lead in circles, 2^40 ways in a tree of two of them."""
    (tree / "a" / "up").symlink_to("..")
    (tree / "a" / "b").symlink_to(tree / "b")
    (tree / "a" / "itself").symlink_to(".")
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "back").symlink_to(tree)
    (outside / "1.tar").write_bytes(b"")
    (tree / "link").symlink_to(outside)
    everything = ["a/00000.tar", "a/00001.tar", "a/00002.tar.gz", "a/b/00000.tgz", "link/1.tar"]
    for pattern, found in [
        ("**", everything),
        ("**/*.tar", [name for name in everything if name.endswith(".tar")]),
        ("link/**/*.tar", ["link/1.tar", "link/back/a/00000.tar", "link/back/a/00001.tar"]),
        ("*/b/*", ["a/b/00000.tgz"]),
    ]:
        shards = WebDatasetSource(f"{tree}/{pattern}").shards()
        assert [shard.location for shard in shards] == [f"{tree}/{name}" for name in found]


@pytest.mark.parametrize("separator", [" ", "\n", "::"])
def test_several_patterns_make_one_sorted_set(tree: Path, separator: str) -> None:
    uri = separator.join([f"{tree}/b/*", f"file://{tree}/a/00001.tar", f"{tree}/a/*.tar"])
    locations = [shard.location for shard in WebDatasetSource(uri).shards()]
    assert locations == [f"{tree}/{name}" for name in ["a/00000.tar", "a/00001.tar", "b/00000.tgz"]]


def test_list_file(tree: Path) -> None:
    listing = tree / "list of shards.txt"
    listing.write_text(f"# comment\n\na/{{00000..00001}}.tar\n{tree}/b/*.tgz\n")
    locations = [shard.location for shard in WebDatasetSource(f"@{listing}").shards()]
    assert locations == [f"{tree}/{name}" for name in ["a/00000.tar", "a/00001.tar", "b/00000.tgz"]]


def test_existing_file_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "my {odd} [name].tar"
    path.write_bytes(GOOD + END_MARK)
    source = WebDatasetSource(str(path))
    (shard,) = source.shards()
    assert (shard.name, shard.location) == ("my__odd___name_", str(path))
    assert brief(list(source.read(shard))) == [("a", "")]


def test_relative_paths_are_found_from_another_folder(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    (shard,) = WebDatasetSource("a/00001.tar").shards()
    assert shard.location == f"{tree.resolve()}/a/00001.tar"


@pytest.mark.parametrize("length", [1, 149, 150, 151, 223, 251])
def test_a_long_name_leaves_room_for_what_is_added(tmp_path: Path, length: int) -> None:
    """All files of a shard can be written, and two that differ at their ends have two names."""
    stems = [letter.rjust(length, "x") for letter in "ab"]
    for stem in stems:
        (tmp_path / f"{stem}.tar").write_bytes(b"")
    names = [shard.name for shard in WebDatasetSource(str(tmp_path / "*.tar")).shards()]
    assert len(set(names)) == 2
    assert (names == stems) == (length <= 150)
    store = EmbeddingStore(Folder(str(tmp_path / "store")))
    table = pa.table({"n": [1]})
    for name in names:
        store.commit(name, table, table, table, {})
        for kind in TABLES:
            store.parts.write_table(store.part_name(name, 10**9, kind), table)
    assert len(store.folder.names()) == 8


def test_names_are_unique_and_stay_the_same(tree: Path) -> None:
    names = [shard.name for shard in WebDatasetSource(f"{tree}/**").shards()]
    assert names == [shard.name for shard in WebDatasetSource(f"{tree}/b/* {tree}/a/*").shards()]
    assert len(set(names)) == len(names) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    assert names[1:3] == ["00001", "00002"]
    assert re.fullmatch(r"00000-[0-9a-f]{8}", names[0])
    assert re.fullmatch(r"00000-[0-9a-f]{8}", names[3])


def test_names_are_unique_where_capitals_do_not_count() -> None:
    names = shard_names(["/d/Train-0.tar", "/d/Train-1.tar", "/d/train-0.tar"])
    first, second, third = names.values()
    assert second == "Train-1"
    assert len({first.lower(), third.lower()}) == 2
    assert [first[:8], third[:8]] == ["Train-0-", "train-0-"]


def test_addresses_that_differ_in_their_query_alone_have_names_of_their_own() -> None:
    """As those of archives of data and of drives: of one name they would be one shard."""
    places = [f"https://host/download?file={n:05d}.tar" for n in range(20_000)]
    names = shard_names([*places, "https://host/download?file=00000.tar&sig=x", "https://host/a"])
    assert len(set(names.values())) == len(names) == 20_002
    assert names["https://host/a"] == "a"


def test_addresses_with_numbers_in_brackets(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WAITS_S", ())
    with pytest.raises(SourceError, match=r"cannot look for http://\[::1\]:9/0\.tar: "):
        WebDatasetSource("http://[::1]:9/0.tar").shards()
    uri = f"{tree}/a/0000[0-1].tar::{tree}/b/[0-9]*.tgz"
    found = [shard.location for shard in WebDatasetSource(uri).shards()]
    assert found == [f"{tree}/{name}" for name in ["a/00000.tar", "a/00001.tar", "b/00000.tgz"]]


def test_digests_of_four_bytes_that_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 40,000 folders of a shard each there may be two of them."""
    make = hashlib.blake2b
    monkeypatch.setattr(
        hashlib,
        "blake2b",
        lambda data, digest_size: (
            make(data[:2], digest_size=digest_size)
            if digest_size == 4
            else make(data, digest_size=digest_size)
        ),
    )
    names = shard_names(["/d/a/x.tar", "/d/b/x.tar", "/d/y.tar"])
    assert len(set(names.values())) == 3


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("{tree}/none-*.tar", r"^no tar shard matches \S+/none-\*\.tar \(looked in \S+/data\)$"),
        ("{tree}/none/x.tar", r"^no tar shard matches \S+ \(looked in \S+/none\)$"),
        ("{tree}/a/notes.txt/x.tar", r"^no tar shard matches"),
        (
            "{tree}/a/{{00000..00041}}.tar",
            r"^40 of 42 shard patterns match nothing, the first is \S+/00002\.tar \(.*\); "
            r"2 match: to take those, give '\S+/a/\[0-9\]\*\.tar'$",
        ),
        ("{tree}/a/notes.txt", r"is not a tar shard \(\.tar, .*\.tar\.zst\)$"),
        ("{tree}/a", r"is a folder; name the shards in it, as in \S+/a/\*\.tar$"),
        ("{tree}/a/*.txt", r"^no tar shard matches"),
        ("{tree}/a/{{0..", r"^braces do not match in"),
        ("@{tree}/none.txt", r"^cannot read the shard list"),
        ("", r"^no tar shard is named in ''$"),
        ("nosuch://bucket/x.tar", r"^cannot look for nosuch://bucket/x\.tar: "),
    ],
)
def test_nothing_found(tree: Path, uri: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        WebDatasetSource(uri.format(tree=tree)).shards()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["**/*.tar", "**", "*/*/*/*.tar", "r*/*/*/*.tar"])
def test_results_are_no_data(
    tmp_path: Path, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(Folder(str(tmp_path / "runs" / "first")))
    names = ["first/distilled/webdataset/000000.tar", "first/embeddings/parts/x.tar"]
    for name in [*names, "../data/a/b/000000.tar", "other/x/000001.tar"]:
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    run.folder.write_json(run.MANIFEST, {})
    run.save_shards([])
    (tmp_path / "runs/other/run.json").write_text("of an image called run")
    export = tmp_path / "export"
    (export / "webdataset").mkdir(parents=True)
    for name in ("manifest.json", "prototypes.safetensors", "webdataset/000000.tar"):
        (export / name).write_bytes(b"")
    found = {shard.location for shard in WebDatasetSource(f"{tmp_path}/{pattern}").shards()}
    own = {f"{tmp_path}/runs/{name}" for name in names}
    assert found
    assert not found & {*own, f"{export}/webdataset/000000.tar"}
    said = capsys.readouterr().err.splitlines()
    passed = {line.partition(" and passed over; ")[0] for line in said}
    assert len(passed) == len(said)
    assert passed - {f"pds-ray: {export} is a distilled set"} == {
        f"pds-ray: {tmp_path}/runs/first is the folder of a run"
    }
    literal = WebDatasetSource(f"{run.folder.path}/**").shards()
    assert {shard.location for shard in literal} == own


def test_the_way_out_of_a_gap_works(tree: Path) -> None:
    with pytest.raises(MissingShardsError) as caught:
        WebDatasetSource(f"{tree}/a/{{00000..00009}}.tar").shards()
    advice = str(caught.value).rpartition("give ")[2].strip("'")
    assert WebDatasetSource(advice).shards() == caught.value.found
    with pytest.raises(
        MissingShardsError, match="2 match: to take those, name them alone, in a list, @FILE"
    ):
        WebDatasetSource(f"{tree}/a/00000.tar {tree}/a/00001.tar {tree}/a/7.tar").shards()


@pytest.fixture
def bucket(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`s3://bucket` served from `tree`; the roots opened."""
    opened: list[str] = []

    def open_store(root: str, settings: str) -> tuple[pafs.FileSystem, str]:
        opened.append(root + settings)
        return pafs.SubTreeFileSystem(str(tree.parent.resolve()), pafs.LocalFileSystem()), "my data"

    monkeypatch.setattr(filesystems, "_open_arrow", open_store)
    filesystems._open_root.cache_clear()
    yield opened
    filesystems._open_root.cache_clear()


@pytest.mark.parametrize("query", ["", "?region=eu-west-1"])
def test_object_store(tree: Path, bucket: list[str], query: str) -> None:
    (tree / "a" / "00%41 [x].tar").write_bytes(GOOD + END_MARK)
    source = WebDatasetSource(
        f"s3://bucket/a/{{00000..00001}}.tar{query}::s3://bucket/**/*.t*{query}"
    )
    shards = source.shards()
    assert bucket == [f"s3://bucket/{query}"]  # set up once, for listing and for reading
    assert [shard.location for shard in shards] == [
        f"s3://bucket/{name}{query}"
        for name in [
            "a/00%41 [x].tar",
            "a/00000.tar",
            "a/00001.tar",
            "a/00002.tar.gz",
            "b/00000.tgz",
        ]
    ]
    assert shards[0].name == "00_41__x_"
    assert brief(list(source.read(shards[0]))) == [("a", "")]
    assert bucket == [f"s3://bucket/{query}"]
    (tree / "list.txt").write_text("a/*.gz\n")
    if not query:
        assert [shard.name for shard in WebDatasetSource("@s3://bucket/list.txt").shards()] == [
            "00002"
        ]


def test_instances_pickle(tree: Path) -> None:
    source = WebDatasetSource(f"{tree}/a/*.tar", max_text_bytes=10)
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301
