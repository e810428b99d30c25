"""The Flickr30K and COCO folder layouts."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pds_ray.sources import annotations, karpathy
from pds_ray.sources.base import Fault, Sample, SourceError
from pds_ray.sources.karpathy import KarpathySource

RECORDS: list[dict[str, Any]] = [
    {"image": "train2014/b.jpg", "caption": "one", "image_id": "x"},
    {"image": "train2014/a.jpg", "caption": "first of a", "image_id": "y"},
    {"image": "train2014/b.jpg", "caption": "two\n", "image_id": "x"},
    {"image": "val2014/c.jpg", "caption": ["c1", "c2", "c3"]},
    {"image": "train2014/b.jpg", "caption": " ", "image_id": "x"},
]


def coco(root: Path, records: Any, split: str = "train") -> str:
    """Writes a COCO folder with every image the records name; its source URI."""
    root.mkdir(exist_ok=True)
    (root / f"coco_karpathy_{split}.json").write_text(json.dumps(records))
    for record in records:
        path = root / record["image"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(record["image"].encode())
    return f"coco:{root}:{split}"


def read_all(source: KarpathySource) -> list[Sample | Fault]:
    return [item for shard in source.shards() for item in source.read(shard)]


def test_records_of_an_image_are_merged_in_file_order(tmp_path: Path) -> None:
    assert read_all(KarpathySource(coco(tmp_path, RECORDS))) == [
        Sample("train2014/b.jpg", b"train2014/b.jpg", ("one", "two\n")),
        Sample("train2014/a.jpg", b"train2014/a.jpg", ("first of a",)),
        Sample("val2014/c.jpg", b"val2014/c.jpg", ("c1", "c2", "c3")),
    ]


@pytest.mark.parametrize(
    ("dataset", "split", "images", "captions"),
    [
        ("flickr30k", "val", 1014, 5070),
        ("flickr30k", "test", 1000, 5000),
        ("coco", "val", 5000, 25010),
        ("coco", "test", 5000, 25010),
    ],
)
def test_real_annotations(
    shared_data: Path, tmp_path: Path, dataset: str, split: str, images: int, captions: int
) -> None:
    name = karpathy.ANNOTATIONS[dataset].format(split=split) + ".gz"
    shutil.copy(shared_data / "annotations" / name, tmp_path)
    records = json.loads(gzip.decompress((tmp_path / name).read_bytes()))
    for folder in {os.path.dirname(record["image"]) for record in records}:
        (tmp_path / folder).mkdir()
    for record in records:
        (tmp_path / record["image"]).touch()

    source = KarpathySource(f"{dataset}:{tmp_path}:{split}")
    shards = source.shards()
    assert [shard.size for shard in shards] == [1000] * (images // 1000) + [images % 1000] * (
        images % 1000 > 0
    )
    assert [shard.name for shard in shards] == [
        f"{dataset}-{split}-{n:05d}" for n in range(len(shards))
    ]
    samples = [item for shard in shards for item in source.read(shard)]
    assert [
        (sample.key, list(sample.captions)) for sample in samples if isinstance(sample, Sample)
    ] == [(record["image"], record["caption"]) for record in records]
    assert sum(len(sample.captions) for sample in samples if isinstance(sample, Sample)) == captions
    assert len({sample.key for sample in samples}) == images


def test_train_is_the_default_split_and_a_root_may_hold_colons(tmp_path: Path) -> None:
    root = tmp_path / "odd:name"
    uri = coco(root, RECORDS)
    assert read_all(KarpathySource(f"coco:{root}")) == read_all(KarpathySource(uri))


def test_relative_root_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco(tmp_path / "data", RECORDS)
    monkeypatch.chdir(tmp_path)
    source = KarpathySource("coco:data")
    monkeypatch.chdir("/")
    assert len(read_all(source)) == 3


def test_instances_pickle_small_and_the_annotations_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = KarpathySource(
        coco(tmp_path, [{"image": f"val2014/{n}.jpg", "caption": "x"} for n in range(2500)])
    )
    annotations._parse.cache_clear()
    parser = Mock(side_effect=json.loads)
    monkeypatch.setattr(json, "loads", parser)
    shards = source.shards()
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert sum(len(list(copy.read(shard))) for shard in shards) == 2500
    assert parser.call_count == 1
    assert len(pickle.dumps(source)) < 1000


def test_a_changed_annotation_file_changes_its_shards(tmp_path: Path) -> None:
    before = KarpathySource(coco(tmp_path, RECORDS)).shards()
    records = [dict(record) for record in RECORDS]
    records[0]["caption"] = "ONE"
    after = KarpathySource(coco(tmp_path, records)).shards()
    assert [shard.name for shard in before] == [shard.name for shard in after]
    assert before != after


def test_bad_images_are_faults(tmp_path: Path) -> None:
    records = [{"image": f"val2014/{n}.jpg", "caption": "x"} for n in range(4)] + [
        {"image": "val2014/blank.jpg", "caption": [" ", ""]}
    ]
    source = KarpathySource(coco(tmp_path, records), max_image_bytes=20)
    (shard,) = source.shards()
    (tmp_path / "val2014" / "1.jpg").unlink()
    (tmp_path / "val2014" / "2.jpg").write_bytes(b"x" * 21)
    (tmp_path / "val2014" / "3.jpg").unlink()
    (tmp_path / "val2014" / "3.jpg").mkdir()
    found = [
        (item.key, item.reason if isinstance(item, Fault) else "") for item in source.read(shard)
    ]
    assert found == [
        ("val2014/0.jpg", ""),
        ("val2014/1.jpg", "missing_image"),
        ("val2014/2.jpg", "member_too_large"),
        ("val2014/3.jpg", "missing_image"),
        ("val2014/blank.jpg", "missing_caption"),
    ]


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    source = KarpathySource(coco(tmp_path, RECORDS))
    (tmp_path / "train2014" / "a.jpg").unlink()
    with pytest.raises(SourceError, match=r"1 of 3 images are not in .*: train2014/a\.jpg$"):
        source.shards()
    shutil.rmtree(tmp_path / "train2014")
    with pytest.raises(
        SourceError, match=r"2 of 3 images are not in .*: train2014/b\.jpg, train2014/a\.jpg$"
    ):
        source.shards()


def test_missing_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError,
        match=r"no annotation file .*/flickr30k_val\.json \(or flickr30k_val\.json\.gz\)",
    ):
        KarpathySource(f"flickr30k:{tmp_path}:val").shards()


@pytest.mark.parametrize("uri", ["coco:", "flickr:/data", "coco"])
def test_bad_uri(uri: str) -> None:
    with pytest.raises(SourceError, match="is not flickr30k:ROOT"):
        KarpathySource(uri)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "record 1: not a JSON object"),
        ({"caption": "x"}, "record 1: 'image' is not a path"),
        ({"image": "", "caption": "x"}, "record 1: 'image' is not a path"),
        ({"image": "/etc/passwd", "caption": "x"}, "record 1: image path '/etc/passwd' leaves"),
        ({"image": "a/../../b.jpg", "caption": "x"}, "record 1: image path .* leaves"),
        ({"image": "a\x00.jpg", "caption": "x"}, "record 1: image path .* leaves"),
        ({"image": "a.jpg"}, "record 1: 'caption' is neither"),
        ({"image": "a.jpg", "caption": ["x", 1]}, "record 1: 'caption' is neither"),
    ],
)
def test_malformed_records_are_named_by_index(tmp_path: Path, bad: object, message: str) -> None:
    uri = coco(tmp_path, RECORDS[:1])
    (tmp_path / "coco_karpathy_train.json").write_text(json.dumps([RECORDS[0], bad]))
    with pytest.raises(SourceError, match=message):
        KarpathySource(uri).shards()


@pytest.mark.parametrize("content", [b"", b"[{", b"{}", b"[]", b"[" * 100_000, b"\xff\xfe\x00"])
def test_unreadable_annotations(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "coco_karpathy_train.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"coco_karpathy_train\.json"):
        KarpathySource(f"coco:{tmp_path}").shards()


def test_truncated_gzip_annotations(tmp_path: Path) -> None:
    (tmp_path / "coco_karpathy_train.json.gz").write_bytes(
        gzip.compress(json.dumps(RECORDS).encode())[:-20]
    )
    with pytest.raises(SourceError, match="cannot be read"):
        KarpathySource(f"coco:{tmp_path}").shards()


def test_captions_can_be_stored_as_utf8(tmp_path: Path) -> None:
    uri = coco(tmp_path, [{"image": "val2014/a.jpg", "caption": "broken \ud83d emoji"}])
    (sample,) = read_all(KarpathySource(uri))
    assert isinstance(sample, Sample)
    assert sample.captions == ("broken ? emoji",)
