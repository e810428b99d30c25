"""Folders of images and captions, in the layouts that people have."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pds_ray import catalog
from pds_ray.config import ReadConfig
from pds_ray.sources import local_files, tables
from pds_ray.sources.base import Fault, Sample, SourceError
from pds_ray.sources.folder import FolderSource
from tests.support.hostile import tar_bytes


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(uri: str | Path, **options: str) -> list[Sample | Fault]:
    source = catalog.make_source(str(uri), ReadConfig(**options))
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - as it travels to workers
    return [item for shard in source.shards() for item in copy.read(shard)]


def captions(uri: str | Path, **options: str) -> dict[str, tuple[str, ...]]:
    items = read(uri, **options)
    assert not [item for item in items if isinstance(item, Fault)]
    return {item.key: item.captions for item in items if isinstance(item, Sample)}


def faults(uri: str | Path) -> dict[str, str]:
    return {item.key: item.reason for item in read(uri) if isinstance(item, Fault)}


# ---- captions beside images ----------------------------------------------------------------------


def test_files_of_img2dataset(tmp_path: Path) -> None:
    """Its output format `files`: folders of 10,000, with statistics and metadata beside them."""
    for shard, key in (("00000", "000000000"), ("00000", "000000001"), ("00001", "000010000")):
        record = {"caption": f"caption {key}", "url": "http://x/y", "status": "success", "key": key}
        write(
            tmp_path,
            {
                f"{shard}/{key}.jpg": key,
                f"{shard}/{key}.txt": record["caption"],
                f"{shard}/{key}.json": json.dumps(record),
                f"{shard}_stats.json": "{}",
            },
        )
        pq.write_table(pa.table({"url": ["http://x/y"]}), tmp_path / f"{shard}.parquet")
    assert captions(f"folder:{tmp_path}") == {
        "00000/000000000.jpg": ("caption 000000000",),
        "00000/000000001.jpg": ("caption 000000001",),
        "00001/000010000.jpg": ("caption 000010000",),
    }


def test_a_folder_is_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path / "pictures",
        {"a.PNG": "pixels", "a.TXT": "one", "b.jpeg": "x", "b.caption": "two"},
    )
    monkeypatch.chdir(tmp_path)
    source = catalog.make_source("pictures")
    monkeypatch.chdir("/")
    (shard,) = source.shards()
    assert list(source.read(shard)) == [
        Sample("a.PNG", b"pixels", ("one",)),
        Sample("b.jpeg", b"x", ("two",)),
    ]
    assert captions(tmp_path / "pictures") == captions(f"folder:{tmp_path / 'pictures'}")


def test_shards_are_what_a_sorted_walk_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a list of all files, for names that sort oddly and folders of any depth."""
    monkeypatch.setattr(local_files, "SHARD_SIZE", 7)
    draw = random.Random(3)
    folders = ["", "a", "a.b", "a-b", "a b", "Z/a", "Z/é", "Z/a/0"]
    names = ["a", "b", "a.b", "a-b", "a b", "é", "0", "a.b.c", "ab"]
    stems = {os.path.join(*draw.choices(folders), *draw.choices(names)) + "_" for _ in range(90)}
    stems |= {os.path.join(folder, name) + ".x" for folder in folders for name in names}
    for stem in stems:
        write(
            tmp_path, {f"{stem}.{draw.choice(['jpg', 'png', 'avif'])}": stem, f"{stem}.txt": stem}
        )
    images = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt"]
    paths = sorted(path.relative_to(tmp_path) for path in images)
    expected = sorted(paths, key=lambda path: (path.parts[:-1], path.name))
    source = FolderSource(f"folder:{tmp_path}")
    shards = source.shards()
    assert [shard.size for shard in shards[:-1]] == [7] * (len(expected) // 7)
    assert [item for shard in shards for item in source.read(shard)] == [
        Sample(str(path), str(path.with_suffix("")).encode(), (str(path.with_suffix("")),))
        for path in expected
    ]


def test_versions_follow_content_and_not_place(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a.jpg": "pixels", "a.txt": "caption"})
    before = FolderSource(f"folder:{tmp_path / 'one'}").shards()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert FolderSource(f"folder:{tmp_path / 'two'}").shards() == before
    for name, content in (("a.jpg", "more pixels"), ("a.txt", "another caption"), ("b.jpg", "x")):
        (tmp_path / "two" / name).write_text(content)
        after = FolderSource(f"folder:{tmp_path / 'two'}").shards()
        assert after[0].version != before[0].version
        before = after


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.jpg": "x",
            "a.txt": "a",
            "._a.jpg": "x",
            ".thumbs/a.jpg": "x",
            "__MACOSX/a.jpg": "x",
            "Thumbs.db": "x",
        },
    )
    assert captions(tmp_path) == {"a.jpg": ("a",)}


def test_results_are_no_data(tmp_path: Path) -> None:
    results = {"run.json": "{}", "shards.parquet": "", "distilled/imagefolder/metadata.jsonl": "{}"}
    write(tmp_path / "runs" / "first", results)
    export = {"manifest.json": "{}", "prototypes.safetensors": "", "imagefolder/x.jpg": "x"}
    write(tmp_path / "export", export | {"imagefolder/x.txt": "x"})
    write(tmp_path, {"a.jpg": "x", "a.txt": "a", "run.jpg": "x", "run.json": '{"caption": "b"}'})
    assert captions(tmp_path) == {"a.jpg": ("a",), "run.jpg": ("b",)}


def test_what_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"secret.jpg": "secret", "secret.txt": "secret"})
    root = write(
        tmp_path / "root",
        {f"{name}.txt": "x" for name in ("dangling", "folder", "link", "pipe", "own", "big")}
        | {"own_target.jpg": "pixels", "own_target.txt": "y", "big.jpg": "x" * 101, "no.jpg": "x"}
        | {
            "told.jpg": "x",
            "long.jpg": "x",
            "long.txt": "x" * 51,
            "blank.jpg": "x",
            "blank.txt": " ",
        },
    )
    (root / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (root / "link.jpg").symlink_to(outside / "secret.jpg")
    (root / "told.txt").symlink_to(outside / "secret.txt")
    (root / "own.jpg").symlink_to(root / "own_target.jpg")
    (root / "circle.jpg").symlink_to(root / "circle.jpg")
    os.mkfifo(root / "pipe.jpg")
    source = FolderSource(f"folder:{root}", max_image_bytes=100, max_text_bytes=50)
    (shard,) = source.shards()
    found = {i.key: i.reason if isinstance(i, Fault) else i.image for i in source.read(shard)}
    assert found == {
        "big.jpg": "member_too_large",
        "blank.jpg": "missing_caption",
        "circle.jpg": "missing_image",
        "dangling.jpg": "unsafe_member",
        "link.jpg": "unsafe_member",
        "long.jpg": "member_too_large",
        "no.jpg": "missing_caption",
        "own.jpg": b"pixels",
        "own_target.jpg": b"pixels",
        "pipe.jpg": "missing_image",
        "told.jpg": "unsafe_member",
    }


def test_links_to_folders(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", {"a.jpg": "x"})
    root = write(tmp_path / "root", {"in/a.jpg": "x", "in/a.txt": "a"})
    (root / "again").symlink_to(root / "in")
    (root / "in" / "loop").symlink_to(root)
    assert captions(root) == {"in/a.jpg": ("a",)}
    (root / "out").symlink_to(outside)
    with pytest.raises(
        SourceError, match=r"root/out is a link to .*outside, outside of .*root; give"
    ):
        FolderSource(f"folder:{root}").shards()


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": "x", "a.txt": "a"})
    for name in (b"\xff.jpg", b"\xff.txt"):
        (tmp_path / os.fsdecode(name)).write_text("odd")
    assert captions(tmp_path) == {"a.jpg": ("a",), "\\udcff.jpg": ("odd",)}


COMPOSED, APART = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("of_image", "of_text"), [(COMPOSED, APART), (APART, COMPOSED)])
def test_accents_are_spelled_in_two_ways(tmp_path: Path, of_image: str, of_text: str) -> None:
    """As where images came from a Mac, and captions or a table from elsewhere."""
    write(tmp_path / "a", {f"{of_image}.1.jpg": "x", f"{of_text}.1.txt": "coffee"})
    assert captions(tmp_path / "a") == {f"{of_image}.1.jpg": ("coffee",)}
    table = f"file_name,caption\n{of_text}/1.jpg,coffee\n"
    write(tmp_path / "b", {f"{of_image}/1.jpg": "x", "metadata.csv": table})
    assert captions(tmp_path / "b") == {f"{of_text}/1.jpg": ("coffee",)}


def test_names_that_differ_in_spelling_alone(tmp_path: Path) -> None:
    for name in (COMPOSED, APART):
        write(tmp_path, {f"{name}.jpg": "x", f"{name}.txt": ascii(name)})
    assert captions(tmp_path) == {f"{name}.jpg": (ascii(name),) for name in (COMPOSED, APART)}


def test_options_of_reading(tmp_path: Path) -> None:
    write(tmp_path, {"a.input.jpg": "x", "a.output.txt": "one\ntwo", "a.json": '{"alt": "three"}'})
    options = {"image_suffixes": "input.jpg", "caption_suffixes": "output.txt,json"}
    assert captions(tmp_path, **options, caption_lines="each", caption_keys="alt") == {
        "a.input.jpg": ("one", "two", "three")
    }


# ---- tables --------------------------------------------------------------------------------------


def test_imagefolder_of_hugging_face(tmp_path: Path) -> None:
    """Each split has a table of its own; paths are those from the table on."""
    for split in ("train", "test"):
        lines = [
            {"file_name": "0002.png", "text": f"{split} 2"},
            {"file_name": "sub/0001.png", "text": f"{split} 1", "extra": 7},
        ]
        write(
            tmp_path / split,
            {
                "metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
                "0002.png": "two",
                "sub/0001.png": "one",
                "sub/0001.txt": "not this",
            },
        )
    assert captions(f"folder:{tmp_path}") == {
        "test/0002.png": ("test 2",),
        "test/sub/0001.png": ("test 1",),
        "train/0002.png": ("train 2",),
        "train/sub/0001.png": ("train 1",),
    }
    assert list(captions(f"folder:{tmp_path}/train")) == ["0002.png", "sub/0001.png"]


FLICKR8K = 'image,caption\n2.jpg,"A child, in pink"\n2.jpg,A girl\n1.jpg,"A ""dog"""\n'
FLICKR30K = (
    "image_name| comment_number| comment\n2.jpg| 0| A child, in pink\n2.jpg| 1| A girl\n"
    '1.jpg| 0| A "dog"\n1.jpg| 4   no mark in this row .\n'
)
TOKENS = '2.jpg#0\tA child, in pink\n2.jpg#1\tA girl\n1.jpg#0\tA "dog"\n'


@pytest.mark.parametrize(
    ("table", "folder", "content"),
    [
        ("captions.txt", "Images/", FLICKR8K),
        ("results.csv", "flickr30k_images/", FLICKR30K),
        ("results.csv", "", FLICKR30K),
        ("results_20130124.token", "flickr30k-images/", TOKENS),
        ("Flickr8k.token.txt", "Flicker8k_Dataset/", TOKENS),
        (
            "train.tsv",
            "",
            FLICKR8K.replace("image,caption", "filepath\ttitle").replace("jpg,", "jpg\t"),
        ),
        ("train.csv", "", FLICKR8K.replace("image,caption", "File_Name,TEXT")),
        (
            "metadata.csv",
            "",
            "\ufeff" + FLICKR8K.replace("image", "file_name").replace("\n", "\r\n"),
        ),
        ("headless.csv", "", FLICKR8K.partition("\n")[2]),
        ("german.csv", "", FLICKR8K.replace(",", ";").replace("child; in", "child, in")),
    ],
)
def test_tables(tmp_path: Path, table: str, folder: str, content: str) -> None:
    write(tmp_path, {table: content, f"{folder}1.jpg": "one", f"{folder}2.jpg": "two"})
    assert read(tmp_path) == [
        Sample(f"{folder}1.jpg", b"one", ('A "dog"',)),
        Sample(f"{folder}2.jpg", b"two", ("A child, in pink", "A girl")),
    ]


def test_a_table_in_parquet(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "x"})
    table = pa.table({"file_name": ["a.png"], "captions": [["one", "two"]]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert captions(tmp_path) == {"a.png": ("one", "two")}


def test_a_path_with_a_dot_in_front_is_the_same_image(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "x", "metadata.csv": "file_name,text\n./a.png,one\na.png,two\n"})
    assert captions(tmp_path) == {"a.png": ("one", "two")}


def test_an_image_is_not_read_by_two_tables(tmp_path: Path) -> None:
    own = {
        f"{split}/{name}": content
        for split in ("train", "test")
        for name, content in {"a.png": "x", "metadata.csv": "file_name,text\na.png,one\n"}.items()
    }
    assert len(captions(write(tmp_path / "own", own))) == 2
    elsewhere = {"b.png": "x", "metadata.csv": "file_name,text\nb.png,b\n"}
    assert len(captions(write(tmp_path / "besides", own | elsewhere))) == 3
    of_all = {"metadata.csv": "file_name,text\ntrain/a.png,one\ntest/a.png,two\n"}
    with pytest.raises(
        SourceError,
        match=r"^test/a\.png is named by metadata\.csv and lies beside test/metadata\.csv, .* take",
    ):
        read(write(tmp_path / "all", own | of_all))


@pytest.mark.parametrize("place", ["a", "z"])
def test_images_that_no_table_is_for_are_said(
    tmp_path: Path, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    table = {"m/a.png": "x", "m/a.txt": "x", "m/metadata.csv": "file_name,text\na.png,one\n"}
    write(tmp_path, table | {f"{place}/b.png": "x", f"{place}/b.txt": "x", f"{place}/c.png": "x"})
    assert captions(tmp_path) == {"m/a.png": ("one",)}
    assert (
        f"1 images in {tmp_path} have captions beside them and are left" in capfd.readouterr().err
    )
    assert captions(tmp_path / "m") == {"a.png": ("one",)}
    assert "left out" not in capfd.readouterr().err


def test_any_text_comes_back_from_a_csv(tmp_path: Path) -> None:
    texts = ["a, b", 'say "no"', "two\nlines", "1.jpg\n2.jpg", "tab\there", "é|ü", "#hash"]
    file = io.StringIO()
    rows = csv.writer(file)
    rows.writerow(["image", "caption"])
    rows.writerows([f"{number}.jpg", text] for number, text in enumerate(texts))
    write(tmp_path, {"any.csv": file.getvalue()} | {f"{n}.jpg": "x" for n in range(len(texts))})
    assert list(captions(tmp_path).values()) == [(text,) for text in texts]


def test_images_of_a_table_that_cannot_be_used(tmp_path: Path) -> None:
    names = ["a.jpg", "../secret.jpg", "/etc/passwd", "gone.jpg", "sub\\b.jpg", "\0", "\ud83d"]
    lines = [{"file_name": name, "text": "x"} for name in names]
    lines.append({"file_name": "blank.jpg", "text": " "})
    root = write(
        tmp_path / "root",
        {
            "metadata.jsonl": "\n".join(map(json.dumps, lines)),
            "a.jpg": "x",
            "sub/b.jpg": "x",
            "blank.jpg": "x",
        },
    )
    write(tmp_path, {"secret.jpg": "secret"})
    assert faults(root) == {
        "../secret.jpg": "unsafe_member",
        "/etc/passwd": "unsafe_member",
        "blank.jpg": "missing_caption",
        "gone.jpg": "missing_image",
        "\0": "missing_image",
        "\\ud83d": "missing_image",
    }
    assert {item.key for item in read(root) if isinstance(item, Sample)} == {"a.jpg", "sub/b.jpg"}


def test_a_changed_caption_is_another_version(tmp_path: Path) -> None:
    write(tmp_path, {"captions.txt": FLICKR8K, "1.jpg": "one", "2.jpg": "two"})
    before = FolderSource(f"folder:{tmp_path}").shards()
    write(tmp_path, {"captions.txt": FLICKR8K.replace("A girl", "A boy ")})
    assert FolderSource(f"folder:{tmp_path}").shards()[0].version != before[0].version


def test_tables_are_cut_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "SHARD_SIZE", 3)
    for part in "ab":
        lines = [json.dumps({"file_name": f"{n}.jpg", "text": part + str(n)}) for n in range(4)]
        write(
            tmp_path / part,
            {"metadata.jsonl": "\n".join(lines)} | {f"{n}.jpg": "x" for n in range(4)},
        )
    source = FolderSource(f"folder:{tmp_path}")
    shards = source.shards()
    assert [shard.name for shard in shards] == ["folder-00000", "folder-00001", "folder-00002"]
    assert [[item.key for item in source.read(shard)] for shard in shards] == [
        ["a/0.jpg", "a/1.jpg", "a/2.jpg"],
        ["a/3.jpg", "b/0.jpg", "b/1.jpg"],
        ["b/2.jpg", "b/3.jpg"],
    ]


# ---- what else a folder may be -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "a{1,2}", "a::b", "a[1]", "@a", "a*?"])
def test_a_folder_of_tars_may_have_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, {f"{name}/0.tar": tar_bytes([("a.jpg", b"A"), ("a.txt", b"x")])})
    source = catalog.make_source(f"{tmp_path}/{name}")
    assert [list(source.read(shard)) for shard in source.shards()] == [[Sample("a", b"A", ("x",))]]


def test_tars_come_first(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": "x", "a.txt": "beside"})
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (("k.jpg", b"pixels"), ("k.txt", b"in the tar")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    by_pattern = catalog.make_source(f"{tmp_path}/*.tar").shards()
    for uri in (f"folder:{tmp_path}", str(tmp_path)):
        assert captions(uri) == {"k": ("in the tar",)}
        assert catalog.make_source(uri).shards() == by_pattern


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("validation", ["val", "validation", "dev"])
def test_the_validation_split_lies_beside(tmp_path: Path, name: str, validation: str) -> None:
    write(tmp_path, {f"{name}/a.jpg": "x", f"{validation}/b.jpg": "x"})
    assert FolderSource(f"folder:{tmp_path}/{name}").validation == f"folder:{tmp_path}/{validation}"
    assert FolderSource(f"folder:{tmp_path}/{validation}").validation is None
    assert FolderSource(f"folder:{tmp_path}").validation is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tar and no image"),
        (
            {"a.jpg": "x"},
            r"has images but no captions, neither in files of the same stem \(txt, json",
        ),
        (
            {"a.jpg": "x", "a.csv": "image,caption\na.jpg,x", "b.csv": "image,caption\na.jpg,x"},
            r"has 2 tables \(a\.csv, b\.csv\); leave the one",
        ),
        (
            {"a.csv": "image,caption\nb.jpg,x"},
            "no image that a.csv names is in .*, the first: b.jpg",
        ),
        (
            {"a.csv": "image,label\na.jpg,7"},
            r"a\.csv has no captions; it has image, label; name the",
        ),
        ({"a.csv": ""}, r"a\.csv has no captions; it has no row"),
        (
            {"a.csv": "image,caption\na.jpg,a dog, running"},
            "a.csv cannot be read: line 2: 3 cells, but the first line has 2; a text that "
            "holds ',' needs quotation marks",
        ),
        (
            {"a.csv": "a.jpg,a dog, running\nb.jpg,a cat"},
            "line 2: 2 cells, but the first line has 3",
        ),
        (
            {"a.csv": 'image,caption\na.jpg,"A dog\nb.jpg,a cat\nc.jpg,a 5" ruler\nd.jpg,x'},
            "line 4: a text holds the row of b.jpg, because of a quotation mark that is not closed",
        ),
        (
            {"a.tsv": 'id\tfile_name\ttext\n1\ta.jpg\t"A dog\n2\tb.jpg\ta cat'},
            "line 3: a text holds the row of b.jpg",
        ),
        (
            {"data/train-0.parquet": "", "README.md": ""},
            r"has no image but Parquet files; give parquet:/.*/data/\*\.parquet$",
        ),
        ({"sub/0.tar": ""}, r"has tars only in the folders below it; give .*/\*\*/\*\.tar$"),
        (
            {"a.csv": "url,caption\nx,y"},
            r"a\.csv, row 1: it names no image .*; it has url, caption",
        ),
        (
            {"a.csv": 'image,caption\na.jpg,"' + "x" * 200_000},
            r"a\.csv cannot be read: field larger",
        ),
        (
            {"metadata.jsonl": '{"file_name": "a.jpg", "text"'},
            "metadata.jsonl cannot be read: line 1",
        ),
        ({"metadata.jsonl": "[1]"}, "line 1: it is no JSON object"),
        ({"metadata.jsonl": "[" * 100_000}, "line 1: "),
        ({"metadata.jsonl": '{"text": "x"}'}, "row 1: it names no image .*it has text"),
        ({"metadata.parquet": b"PAR1 no"}, r"metadata\.parquet cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_used(
    tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        FolderSource(f"folder:{write(tmp_path, files)}").shards()
    assert "\n" not in str(caught.value)


def test_tables_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10)
    write(tmp_path, {"captions.txt": FLICKR8K, "1.jpg": "one"})
    with pytest.raises(SourceError, match=r"captions\.txt holds more than 10 bytes"):
        FolderSource(f"folder:{tmp_path}").shards()


@pytest.mark.parametrize("uri", ["folder:", "folder:/no/such/folder"])
def test_no_folder(uri: str) -> None:
    with pytest.raises(SourceError, match=r"there is no folder .*; write folder:ROOT"):
        catalog.make_source(uri)
