"""Parquet files with images in them, as Hugging Face, img2dataset and others write them."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.config import ReadConfig
from pds_ray.sources import parquet_rows
from pds_ray.sources.advice import advice
from pds_ray.sources.base import Fault, MissingShardsError, Sample, SourceError
from pds_ray.sources.parquet import ParquetSource
from tests.support import object_store
from tests.support.object_store import BUCKET, Faults, proxy

PNG = b"\x89PNG any bytes"
HUGGING_FACE = {  # the entry of the file's metadata that `datasets` writes
    "huggingface": json.dumps(
        {"info": {"features": {"image": {"_type": "Image"}, "text": {"_type": "Value"}}}}
    )
}


def struct(*data: bytes | None) -> pa.Array:
    """A column of images as `datasets` writes it."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": each, "path": "x.png"} for each in data], kind)


def write(path: Path, **columns: Any) -> str:
    table = pa.table(columns).replace_schema_metadata(HUGGING_FACE)
    pq.write_table(table, path, row_group_size=2)
    return f"parquet:{path}"


def read(uri: str, **options: Any) -> list[Sample | Fault]:
    source = catalog.make_source(uri, ReadConfig(**options))
    return [item for shard in source.shards() for item in source.read(shard)]


def test_files_of_hugging_face(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "train-00000-of-00001.parquet",
        image=struct(PNG + b"1", PNG + b"2", PNG + b"3"),
        text=["one", "two", "three"],
        label=[1, 2, 3],
    )
    assert read(uri) == [
        Sample("000000000", PNG + b"1", ("one",)),
        Sample("000000001", PNG + b"2", ("two",)),
        Sample("000000002", PNG + b"3", ("three",)),
    ]
    (shard,) = catalog.make_source(uri).shards()
    assert shard.name == "train-00000-of-00001"


def test_files_of_img2dataset(tmp_path: Path) -> None:
    """Its output format `parquet` has a row for what could not be downloaded, too."""
    pq.write_table(
        pa.table(
            {
                "url": ["http://x/1", "http://x/2"],
                "key": ["000000000", "000000001"],
                "status": ["success", "failed_to_download"],
                "error_message": [None, "HTTP Error 404: Not Found"],
                "caption": ["one", "two"],
                "width": [9, None],
                "jpg": pa.array([b"jpeg", None], pa.binary()),
            }
        ),
        tmp_path / "00000.parquet",
    )
    assert read(f"parquet:{tmp_path}/*.parquet") == [
        Sample("000000000", b"jpeg", ("one",)),
        Fault("000000001", "missing_image", "no jpg in the row"),
    ]


@pytest.mark.parametrize(
    "captions",
    [
        pa.array([["one", "two"]]),
        pa.array([["one", "two"]], pa.large_list(pa.large_string())),
        pa.array([[{"caption": "one"}, {"caption": "two"}]]),
        pa.array([{"captions": ["one", "two"], "id": 7}]),
        pa.array([[b"one", b"two"]]),
        pa.array([{"captions": [b"one", "two".encode("utf-16")]}]),
    ],
)
def test_shapes_of_captions(tmp_path: Path, captions: pa.Array) -> None:
    uri = write(tmp_path / "a.parquet", image=struct(PNG), caption=captions)
    assert read(uri) == [Sample("000000000", PNG, ("one", "two"))]


@pytest.mark.parametrize("name", ["TEXT", "text", "alt_text", "txt", "comment", "title"])
def test_usual_names_of_captions(tmp_path: Path, name: str) -> None:
    uri = write(tmp_path / "a.parquet", image=struct(PNG), **{name: ["one"]}, caption_=["no"])
    assert read(uri) == [Sample("000000000", PNG, ("one",))]


def test_a_text_that_is_stored_as_bytes(tmp_path: Path) -> None:
    """Spark, Hive and older programs write texts so."""
    uri = write(tmp_path / "a.parquet", jpg=[PNG], caption=["caf\u00e9".encode()])
    assert read(uri) == [Sample("000000000", PNG, ("caf\u00e9",))]


def test_a_caption_that_has_entries_of_other_names(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", image=struct(PNG), caption=[{"en": "one", "de": "eins"}])
    (fault,) = read(uri)
    assert isinstance(fault, Fault)
    assert (fault.reason, fault.detail) == (
        "missing_caption",
        "no caption in caption, which has en, de",
    )
    assert read(uri, caption_keys="caption,de") == [Sample("000000000", PNG, ("eins",))]


def test_columns_can_be_named(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "a.parquet",
        mask=struct(b"mask"),
        picture_=pa.array([PNG], pa.large_binary()),
        caption_0=["one"],
        caption_1=["two"],
    )
    with pytest.raises(
        SourceError, match=r"name the column of images, of mask, picture_, with --read"
    ):
        read(uri, caption_keys="caption_0,caption_1")
    assert read(uri, caption_keys="caption_0,caption_1", image_suffixes="picture_") == [
        Sample("000000000", PNG, ("one", "two"))
    ]


def test_bad_rows_are_faults(tmp_path: Path) -> None:
    not_utf8 = pa.array([b"x", b"\xff", b"x", b"x", b" ", b"x"], pa.binary()).view(pa.string())
    paths = pa.array([b"a", b"b", b"c", b"d", b"e", b"\xff"], pa.binary()).view(pa.string())
    images = pa.StructArray.from_arrays(
        [pa.array([PNG, PNG, None, PNG * 99, PNG, PNG]), paths], ["bytes", "path"]
    )
    write(tmp_path / "a.parquet", image=images, text=not_utf8)
    source = ParquetSource(f"parquet:{tmp_path}/a.parquet", max_image_bytes=100)
    (shard,) = source.shards()
    assert [i.reason if isinstance(i, Fault) else "" for i in source.read(shard)] == [
        "",
        "missing_caption",
        "missing_image",
        "member_too_large",
        "missing_caption",
        "missing_image",
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"URL": ["http://x/1"], "TEXT": ["one"], "WIDTH": [9]},
            r"a\.parquet holds no images, only their addresses \(column URL\); download them with "
            "img2dataset first",
        ),
        ({"id": [1], "text": ["x"]}, "holds no images: none of its columns, id, text, is of bytes"),
        (
            {"image": struct(PNG), "label": [1]},
            r"has no captions; its columns are image, label; name those of captions with --read\.c",
        ),
    ],
)
def test_files_without_images_or_captions(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        catalog.make_source(write(tmp_path / "a.parquet", **columns)).shards()


@pytest.mark.parametrize("name", ["image", "text"])
def test_columns_of_one_name(tmp_path: Path, name: str) -> None:
    table = pa.table({"image": struct(PNG), "text": ["x"]})
    table = table.append_column(name, table.column(name))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=f"has several columns called {name}; write it with one"):
        read(f"parquet:{tmp_path}/a.parquet")


def test_a_pattern_that_names_parquet_without_saying_so(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=struct(PNG), text=["x"])
    with pytest.raises(
        SourceError, match=r"names no tar; Parquet files are read as parquet:PATTERN"
    ):
        catalog.make_source(f"{tmp_path}/*.parquet").shards()
    with pytest.raises(
        SourceError, match=r"is a folder; name the shards in it, as in .*/\*\.parquet"
    ):
        catalog.make_source(f"parquet:{tmp_path}").shards()
    with pytest.raises(SourceError, match=r"no Parquet file matches .*/b\.parquet"):
        catalog.make_source(f"parquet:{tmp_path}/b.parquet").shards()


def test_one_of_several_patterns_matches_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=struct(PNG), text=["x"])
    with pytest.raises(MissingShardsError, match="1 of 2 shard patterns match nothing") as caught:
        catalog.make_source(f"parquet:{tmp_path}/{{a,b}}.parquet").shards()
    assert [shard.name for shard in caught.value.found] == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ""),
        (b"PAR1 no PAR1", ""),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>no access</html>", "it is an HTML or XML page"),
    ],
)
def test_a_file_that_is_none_costs_itself(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "b.parquet", image=struct(PNG), text=["x"])
    (tmp_path / "a.parquet").write_bytes(content)
    fault, sample = read(f"parquet:{tmp_path}/*.parquet")
    assert isinstance(fault, Fault)
    assert (fault.key, fault.reason) == ("", "not_a_parquet")
    assert message in fault.detail
    assert isinstance(sample, Sample)


def test_a_file_with_other_columns_costs_itself(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", image=struct(PNG), text=["x"])
    write(tmp_path / "b.parquet", image=struct(PNG), label=[1])
    sample, fault = read(uri.replace("a.parquet", "*.parquet"))
    assert isinstance(sample, Sample)
    assert isinstance(fault, Fault)
    assert (fault.key, fault.reason) == ("", "not_a_parquet")
    assert fault.detail.endswith(
        "b.parquet has no captions; its columns are image, label; name those of captions with "
        "--read.caption-keys"
    )
    assert advice(fault.reason, fault.detail).startswith("leave the file out")


def test_a_damaged_end_hides_no_rows(tmp_path: Path) -> None:
    """No sum covers the end of a file, where the numbers of rows stand."""
    uri = write(tmp_path / "a.parquet", image=[PNG] * 6, text=["x"] * 6)
    whole = (tmp_path / "a.parquet").read_bytes()
    rows = [match.start() for match in re.finditer(rb"\x16\x04\x16?", whole)]  # "i64: 2"
    assert len(rows) >= 3
    for at in rows:
        data = bytearray(whole)
        data[at + 1] = 0
        (tmp_path / "a.parquet").write_bytes(data)
        items = read(uri)
        assert len(items) == 6 or [item for item in items if isinstance(item, Fault)]


def test_damage_costs_the_rest_of_a_file(tmp_path: Path) -> None:
    """All rows before a damaged page are there, and one fault, whatever bytes it has."""
    images = [random.Random(n).randbytes(3000) for n in range(40)]
    table = pa.table({"image": struct(*images), "text": [f"caption {n}" for n in range(40)]})
    whole = io.BytesIO()
    pq.write_table(table, whole, row_group_size=8, write_page_checksum=True, compression="zstd")
    path = tmp_path / "a.parquet"
    draw = random.Random(1)
    ended = 0
    for _ in range(60):
        data = bytearray(whole.getvalue())
        at = draw.randrange(len(data))
        data[at : at + 8] = draw.randbytes(8)
        path.write_bytes(data)
        try:
            items = read(f"parquet:{path}")
        except SourceError:  # the names of columns are damaged
            continue
        faults = [item for item in items if isinstance(item, Fault) and item.key == ""]
        samples = [item for item in items if isinstance(item, Sample)]
        assert len(samples) + bool(faults) > 0
        assert len(faults) <= 1
        assert {fault.reason for fault in faults} <= {"not_a_parquet", "truncated_shard"}
        assert [sample.image for sample in samples] == images[: len(samples)]
        ended += bool(faults)
    assert ended > 10


def test_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of 40 MB; what pyarrow holds meanwhile is far less."""
    images = [bytes([n]) * 1_000_000 for n in range(40)]
    table = pa.table({"image": struct(*images), "text": ["x"] * 40})
    pq.write_table(
        table,
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
        data_page_size=10**6,
        write_batch_size=1,
    )
    del table
    monkeypatch.setattr(parquet_rows, "ROWS_AT_ONCE", 2)
    source = ParquetSource(f"parquet:{tmp_path}/a.parquet")
    before, most = pa.total_allocated_bytes(), 0
    for sample in source.read(source.shards()[0]):
        assert isinstance(sample, Sample)
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 20_000_000


@pytest.mark.usefixtures("s3_login")
def test_files_of_an_object_store_that_fails(s3_port: int) -> None:
    images = [random.Random(n).randbytes(200_000) for n in range(30)]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": struct(*images), "text": ["x"] * 30}), file)
    object_store.client(s3_port).put_object(
        Bucket=BUCKET, Key="hf/a b/train.parquet", Body=file.getvalue()
    )
    faults = Faults(errors=0.2, cut_downloads=0.3, only=r"\.parquet", limit=4)
    with proxy(s3_port, faults) as port:
        items = read(f"parquet:{object_store.uri(port, 'hf/a b/*.parquet')}")
    assert faults.struck
    assert [item.image for item in items if isinstance(item, Sample)] == images


@pytest.mark.long
def test_what_the_library_of_hugging_face_writes(tmp_path: Path) -> None:
    """Its to_parquet takes in images from memory; of those of files it may keep the path alone."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    pictures[1].save(tmp_path / "green.png")
    features = Features({"image": ImageFeature(), "caption": [Value("string")]})
    captions = [["a red square", "all red"], ["a green square"], ["a path"]]
    rows = {"image": [*pictures, str(tmp_path / "green.png")], "caption": captions}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    *items, path = read(f"parquet:{tmp_path}/train.parquet")
    assert isinstance(path, Fault)
    assert "only its path" in path.detail
    assert [item.captions for item in items if isinstance(item, Sample)] == [
        ("a red square", "all red"),
        ("a green square",),
    ]
    for item, picture in zip(items, pictures, strict=True):
        assert isinstance(item, Sample)
        assert Image.open(io.BytesIO(item.image)).tobytes() == picture.tobytes()
